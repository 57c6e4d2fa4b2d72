"""Products: Grams of one parameter, computed from its uses."""
