"""Requests in, soft targets out: the sharded model, its sequencer, its ranks and their service."""
