"""How much of a row an export is compared on."""

from pathlib import Path

import numpy as np
import torch

from kdscale.batch import TokenBatch
from kdscale.evaluate.plain import plain_logits
from kdscale.student.exporting import beginning


def row_of(columns: int, first: int) -> TokenBatch:
    """A row of one document, which is trained on from column ``first`` on."""
    ids = np.random.default_rng(0).integers(0, 100, (1, columns), dtype=np.int32)
    predicts = np.arange(columns)[None] >= first
    predicts[:, -1] = False
    return TokenBatch(0, ids, np.ones_like(ids), np.arange(columns, dtype=np.int32)[None], predicts)


def test_the_beginning_of_a_long_row_has_the_logits_of_the_whole(teacher_dir: Path):
    for first in (0, 600):
        row = row_of(700, first)
        short = beginning(row)
        assert short.ids_RL.shape[1] == max(512, first + 2)
        assert 0 < short.num_tokens < row.num_tokens
        logits = [
            plain_logits(one, teacher_dir, 100, torch.float32, "language-modelling", torch.device("cpu"))
            for one in (short, row)
        ]
        torch.testing.assert_close(logits[0], logits[1][: short.num_tokens])
    assert beginning(row_of(40, 0)).num_tokens == 39
