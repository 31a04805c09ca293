"""Checkpoints of students cut into stages."""

from pathlib import Path

import pytest

from tests.distributed import resume_ranks
from tests.distributed.launch import run_ranks


@pytest.mark.slow
def test_resumed_pipeline_repeats_the_steps_bit_for_bit(tmp_path: Path):
    """2 stages x 2 data ranks under ZeRO-1, tied and untied, float32 and bfloat16; and the export from the checkpoint."""
    run_ranks(resume_ranks.__name__, 4, str(tmp_path), str(tmp_path))
