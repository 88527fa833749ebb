"""Logs and weights of all runs, and what writes (run.py), reads (table.py) and times (bench.py) them."""
