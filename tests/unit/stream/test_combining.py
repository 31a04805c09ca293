"""Several real teachers as one source: routed, and mixed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.batch import DenseTargets, SampledTargets, SoftTargets, TokenBatch
from kdscale.errors import CoverageError, IdentityError
from kdscale.evaluate.quality import HIDDEN, NO_SUMS, quality_sums, teacher_view
from kdscale.evaluate.views import view_of
from kdscale.spec import TargetSpec
from kdscale.stream.combining import Mixture, Routed, mixed
from kdscale.stream.prefetch import check_alignment
from tests.conftest import make_colleague
from tests.served import Teacher, batch

TOPK = TargetSpec("topk", k=8)
DENSE = TargetSpec("dense", encoding="float32")
SAMPLED = TargetSpec("sampled", k=6)
WEIGHTS = {"left": 0.25, "right": 0.75}


@pytest.fixture(scope="module")
def teachers(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Teacher]]:
    other = make_colleague(tmp_path_factory.mktemp("other"), seed=5)
    found = {"left": Teacher(teacher_dir), "right": Teacher(other, hidden_size=48)}
    yield found
    for teacher in found.values():
        teacher.close()


def routed_batch(rows: int = 4, seed: int = 0) -> TokenBatch:
    """Of a row's two documents one goes to each teacher; the last row is one teacher's alone."""
    plain = batch(rows, columns=16, seed=seed)
    routes = (plain.segments_RL - 1).astype(np.int8)
    routes[1::2] = np.where(routes[1::2] < 0, -1, 1 - routes[1::2])
    routes[-1] = np.where(plain.segments_RL[-1] > 0, 1, -1)
    return replace(plain, routes_RL=routes)


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(2, 20), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_shares_of_a_batch_are_its_documents(seed: int, rows: int, columns: int, count: int):
    rng = np.random.default_rng(seed)
    segments = np.cumsum(rng.random((rows, columns)) < 0.3, axis=1).astype(np.int32) + 1
    segments[np.arange(columns) >= rng.integers(0, columns + 1, rows)[:, None]] = 0
    same = np.zeros((rows, columns), bool)
    same[:, :-1] = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)
    of_document = rng.integers(0, count, (rows, columns + 2)).astype(np.int8)
    of_document[:, 0] = -1
    whole = TokenBatch(
        number=3,
        ids_RL=rng.integers(0, 99, (rows, columns), dtype=np.int32),
        segments_RL=segments,
        positions_RL=np.zeros((rows, columns), np.int32),
        predicts_RL=same & (rng.random((rows, columns)) < 0.6),
        routes_RL=np.take_along_axis(of_document, segments, 1),
    )
    whole = replace(whole, positions_RL=np.arange(columns, dtype=np.int32) + np.zeros((rows, 1), np.int32))
    labels = np.full(whole.num_tokens, -1)
    for route in range(count):
        part = whole.of_route(route)
        places = np.flatnonzero(whole.routes_RL[whole.predicts_RL] == route)
        labels[places] = part.labels()
        # Whole documents, and nothing of any other teacher's.
        mine = (whole.routes_RL == route) & (whole.predicts_RL & (whole.routes_RL == route)).any(1)[:, None]
        assert part.ids_RL[part.segments_RL > 0].tolist() == whole.ids_RL[mine].tolist()
        assert part.positions_RL[part.segments_RL > 0].tolist() == whole.positions_RL[mine].tolist()
        assert part.num_tokens == len(places)
    assert labels.tolist() == whole.labels().tolist()


@pytest.mark.parametrize("spec", [TOPK, SAMPLED, DENSE], ids=lambda spec: spec.payload)
def test_routed_targets_are_each_teachers_own(teachers: dict[str, Teacher], spec: TargetSpec):
    whole = routed_batch()
    sources = {name: teacher.source() for name, teacher in teachers.items()}
    source = Routed(sources, 2)
    found = source.fetch(whole, spec)
    check_alignment(whole, found)
    shares = source.shares(whole)
    assert sum(len(share.places) for share in shares.values()) == whole.num_tokens
    for name, share in shares.items():
        alone, here = sources[name].fetch(share.batch, spec), found.each(lambda one, at=share.places: one[at])
        for ours, theirs in zip(here.tensors(), alone.tensors(), strict=True):
            width = theirs.shape[1] if theirs.dim() == 2 else None
            assert torch.equal(ours[:, :width] if width else ours, theirs)
        if spec.payload == "dense":
            # Neither the neighbours nor the place in the row change what a document's teacher says.
            every = sources[name].fetch(whole, spec)
            assert torch.allclose(here.logp_TV, every.logp_TV[torch.from_numpy(share.places)], atol=1e-4)
    if spec.payload == "sampled":
        apart = [source.fetch(row, spec) for row in whole.rows()]
        for ours, theirs in zip(SoftTargets.join(apart).tensors()[1:3], found.tensors()[1:3], strict=True):
            assert torch.allclose(ours.double(), theirs.double(), atol=1e-3), "neither do the rows beside it"
    scored = {name: teacher.scorer.stats()["tokens"] for name, teacher in teachers.items()}
    source.fetch(whole, spec)
    for name, share in shares.items():
        assert teachers[name].scorer.stats()["tokens"] - scored[name] == share.batch.num_tokens_real
    # What trains nothing, and what has no teacher.
    assert len(source.fetch(whole.untrained(), spec)) == 0
    for routes in (None, np.full_like(whole.routes_RL, 2)):
        with pytest.raises(CoverageError, match=r"batch 0( doesn't say|: \d+ of \d+ trained tokens go to none of)"):
            source.fetch(replace(whole, routes_RL=routes), spec)
    source.close()


def test_a_directory_tells_teachers_apart(teachers: dict[str, Teacher]):
    """The listing of one teacher holds no other's replica, and a name nobody has is refused."""
    from kdscale.config.sections import StreamSection
    from kdscale.stream.client import FlightSource
    from kdscale.stream.directory import DirectoryServer, list_endpoints
    from kdscale.stream.protocol import Access
    from tests.served import TOKEN

    meanings = {name: replace(teacher.meaning, teacher=name) for name, teacher in teachers.items()}
    directory = DirectoryServer("127.0.0.1", 0, TOKEN, meanings)
    access = Access(directory.address, TOKEN)
    right = replace(teachers["right"].endpoint(), replica="right-0")
    directory.of("right").publish("right-0", [right])
    directory.of("left").withdraw("left-0", rebuilding=True)
    assert list_endpoints(access, "right").endpoints == [right]
    assert list_endpoints(access, "right").meaning == meanings["right"]
    assert list_endpoints(access, "left").endpoints == []
    assert list_endpoints(access, "left").rebuilding == ["left-0"]
    directory.of("left").withdraw("left-0", rebuilding=False)
    assert not directory.of("left").has_hope
    assert directory.of("right").has_hope
    for asked, fault in (("middle", "no teacher is called 'middle' here; there are left, right"), ("right", "teacher")):
        source = FlightSource(access, meanings["left"], StreamSection(give_up_seconds=3), "test", teacher=asked)
        with pytest.raises(IdentityError, match=fault):
            source.fetch(batch(), TOPK)
        source.close()
    directory.shutdown()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_mixture_of_all_log_probabilities_is_exact(teachers: dict[str, Teacher], temperature: float):
    sources = {name: teacher.source() for name, teacher in teachers.items()}
    source, spec = Mixture(sources, WEIGHTS, 2), replace(DENSE, temperature=temperature)
    found = source.fetch(batch(), spec)
    assert isinstance(found, DenseTargets)
    check_alignment(batch(), found)
    parts = [one.fetch(batch(), spec).logp_TV.double().numpy() for one in sources.values()]
    expected = np.log(sum(weight * np.exp(part) for weight, part in zip(WEIGHTS.values(), parts, strict=True)))
    assert np.abs(found.logp_TV.numpy() - expected).max() < 1e-5
    assert found.temperature == temperature
    source.close()


