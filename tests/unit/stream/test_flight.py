"""Real Flight servers over a real tiny teacher, one rank, no Ray."""

import datetime
import itertools
import queue
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
import pytest
import torch

from kdscale.batch import DenseTargets, HiddenTargets, SampledTargets, SoftTargets, TokenBatch, TopkTargets
from kdscale.cluster.security import Authority
from kdscale.config.sections import StreamSection
from kdscale.config.teachers import ALONE
from kdscale.errors import CoverageError, IdentityError, PayloadError, StreamError
from kdscale.head import Head
from kdscale.spec import TargetSpec
from kdscale.stream import server
from kdscale.stream.client import FlightSource, Received
from kdscale.stream.directory import DirectoryServer, list_endpoints
from kdscale.stream.prefetch import Prefetcher, check_alignment
from kdscale.stream.protocol import Access, Endpoint, Header, call, connect, message
from kdscale.stream.server import TargetServer
from kdscale.targets.decode import decode
from kdscale.teacher.model import Score
from tests.served import TOKEN, Held, Teacher, batch

TOPK = TargetSpec("topk", k=7, temperature=2.0)


def test_served_targets_are_the_models_own(teacher: Teacher):
    rows = batch()
    served = teacher.source().fetch(rows, TOPK)
    (local,) = teacher.model.forward([Score(rows, TOPK)])
    assert isinstance(served, TopkTargets)
    assert isinstance(local, TopkTargets)
    assert torch.equal(served.ids_TK, local.ids_TK.int())
    assert torch.equal(served.labels_T, torch.from_numpy(rows.labels()))
    torch.testing.assert_close(served.logp_TK, local.logp_TK.float(), rtol=2**-10, atol=1e-4)
    torch.testing.assert_close(served.tail_logp_T, local.tail_logp_T, rtol=2**-11, atol=1e-6)


def test_samples_follow_from_seed_number_and_tokens_alone(teacher: Teacher):
    spec, rows, source = TargetSpec("sampled", k=6, seed=3), batch(rows=4), teacher.source()
    first = source.fetch(rows, spec)
    assert isinstance(first, SampledTargets)
    again = [source.fetch(rows.cut(slice(row, row + 1)), spec) for row in range(4)]
    for part, whole in zip(SampledTargets.join(again).tensors(), first.tensors(), strict=True):
        assert torch.equal(part, whole), "cutting a batch into requests moves no draw"
    for other in (source.fetch(rows, replace(spec, seed=4)), source.fetch(replace(rows, number=9), spec)):
        assert isinstance(other, SampledTargets)
        assert not torch.equal(other.ids_TK, first.ids_TK)


def test_dense_is_the_whole_distribution(teacher: Teacher):
    rows, source = batch(), teacher.source()
    dense = source.fetch(rows, TargetSpec("dense", temperature=2.0, encoding="float32"))
    assert isinstance(dense, DenseTargets)
    served = source.fetch(rows, TOPK)
    assert isinstance(served, TopkTargets)
    torch.testing.assert_close(dense.logp_TV.exp().sum(-1), torch.ones(len(dense)))
    torch.testing.assert_close(dense.logp_TV.gather(1, served.ids_TK.long()), served.logp_TK, rtol=2e-3, atol=1e-4)


def test_hidden_states_and_head_give_the_same_distribution(teacher: Teacher):
    rows, source = batch(), teacher.source()
    hidden, served = (
        source.fetch(rows, TargetSpec("hidden", encoding="bfloat16")),
        source.fetch(rows, TargetSpec("topk", k=7)),
    )
    assert isinstance(hidden, HiddenTargets)
    assert isinstance(served, TopkTargets)
    head = source.fetch_head()
    assert head.weight_VD.shape[0] == teacher.meaning.vocab_size == head.spec.vocab_size
    logp = torch.log_softmax(head.logits(hidden.hidden_TD), -1)
    torch.testing.assert_close(logp.gather(1, served.ids_TK.long()), served.logp_TK, rtol=0, atol=0.1)
    assert (logp.argmax(-1) == served.ids_TK[:, 0]).float().mean() > 0.9


def test_a_head_comes_in_parts(teacher: Teacher, monkeypatch: pytest.MonkeyPatch):
    """Flight takes no message of 2 GiB, which the head of a large teacher is."""
    source = teacher.source()
    whole = source.fetch_head()
    monkeypatch.setattr(server, "_HEAD_PART_BYTES", 4096)
    client = connect(teacher.server.address)
    sent = [chunk.data for chunk in client.do_get(fl.Ticket(message(TOKEN)))]
    assert len(sent) > 1
    assert all(part.nbytes <= 4096 for part in sent)
    again = source.fetch_head()
    assert torch.equal(again.weight_VD, whole.weight_VD)
    assert again.spec == whole.spec
    client.close()


