import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.batch import TopkTargets
from kdscale.head import Head, HeadSpec
from kdscale.spec import Encoding, TargetSpec
from kdscale.targets import payloads
from kdscale.targets.decode import decode
from kdscale.targets.encode import encode
from kdscale.targets.layout import schema
from kdscale.targets.payloads import largest, make_targets


def topk_targets(hidden, head, labels, *, k: int, temperature: float) -> TopkTargets:
    found = make_targets(hidden, head, labels, TargetSpec("topk", k=k, temperature=temperature))
    assert isinstance(found, TopkTargets)
    return found


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("padded", [0, 7])
def test_topk_is_the_top_of_the_softmax(monkeypatch: pytest.MonkeyPatch, temperature: float, padded: int):
    monkeypatch.setattr(payloads, "CHUNK_BYTES", 3 * 4 * 40)  # several chunks
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(10, 8, generator=generator), torch.randn(40 + padded, 8, generator=generator)
    bias = torch.randn(40 + padded, generator=generator)
    if padded:
        weight[40:] *= 100  # phantom rows must not matter, however loud
    head = Head(weight, bias, HeadSpec(40, softcap=3.0, scale=0.5))
    found = topk_targets(hidden, head, torch.arange(10), k=6, temperature=temperature)
    logits = 3.0 * torch.tanh((hidden @ weight[:40].T + bias[:40]) * 0.5 / 3.0)
    logp = torch.log_softmax(logits.double() / temperature, -1)
    values, ids = logp.topk(6)
    torch.testing.assert_close(found.ids_TK.long(), ids)
    torch.testing.assert_close(found.logp_TK.double(), values, rtol=1e-5, atol=1e-6)
    at_one = torch.log_softmax(logits.double(), -1).gather(1, ids)
    torch.testing.assert_close(
        temperature * found.logp_TK + found.shift_T[:, None], at_one.float(), rtol=1e-5, atol=1e-5
    )
    rest = logp.exp().scatter(1, ids, 0).sum(-1)
    torch.testing.assert_close(found.tail_logp_T.double(), rest.log(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.entropy_T.double(), -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-5)


def test_whole_vocabulary_has_no_tail():
    head = Head(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), None, HeadSpec(5))
    found = topk_targets(torch.ones(2, 3), head, torch.zeros(2), k=9, temperature=1.0)
    assert found.ids_TK.shape == (2, 5)
    assert (found.tail_logp_T == -torch.inf).all()


def test_no_position():
    head = Head(torch.ones(5, 3), None, HeadSpec(5))
    found = topk_targets(torch.ones(0, 3), head, torch.zeros(0), k=2, temperature=1.0)
    assert len(found) == 0
    assert found.ids_TK.shape == (0, 2)


@given(st.integers(0, 5), st.sampled_from([31, 500, 1024, 5000]), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_largest_are_those_of_topk(rows: int, vocab: int, k: int, seed: int):
    values = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    k = min(k, vocab)
    found, ids = largest(values, k)
    expected = values.topk(k)
    assert torch.equal(found, expected.values)
    assert torch.equal(values.gather(1, ids), found)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_the_largest_with_ties_and_ruled_out_tokens():
    values = torch.full((2, 4096), -torch.inf)
    values[:, ::9] = 1.0
    values[1, 4095] = 2.0
    found, ids = largest(values, 5)
    assert found.tolist() == [[1.0] * 5, [2.0] + [1.0] * 4]
    assert torch.equal(values.gather(1, ids), found)
    assert all(len(set(row)) == 5 for row in ids.tolist())


@pytest.mark.parametrize("encoding", ["float16", "uint8", "uint4"])
@pytest.mark.parametrize("vocab", [300, 70_000])
def test_what_is_rounded_where_it_was_computed_travels_as_the_same_bytes(encoding: Encoding, vocab: int):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 8, generator=generator), torch.randn(vocab, 8, generator=generator) * 3
    head, labels = Head(weight, None, HeadSpec(vocab)), torch.arange(12)
    spec = TargetSpec("topk", k=20, encoding=encoding)
    kind = schema(spec, vocab, 8)
    whole, rounded = (make_targets(hidden, head, labels, spec, as_sent=sent) for sent in (False, True))
    assert encode(rounded, spec, kind, vocab) == encode(whole, spec, kind, vocab)
    assert (sum(one.nbytes for one in rounded.tensors()) < sum(one.nbytes for one in whole.tensors())) == (
        encoding == "float16" or (encoding == "uint8" and vocab == 300)
    )


def test_what_is_ruled_out_stays_finite_when_rounded():
    """Below float16's range there is no tail worth the name, and the decoder takes only finite numbers."""
    spec = TargetSpec("topk", k=3)
    bias = torch.tensor([0.0, -1e6, -2e6, -3e6])
    head = Head(torch.zeros(4, 2), bias, HeadSpec(4))
    found = make_targets(torch.ones(1, 2), head, torch.zeros(1), spec, as_sent=True)
    back = decode(encode(found, spec, schema(spec, 4, 2), 4), spec, 4)
    assert isinstance(back, TopkTargets)
    assert torch.isfinite(back.logp_TK).all()
    assert back.logp_TK[0, 0] == 0
