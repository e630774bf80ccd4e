"""Bring a bundle and the runtime that executes it to a board, and make them the active ones there.

`board.py` and `probe.sh` run on the board and need nothing of pbc; the others run here.
"""
