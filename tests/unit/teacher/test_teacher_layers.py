"""Layers asked of a served teacher are transformers' hidden states at the trained positions; what it lacks is refused alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdscale.errors import PayloadError
from kdscale.spec import TargetSpec
from tests.served import Teacher, batch

PLAIN = TargetSpec("topk", k=7)


@pytest.fixture(scope="module")
def teacher(teacher_dir: Path) -> Iterator[Teacher]:
    teacher = Teacher(teacher_dir)
    yield teacher
    teacher.close()


def test_they_are_transformers_hidden_states(teacher: Teacher, teacher_dir: Path):
    rows, source = batch(rows=3), teacher.source()
    asked = replace(PLAIN, layers=(0, 2, 4))
    targets = source.fetch(rows, asked)
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32).eval()
    before_norm: list[torch.Tensor] = []
    model.base_model.layers[-1].register_forward_hook(lambda *given: before_norm.append(given[2]))
    found: list[torch.Tensor] = []
    with torch.no_grad():
        for row in range(rows.num_rows):
            for document in (1, 2):
                here = rows.segments_RL[row] == document
                ids = torch.from_numpy(rows.ids_RL[row][here]).long()[None]
                states = model(input_ids=ids, output_hidden_states=True).hidden_states
                both = torch.stack([states[0][0], states[2][0], before_norm.pop()[0]], dim=1)
                found.append(both[torch.from_numpy(rows.predicts_RL[row][here])])
    torch.testing.assert_close(targets.layers_TND.float(), torch.cat(found), rtol=2**-8, atol=1e-5)
    plain = source.fetch(rows, PLAIN)
    assert plain.layers_TND is None
    assert torch.equal(plain.ids_TK, targets.ids_TK)
    source.close()


def test_what_it_lacks_is_refused_and_it_serves_on(teacher: Teacher):
    source = teacher.source()
    with pytest.raises(PayloadError, match=r"layers \[5\] were asked for; the teacher's are 0 to 4"):
        source.fetch(batch(), replace(PLAIN, layers=(5,)))
    with pytest.raises(PayloadError, match="ascending"):
        source.fetch(batch(), replace(PLAIN, layers=(3, 1)))
    assert len(source.fetch(batch(), PLAIN)) == batch().num_tokens
    source.close()


def test_every_block_of_a_forward_counts_as_progress(teacher: Teacher):
    """A forward may take longer than a student waits for one that stands still."""
    source, before = teacher.source(), teacher.scorer.progress()
    source.fetch(batch(), PLAIN)
    assert teacher.scorer.progress() == before + 4 + 1
    source.close()
