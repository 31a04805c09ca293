"""Student hidden states and soft targets in, sums and counts with their gradients out."""
