"""The way out: a program becomes the files of a bundle, whatever its engine (compile side)."""
