"""The names of what a training step reads and returns beside features and parameters."""

from __future__ import annotations

LABELS = "labels"
SMOOTHING = "label_smoothing"
LOSS, LOSSES, LOGITS = "loss", "losses", "logits"
SAVED = "saved/"
"""The prefix of a tensor's name that the forward keeps for the update."""
