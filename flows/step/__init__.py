"""Step: from a dataset version to a registered model version, and what goes with it: withdrawing, purging, freeing."""