def dense_of(targets: SoftTargets, vocab_size: int) -> torch.Tensor:
    assert isinstance(targets, SampledTargets)
    used = torch.arange(targets.ids_TK.shape[1]) < targets.count_T[:, None]
    assert not targets.weight_TK[~used].any()
    assert all(len(set(ids[there].tolist())) == there.sum() for ids, there in zip(targets.ids_TK, used, strict=True))
    dense = torch.zeros(len(targets), vocab_size, dtype=torch.float64)
    return dense.scatter_add_(1, targets.ids_TK.long(), targets.weight_TK.double())


def test_a_mixture_of_samples_is_unbiased(teachers: dict[str, Teacher]):
    sources = {name: teacher.source() for name, teacher in teachers.items()}
    source, rows = Mixture(sources, WEIGHTS, 2), batch(1)
    exact = source.fetch(rows, DENSE)
    assert isinstance(exact, DenseTargets)
    vocab_size, draws = exact.logp_TV.shape[1], 400
    mean = torch.zeros(len(exact), vocab_size, dtype=torch.float64)
    off = []
    for number in range(draws):
        found = source.fetch(replace(rows, number=number), SAMPLED)
        dense = dense_of(found, vocab_size)
        assert torch.allclose(dense.sum(1), torch.ones(len(found), dtype=torch.float64), atol=1e-3)
        mean += dense / draws
        if number + 1 in (draws // 16, draws):
            off.append(float((mean * draws / (number + 1) - exact.logp_TV.exp()).abs().sum(1).mean()))
    # Sixteen times the draws: noise falls to a quarter, and a bias would stay.
    assert off[1] < 0.3 * off[0], off
    entropies = [one.fetch(rows, SAMPLED).entropy_T for one in sources.values()]
    assert torch.allclose(found.entropy_T, WEIGHTS["left"] * entropies[0] + WEIGHTS["right"] * entropies[1])
    source.close()


def test_entries_that_several_have_drawn_stand_once():
    ids = [torch.tensor([[7, 3, 0], [2, 0, 0]]), torch.tensor([[3, 9, 7], [0, 5, 0]])]
    weights = [torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]), torch.tensor([[0.6, 0.2, 0.2], [0.5, 0.5, 0.0]])]
    counts = [torch.tensor([3, 1]), torch.tensor([3, 2])]
    parts = [
        SampledTargets(torch.zeros(2).int(), i.int(), w, c.int(), c.int(), torch.ones(2), 1.0)
        for i, w, c in zip(ids, weights, counts, strict=True)
    ]
    found = mixed(parts, [0.5, 0.5])
    assert found.ids_TK.tolist() == [[0, 3, 7, 9], [0, 2, 5, 0]]
    assert torch.allclose(found.weight_TK, torch.tensor([[0.1, 0.45, 0.35, 0.1], [0.25, 0.5, 0.25, 0.0]]))
    assert found.count_T.tolist() == [4, 3]
    with pytest.raises(ValueError, match="mixtures are of dense or of sampled targets"):
        mixed([parts[0], DenseTargets(torch.zeros(2).int(), torch.zeros(2, 9), 1.0)], [0.5, 0.5])


