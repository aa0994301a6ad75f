"""Sweeps: one file, many runs that differ in few things, one report; `python -m tools.sweep`."""
