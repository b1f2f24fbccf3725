"""Start: how a folder becomes a workspace, and the demo."""
