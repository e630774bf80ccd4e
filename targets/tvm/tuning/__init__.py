"""Tuning: other schedules are tried, and what is faster is kept."""
