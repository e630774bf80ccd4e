"""Results of `pbc bench` for people: tables, charts, a page."""
