"""Runs: what Prefect does for a flow. Its tasks, what its page shows, and a step as a run of its own on a worker."""