def test_held_out_quality_is_against_each_documents_teacher_and_the_mixture(teachers: dict[str, Teacher]):
    sources = {name: teacher.source() for name, teacher in teachers.items()}
    heads = {name: source.fetch_head() for name, source in sources.items()}
    batches, device = [routed_batch(seed=seed) for seed in (0, 1)], torch.device("cpu")
    student = [sources["left"].fetch(one, HIDDEN).hidden_TD for one in batches]

    routed = Routed(sources, 2)
    sums = view_of(batches, routed, heads, 2, device).sums(student, heads["left"])
    expected = NO_SUMS.clone()
    for name, source in sources.items():
        whole = quality_sums(student, heads["left"], teacher_view(batches, source, heads[name], 2, device))
        mine = [torch.from_numpy(routed.shares(one)[name].places) for one in batches]
        view = teacher_view([routed.shares(one)[name].batch for one in batches], source, heads[name], 2, device)
        part = quality_sums([s[there] for s, there in zip(student, mine, strict=True)], heads["left"], view)
        assert 0 < part[4] < whole[4]
        expected += part
    assert torch.allclose(sums, expected)
    assert sums[4] == sum(one.num_tokens for one in batches)

    found = view_of(batches, Mixture(sources, WEIGHTS, 2), heads, 2, device).sums(student, heads["left"])
    kl = nll = 0.0
    for one, hidden in zip(batches, student, strict=True):
        q = torch.log_softmax(heads["left"].logits(hidden).double(), -1)
        p = [
            torch.softmax(heads[name].logits(source.fetch(one, HIDDEN).hidden_TD).double(), -1)
            for name, source in sources.items()
        ]
        mean = sum(weight * part for weight, part in zip(WEIGHTS.values(), p, strict=True))
        kl += float((mean * (mean.log() - q)).sum())
        nll -= float(mean.log().gather(1, torch.from_numpy(one.labels()).long()[:, None]).sum())
    assert float(found[0]) == pytest.approx(kl, rel=1e-4)
    assert float(found[3]) == pytest.approx(nll, rel=1e-4)
    assert found[4] == sums[4]
    for source in sources.values():
        source.close()
