"""Many nets with random weights, and how far the library covers them (apps/zoo.py)."""
