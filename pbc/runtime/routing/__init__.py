"""Routing: which level each sample runs at, from measured costs and the bounds set."""
