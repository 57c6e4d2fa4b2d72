"""Numbers read off Gram matrices and Kronecker factors."""
