"""Batches, a scorer and a source of targets in, quality and efficiency figures out."""
