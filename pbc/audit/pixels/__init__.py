"""Photos rebuilt from a shared gradient alone (with torch): what no list of candidates is for."""
