"""`pbc profile`: what each stage of each level costs on this machine."""
