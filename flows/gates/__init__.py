"""Gates: what a version must hold before it may serve, and the aliases that follow from it."""
