"""The teacher's hidden states in, soft targets and their Arrow record batches out (and back)."""