def test_many_requests_come_back_in_order(teacher: Teacher):
    batches = [batch(seed=seed) for seed in range(12)]
    source = teacher.source()
    prefetcher = Prefetcher(source, ((one, TOPK) for one in batches), in_flight=4)
    for expected in batches:
        fetched = prefetcher.next()
        assert fetched.batch is expected
        assert fetched.targets.labels_T.tolist() == expected.labels().tolist()
    with pytest.raises(StopIteration):
        prefetcher.next()
    prefetcher.close()
    assert source.received["topk"].tokens == sum(one.num_tokens for one in batches)


def test_batches_are_given_as_they_travelled(teacher: Teacher):
    """The same bytes again, and decoded the same targets; an answer in several parts says on the last how much it was."""
    rows, source = batch(rows=5), teacher.source()
    whole = source.fetch(rows, TOPK)
    parts = source.fetch_batches(rows, TOPK)
    vocab = teacher.meaning.vocab_size
    for ours, expected in zip(decode(parts[0], TOPK, vocab).tensors(), whole.tensors(), strict=True):
        assert torch.equal(ours, expected)
    assert source.received["topk"] == Received(sum(part.nbytes for part in parts), len(whole))


def test_answers_in_several_parts(teacher: Teacher, monkeypatch: pytest.MonkeyPatch):
    rows, source = batch(rows=5), teacher.source()
    whole = source.fetch_batches(rows, TOPK)
    monkeypatch.setattr(server, "_PART_BYTES", 600)
    parts = source.fetch_batches(rows, TOPK)
    assert len(parts) > len(whole) == 1
    assert pa.Table.from_batches(parts).combine_chunks() == pa.Table.from_batches(whole).combine_chunks()


def test_settling_waits_for_the_whole_window(teacher: Teacher):
    batches, source = [batch(seed=seed) for seed in range(5)], teacher.source()
    prefetcher = Prefetcher(source, ((one, TOPK) for one in batches), in_flight=4)
    prefetcher.next()
    prefetcher.settle()
    assert source.received["topk"].tokens == sum(one.num_tokens for one in batches)
    prefetcher.close()


def test_window_bounds_what_is_asked_for(teacher: Teacher):
    """The batches beyond the window are not even looked at."""
    drawn = []

    def endless() -> Iterator[tuple[TokenBatch, TargetSpec]]:
        for seed in range(1000):
            drawn.append(seed)
            yield batch(seed=seed), TOPK

    prefetcher = Prefetcher(teacher.source(), endless(), in_flight=4)
    assert len(drawn) == 4
    prefetcher.next()
    prefetcher.next()
    prefetcher.next()
    assert len(drawn) == 6
    prefetcher.close()


def test_row_without_trained_token(teacher: Teacher):
    rows = batch(rows=1)
    empty = replace(rows, predicts_RL=rows.predicts_RL & False)
    assert len(teacher.source().fetch(empty, TOPK)) == 0


def test_another_teacher_is_refused_without_retry(teacher: Teacher):
    source = teacher.source(give_up_seconds=60)
    source._meaning = replace(teacher.meaning, tokenizer="another")
    start = time.monotonic()
    with pytest.raises(IdentityError, match="tokenizer: asked for 'another'"):
        source.fetch(batch(), TOPK)
    assert time.monotonic() - start < 10


def test_tokens_outside_the_vocabulary_are_refused(teacher: Teacher):
    rows = batch()
    rows.ids_RL[0, 0] = teacher.meaning.vocab_size
    with pytest.raises(StreamError, match="token ids span"):
        teacher.source().fetch(rows, TOPK)


