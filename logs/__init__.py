"""Logs of runs, and what reads and writes them: run.py, table.py, bench.py."""
