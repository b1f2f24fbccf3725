"""Step: from a dataset version to a registered model version. Also withdrawals, purges, and what `copal gc` frees."""
