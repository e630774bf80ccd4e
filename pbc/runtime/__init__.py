"""The device side: load a bundle, train it on the user's photos, predict. No compiler, no torch."""
