"""Lowering to TVM."""
