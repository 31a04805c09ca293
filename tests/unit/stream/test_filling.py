"""Two ranks that keep what they ask for: what one has recorded is the other's too, whenever the teacher is let go."""

from pathlib import Path

import pytest
import torch

from kdscale.batch import SoftTargets, TokenBatch
from kdscale.errors import StreamError
from kdscale.spec import TargetSpec
from kdscale.stream.filling import Filling
from kdscale.stream.recording import Provenance, begin
from tests.served import Teacher, batch

TOPK, HIDDEN = TargetSpec("topk", k=7), TargetSpec("hidden", encoding="bfloat16")


class Overtaken(Filling):
    """Its teacher is let go between its look into the recording and its question."""

    def _ask(self, batch: TokenBatch, spec: TargetSpec) -> SoftTargets:
        self.let_go(5)
        return super()._ask(batch, spec)


def make(kind: type[Filling], teacher: Teacher, directory: Path, rank: int) -> Filling:
    provenance = Provenance(teacher.meaning, corpus="text", rows="isolated 12", targets=TOPK)
    begin(directory, provenance)
    return kind(
        teacher.source(), directory, provenance, meaning=teacher.meaning, row_tokens=12, heldout=HIDDEN, rank=rank
    )


def test_rows_of_another_rank_are_found_when_the_teacher_goes_meanwhile(teacher: Teacher, tmp_path: Path):
    one, other = make(Filling, teacher, tmp_path, 0), make(Overtaken, teacher, tmp_path, 1)
    rows = batch(rows=4)
    asked = one.fetch(rows, TOPK)
    one.flush()
    for ours, theirs in zip(other.fetch(rows, TOPK).tensors(), asked.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs)
    # What nobody has recorded cannot be had any more.
    with pytest.raises(StreamError, match="batch 1 has rows that were not recorded, and the teacher was let go"):
        other.fetch(batch(rows=2, seed=1), TOPK)
    for filling in (one, other):
        filling.close()


def test_a_row_that_is_held_out_and_trained_on_is_kept_as_both(teacher: Teacher, tmp_path: Path):
    filling, row = make(Filling, teacher, tmp_path, 0), batch(rows=1)
    for spec in (HIDDEN, TOPK):
        filling.fetch(row, spec)
    filling.flush()
    assert filling.lacks([(row, HIDDEN), (row, TOPK)]) == 0
    filling.close()


def test_an_answer_that_comes_after_the_end_leaves_no_shard_begun(teacher: Teacher, tmp_path: Path):
    filling, rows = make(Filling, teacher, tmp_path, 0), batch(rows=3)
    live = teacher.source()
    filling.close()
    filling._live = live
    assert len(filling.fetch(rows, TOPK)) == rows.num_tokens
    assert list(tmp_path.glob(".*.partial")) == []
