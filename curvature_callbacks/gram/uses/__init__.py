"""Uses: what is known of one operation on a parameter once both passes have seen it."""
