"""Computations on embeddings before and beside the network."""
