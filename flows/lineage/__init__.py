"""Lineage: the record of a version, the entries of the log, and all that is told from them. Pure."""
