"""The names of what a training step reads and returns beside features and parameters."""

from __future__ import annotations

from pbc.bundle.graph_name import SAVED as SAVED

LABELS = "labels"
SMOOTHING = "label_smoothing"
LOSS, LOSSES, LOGITS = "loss", "losses", "logits"
