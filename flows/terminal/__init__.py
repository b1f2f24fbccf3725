"""Terminal: what a person reads there. Everything that rich draws."""
