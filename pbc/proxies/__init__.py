"""Proxies of the frozen part: how they are made, aligned and judged (compile side)."""
