"""Hessians, Gauss-Newton matrices, Fishers and K-FAC of an objective, known by their products with vectors."""
