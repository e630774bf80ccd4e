"""What `pbc bench` found, for people: tables, charts, a page."""
