"""Training on many devices: what each shares of its training, and how that is averaged."""
