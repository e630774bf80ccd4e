"""Features: what the frozen prefix sends, computed ahead and kept."""
