"""Sparse back-propagation: what trains of each layer, what it takes, and what it is worth."""
