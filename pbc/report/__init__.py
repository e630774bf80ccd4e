"""A personal model for people: one page that says what it can and what it cannot."""
