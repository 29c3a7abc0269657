"""Single operations: what is run, against what, how it is checked, and the least time it can take."""
