"""Matrices only: Kronecker products, damping and inverses."""
