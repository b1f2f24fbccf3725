"""The page of a lineage: one HTML file that loads nothing."""
