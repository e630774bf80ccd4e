"""The rivals of `pbc bench`, pbc among them."""
