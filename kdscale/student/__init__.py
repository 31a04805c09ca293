"""Batches and soft targets in, optimizer steps and checkpoints out."""
