"""Verification: whether a version is what was registered, and whether it can be made again."""
