"""Boards: facts about devices, as data."""
