"""What is computed from embeddings before and beside the network."""
