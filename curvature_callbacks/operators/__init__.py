"""Matrix-free operators of an objective."""
