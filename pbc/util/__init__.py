"""Small things that either side uses and that know nothing of the rest."""
