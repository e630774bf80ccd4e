"""The targets that come with pbc, one file each; imported as `pbc.targets`."""

if __name__ != "pbc.targets":
    raise ImportError("import pbc.targets, not targets: it would be a second copy of every target")
