"""`pbc bench`: ways to train one bundle, compared in turn under one protocol.

`compare` runs a `match` of rivals: `rival` is their protocol, `rivals/` has those that pbc brings.
`standings` are computed from the match's cells, `results` holds everything, `report/` shows it.
"""
