"""The way in: a model's name or a user's file becomes a captured graph (compile side)."""
