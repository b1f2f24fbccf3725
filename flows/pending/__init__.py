"""Pending: which dataset versions the newest model version does not know yet, and how the watcher is woken."""
