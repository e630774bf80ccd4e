"""The intermediate representation: programs, their graphs and dimensions (compile side)."""
