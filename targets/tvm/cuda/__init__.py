"""CUDA: schedules for GPUs, and their machine code."""
