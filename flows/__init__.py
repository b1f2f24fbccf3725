"""The pipeline: Prefect flows at the door, behind them a room (a sub-package) for each matter.

CONTRIBUTING.md has the diagram of the rooms and a line for every file.
"""
