"""The passes that come with pbc, one file each; imported as `pbc.passes`."""

if __name__ != "pbc.passes":
    raise ImportError("import pbc.passes, not passes: it would be a second copy of every pass")
