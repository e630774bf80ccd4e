"""The derived training step: gradients and optimizers as graphs (compile side)."""