def test_another_token_opens_nothing(teacher: Teacher):
    with pytest.raises(StreamError, match="does not answer"):
        list_endpoints(Access(teacher.directory.address, "a guess"))
    with connect(teacher.server.address) as client, pytest.raises(fl.FlightUnauthenticatedError, match="another run"):
        list(client.do_action(fl.Action("stats", b'{"protocol": 1, "token": "a guess"}')))
    with connect(teacher.server.address) as client, pytest.raises(fl.FlightUnauthenticatedError, match="malformed"):
        list(client.do_action(fl.Action("stats", b"\xff")))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "checksum": lambda said: bytes([said[0] ^ 1]) + said[1:],
    "json": lambda said: said[:40] + b"\xff" + said[41:],
    "name": lambda said: said.replace(b'"start"', b'"stort"'),
    "number": lambda said: said.replace(b'"sequence": 0', b'"sequence": 1'),
    "digest": lambda said: said.replace(b'"digest"', b'"dijest"'),
    "nothing": lambda said: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_answer_whose_metadata_are_damaged_is_asked_for_again(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, damage: str
):
    rows, source, sent = batch(), teacher.source(), server._parts
    whole, sound = source.fetch(rows, TOPK), itertools.count()

    def damaged(header: Header, targets: SoftTargets) -> Iterator[tuple[pa.RecordBatch, bytes]]:
        first = next(sound) == 0
        for part, said in sent(header, targets):
            yield part, DAMAGES[damage](said) if first else said

    monkeypatch.setattr(server, "_parts", damaged)
    again = source.fetch(rows, TOPK)
    assert next(sound) == 2, "asked twice"
    for ours, theirs in zip(again.tensors(), whole.tensors(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_head_that_is_damaged_is_asked_for_again(teacher: Teacher, monkeypatch: pytest.MonkeyPatch):
    source, encoded, sound = teacher.source(), server.encode_head, itertools.count()
    whole = source.fetch_head()

    def damaged(head: Head) -> pa.RecordBatch:
        other = replace(head, weight_VD=head.weight_VD + 1) if next(sound) == 0 else head
        return encoded(other).replace_schema_metadata(encoded(head).schema.metadata)

    monkeypatch.setattr(server, "encode_head", damaged)
    assert torch.equal(source.fetch_head().weight_VD, whole.weight_VD)
    assert next(sound) == 2, "asked twice"


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (TargetSpec("topk"), "k = 0 names nothing"),
        (TargetSpec("sampled", k=3, seed=-1), "seed -1 is none"),
        (TargetSpec("topk", k=3, temperature=float("nan")), "temperature nan softens nothing"),
    ],
)
def test_requests_that_mean_nothing_are_refused_and_it_serves_on(teacher: Teacher, spec: TargetSpec, why: str):
    """Before a forward could fail of them, which would end the whole group: by the client, and by the endpoint itself."""
    rows, source = batch(), teacher.source()
    with pytest.raises(PayloadError, match=why):
        source.fetch(rows, spec)
    header = Header("foreign", spec, teacher.meaning, rows.ids_RL.shape[1])
    with connect(teacher.server.address) as client:
        _, reader = client.do_exchange(fl.FlightDescriptor.for_command(header.opening(TOKEN)))
        with pytest.raises(fl.FlightServerError, match=why):
            reader.read_chunk()
    assert len(source.fetch(rows, TOPK)) == rows.num_tokens


def test_dead_endpoint_is_passed_over(teacher: Teacher):
    dead = Endpoint("replica-1", 0, 0, "127.0.0.1:9")
    directory = DirectoryServer("127.0.0.1", 0, TOKEN, {ALONE: teacher.meaning})
    directory.of(ALONE).publish("replica-1", [dead])
    directory.of(ALONE).publish("replica-0", [teacher.endpoint()])
    source = FlightSource(Access(directory.address, TOKEN), teacher.meaning, StreamSection(), "test")
    for seed in range(4):
        rows = batch(seed=seed)
        assert source.fetch(rows, TOPK).labels_T.tolist() == rows.labels().tolist()
    source.close()
    directory.shutdown()


def test_no_endpoint_left_ends_in_time(teacher: Teacher):
    directory = DirectoryServer("127.0.0.1", 0, TOKEN, {ALONE: teacher.meaning})
    settings = StreamSection(give_up_seconds=1.5)
    source = FlightSource(Access(directory.address, TOKEN), teacher.meaning, settings, "test")
    start = time.monotonic()
    with pytest.raises(StreamError, match=r"no teacher endpoint served request .* knows no live endpoint"):
        source.fetch(batch(), TOPK)
    assert time.monotonic() - start < 10
    directory.shutdown()


class Stuck:
    """A scorer whose forwards never end."""

    def submit(self, request: str, rows: Any, header: Any) -> "queue.SimpleQueue[Any]":
        return queue.SimpleQueue()

    def progress(self) -> int:
        return 7

    def stats(self) -> dict[str, Any]:
        return {}


