"""Output of a run: the personal model, its checkpoint, metrics and exports."""
