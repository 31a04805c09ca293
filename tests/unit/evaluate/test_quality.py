"""Held-out quality of classifiers, against counting by hand."""

import numpy as np
import pytest
import torch

from kdscale.batch import Batch, HiddenTargets, SoftTargets
from kdscale.evaluate.quality import NO_SUMS, quality, quality_sums, teacher_view
from kdscale.head import Head, HeadSpec
from kdscale.spec import TargetSpec
from tests.classes import DIGITS, example_batch

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
