"""Start: a new workspace, and the demo."""
