"""Checkpoints written beside the training by several ranks."""

from pathlib import Path

import pytest

from tests.distributed import save_ranks
from tests.distributed.launch import run_ranks


@pytest.mark.slow
def test_ranks_save_beside_their_training_and_agree_on_how_it_ended(tmp_path: Path):
    """Also on disks that are full, too small, read-only or limited for one of two ranks; by time, on a stop, in a row."""
    run_ranks(save_ranks.__name__, 2, str(tmp_path), str(tmp_path))
    tried = {(tmp_path / f"disks-{rank}").read_text() for rank in range(2)}
    assert len(tried) == 1
    if "full in the middle" not in tried.pop():
        pytest.skip("passed, but without file systems of one rank's own: mounting them needs root")
