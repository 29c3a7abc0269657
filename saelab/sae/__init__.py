"""Sparse autoencoders: tensors in, tensors out. One architecture a file; ``io`` reads and writes them."""
