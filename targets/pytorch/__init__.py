"""Lowering to the PyTorch engine."""
