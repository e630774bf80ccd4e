"""What a run leaves: the personal model, its checkpoint, metrics and exports."""
