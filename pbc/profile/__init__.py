"""`pbc profile`: the cost of each stage of each level on a machine.

`measure` starts `processes`, each a `worker` that takes a `task` and times `bundle_stages` and
`torch_stages` in `turns`; `remote` has a board do all of this.
"""
