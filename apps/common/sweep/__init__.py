"""Sweeps: many runs of a trainer in one vmapped step (apps/sweep.py)."""
