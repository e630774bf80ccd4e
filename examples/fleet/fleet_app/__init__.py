"""A node and a server of a fleet: pbc has both apps."""