def test_endpoint_without_progress_is_given_up(teacher: Teacher):
    """Its heartbeats alone do not count: the forwards must advance."""
    server = TargetServer("127.0.0.1", TOKEN, teacher.meaning, Stuck())
    directory = DirectoryServer("127.0.0.1", 0, TOKEN, {ALONE: teacher.meaning})
    directory.of(ALONE).publish("replica-0", [Endpoint("replica-0", 0, 0, server.address)])
    settings = StreamSection(stall_seconds=3, give_up_seconds=2)
    source = FlightSource(Access(directory.address, TOKEN), teacher.meaning, settings, "test")
    start = time.monotonic()
    with pytest.raises(StreamError, match="no progress for 3 s"):
        source.fetch(batch(), TOPK)
    assert 2.5 < time.monotonic() - start < 15
    directory.shutdown()
    server.shutdown()


def split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def test_round_trip_over_tls_is_not_disturbed_by_strangers(teacher: Teacher):
    """The same numbers as over a plain connection, while others are turned away from the same listener, or say nothing."""
    authority, stranger = Authority(), Authority().issue()
    held = Held(teacher.scorer)
    server = TargetServer("127.0.0.1", TOKEN, teacher.meaning, held, authority.issue())
    directory = DirectoryServer("127.0.0.1", 0, TOKEN, {ALONE: teacher.meaning}, authority.issue())
    directory.of(ALONE).publish("replica-0", [Endpoint("replica-0", 0, 0, server.address)])
    access, rows = Access(directory.address, TOKEN, authority.issue()), batch()
    # No time to try again: the exchange that is open while strangers knock must be the one that answers.
    source = FlightSource(access, teacher.meaning, StreamSection(give_up_seconds=1e-9), "test")
    with ThreadPoolExecutor(1) as beside:
        served = beside.submit(source.fetch, rows, TOPK)
        assert held.asked.acquire(timeout=10)
        silent = [socket.create_connection(split(server.address), 10) for _ in range(200)]
        for credentials in (None, stranger, authority.issue(datetime.timedelta(minutes=-1))) * 3:
            with connect(server.address, credentials) as client, pytest.raises(fl.FlightUnavailableError):
                call(client, "stats", TOKEN, 10)
        with connect(server.address, access.credentials) as client, pytest.raises(fl.FlightUnauthenticatedError):
            call(client, "stats", "a guess", 10)
        held.let_go.set()
        for ours, plain in zip(served.result(30).tensors(), teacher.source().fetch(rows, TOPK).tensors(), strict=True):
            assert torch.equal(ours, plain)
    assert not held.asked.acquire(blocking=False), "asked once"
    assert source.teacher_stats()[0]["forwards"] > 0
    for guest in silent:
        guest.close()
    source.close()
    directory.shutdown()
    server.shutdown()


def test_targets_of_other_labels_are_refused(teacher: Teacher):
    rows = batch()
    served = teacher.source().fetch(rows, TOPK)
    check_alignment(rows, served)
    shifted = replace(rows, ids_RL=np.roll(rows.ids_RL, 1, axis=1))
    with pytest.raises(StreamError, match="predict another token"):
        check_alignment(shifted, served)
    with pytest.raises(CoverageError, match="every trained"):
        check_alignment(rows, teacher.source().fetch(rows.cut(slice(0, 2)), TOPK))


def test_counters(teacher: Teacher):
    before = teacher.scorer.stats()
    rows = batch()
    teacher.source().fetch(rows, TOPK)
    after = teacher.source().teacher_stats()[0]
    assert after["tokens"] - before["tokens"] == rows.num_tokens_real
    assert after["targets"] - before["targets"] == rows.num_tokens
    assert after["forwards"] == before["forwards"] + 1


def test_access_file_is_private(tmp_path: Path):
    access = Access("127.0.0.1:1", "secret")
    access.save(tmp_path / "teacher.json")
    assert (tmp_path / "teacher.json").stat().st_mode & 0o077 == 0
    assert Access.load(tmp_path / "teacher.json") == access
    assert "secret" not in repr(access)
    (tmp_path / "teacher.json").write_text("{}")
    with pytest.raises(StreamError, match="no access file"):
        Access.load(tmp_path / "teacher.json")


def test_taken_port_is_named(teacher: Teacher):
    from kdscale.errors import PlacementError

    port = int(teacher.directory.address.split(":")[1])
    with pytest.raises(PlacementError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
        DirectoryServer("127.0.0.1", port, TOKEN, {ALONE: teacher.meaning})
