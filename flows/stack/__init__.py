"""Stack: what `copal up` starts for a team on one machine."""
