"""Held-out quality of classifiers, and of students with a tokenizer of their own, against counting by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kdscale.batch import Batch, HiddenTargets, SoftTargets
from kdscale.config.sections import DataSection
from kdscale.data.pairs import PairLoader, build_pairs
from kdscale.evaluate.quality import NO_SUMS, quality, quality_sums, teacher_view
from kdscale.head import Head, HeadSpec
from kdscale.spec import TargetSpec
from tests.classes import DIGITS, example_batch
from tests.pairs import make_pair, make_vocabulary

WIDTH = 6
CPU = torch.device("cpu")


def random_head(seed: int) -> Head:
    return Head(torch.randn(DIGITS, WIDTH, generator=torch.Generator().manual_seed(seed)), None, HeadSpec(DIGITS))


def hidden_of(batch: Batch, seed: int) -> torch.Tensor:
    drawn = torch.randn(batch.num_tokens, WIDTH, generator=torch.Generator().manual_seed(100 * seed + batch.number))
    return drawn.bfloat16().float()


class Source:
    """Hidden states of a teacher that reads nothing."""

    def fetch(self, batch: Batch, spec: TargetSpec) -> SoftTargets:
        assert spec.payload == "hidden"
        assert batch.num_tokens, "asked about a batch in which nothing counts, which is in no recording"
        return HiddenTargets(torch.from_numpy(batch.labels()), hidden_of(batch, 1).bfloat16())


def test_accuracy_counts_the_labels_found_likeliest():
    batches: list[Batch] = [example_batch("vit", rows=8, seed=seed) for seed in range(6)]
    # What a rank takes that has no batch left.
    batches.append(batches[0].cut(slice(0, 1)).untrained())
    teacher, student = random_head(1), random_head(2)
    view = teacher_view(batches, Source(), teacher, 2, CPU)
    sums = NO_SUMS + quality_sums([hidden_of(batch, 2) for batch in batches], student, view)
    found = quality(sums, classes=True)

    labels = torch.from_numpy(np.concatenate([batch.labels() for batch in batches])).long()
    theirs = torch.cat([hidden_of(batch, 1) for batch in batches]) @ teacher.weight_VD.T
    ours = torch.cat([hidden_of(batch, 2) for batch in batches]) @ student.weight_VD.T
    assert found.num_tokens == len(labels) == 6 * 7
    assert found.accuracy_teacher == pytest.approx((theirs.argmax(-1) == labels).double().mean().item())
    assert found.accuracy_student == pytest.approx((ours.argmax(-1) == labels).double().mean().item())
    assert found.accuracy_student not in (0, found.accuracy_teacher)
    assert found.top1_agreement == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).double().mean().item())
    kl = torch.nn.functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert found.kl == pytest.approx(kl.item(), rel=1e-4)
    assert quality(sums, classes=False).accuracy_student is None


def test_bits_per_byte_are_of_what_each_side_predicts(tmp_path: Path, text_dir: Path, tokenizer_dir: Path):
    pair = make_pair(make_vocabulary(text_dir, tmp_path / "own.model"), tokenizer_dir)
    data = DataSection(train=[str(text_dir / "train.jsonl")], heldout=[], cache_dir=str(tmp_path), row_tokens=40)
    split = build_pairs(data, pair, lambda *_: None).train
    batches: list[Batch] = [PairLoader(split, "isolated", 40, 2, 0).batch(number) for number in range(3)]
    batches.append(batches[0].cut(slice(0, 1)).untrained())
    # Heads that say nothing: every token costs the logarithm of the vocabulary.
    teacher, student = (
        Head(torch.zeros(one.vocab_size, WIDTH), None, HeadSpec(one.vocab_size)) for one in (pair.teacher, pair.student)
    )
    view = teacher_view(batches, Source(), teacher, 2, CPU)
    found = quality(NO_SUMS + quality_sums([hidden_of(batch, 2) for batch in batches], student, view), classes=False)
    for bits, tokenizer, sides in (
        (found.bits_per_byte_student, pair.student, batches),
        (found.bits_per_byte_teacher, pair.teacher, [batch.asked for batch in batches]),
    ):
        spelling, tokens, num_bytes = tokenizer.spelling(), 0, 0
        for side in sides:
            tokens += side.num_tokens
            num_bytes += sum(len(spelling[label] or b"") for label in side.labels())
        assert bits == pytest.approx(tokens * np.log2(tokenizer.vocab_size) / num_bytes, rel=1e-6)
    assert found.kl is found.top1_agreement is found.perplexity_teacher is None
    assert found.perplexity_student == pytest.approx(pair.student.vocab_size)
    alone = quality(
        quality_sums([hidden_of(batch, 2) for batch in batches], student, view), classes=False, teacher=False
    )
    assert alone.bits_per_byte_teacher is None
