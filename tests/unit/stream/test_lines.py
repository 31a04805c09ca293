"""Exchanges that stay open: used again, lost, refused, closed; over a real tiny teacher."""

import queue
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from kdscale.config.sections import StreamSection
from kdscale.config.teachers import ALONE
from kdscale.errors import StreamError, TeacherError
from kdscale.spec import TargetSpec
from kdscale.stream.client import FlightSource
from kdscale.stream.directory import DirectoryServer
from kdscale.stream.protocol import Access, Endpoint, Header
from kdscale.stream.server import TargetServer
from tests.served import TOKEN, Teacher, batch

TOPK = TargetSpec("topk", k=7, temperature=2.0)


def test_an_exchange_is_used_again(teacher: Teacher):
    """One after another, whatever is asked for in between; none is used for two requests at a time."""
    source = teacher.source()
    rows = batch()
    first = source.fetch(rows, TOPK)
    (line,) = source._lines._lines.values()
    (exchange,) = line.idle
    source.fetch(rows, TargetSpec("hidden", encoding="bfloat16"))
    again = source.fetch(rows, TOPK)
    assert line.idle[-1] is exchange
    assert torch.equal(again.logp_TK, first.logp_TK)  # type: ignore[attr-defined]
    with ThreadPoolExecutor(6) as pool:
        asked = [batch(seed=seed) for seed in range(30)]
        found = list(pool.map(lambda one: source.fetch(one, TOPK), asked))
    for one, targets in zip(asked, found, strict=True):
        assert targets.labels_T.tolist() == one.labels().tolist()
    assert len(line.idle) <= 7
    deadline = time.monotonic() + 10
    while teacher.server.in_flight:  # a client has its answer a moment before the server is through with it
        assert time.monotonic() < deadline, "an exchange that waits for requests is none in flight"
        time.sleep(0.01)


def test_an_exchange_that_was_lost_while_idle_is_made_anew(teacher: Teacher, caplog: pytest.LogCaptureFixture):
    """Its connection was cut, the endpoint lives: the request doesn't fail, and the endpoint is not avoided."""
    source, rows = teacher.source(), batch()
    first = source.fetch(rows, TOPK)
    (line,) = source._lines._lines.values()
    line.idle[0].reader.cancel()
    again = source.fetch(rows, TOPK)
    assert torch.equal(again.logp_TK, first.logp_TK)  # type: ignore[attr-defined]
    assert list(source._lines._lines.values()) == [line]
    assert "failed, trying again" not in caplog.text


class Refusing:
    """A scorer that answers, and once it has been told to, only refuses."""

    def __init__(self, teacher: Teacher) -> None:
        self._scorer = teacher.scorer
        self.refuses = False
        self.asked = 0

    def submit(self, request: str, rows: Any, header: Any) -> "queue.SimpleQueue[Any]":
        self.asked += 1
        if not self.refuses:
            return self._scorer.submit(request, rows, header)
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        answers.put(TeacherError("rank 0 failed in forward"))
        return answers

    def progress(self) -> int:
        return self._scorer.progress()

    def stats(self) -> dict[str, Any]:
        return self._scorer.stats()


def test_what_a_teacher_refuses_is_not_asked_for_again_at_once(teacher: Teacher):
    """Its exchange was open before, but it is the teacher that speaks, not a connection that was lost."""
    scorer = Refusing(teacher)
    server = TargetServer("127.0.0.1", TOKEN, teacher.meaning, scorer)
    directory = DirectoryServer("127.0.0.1", 0, TOKEN, {ALONE: teacher.meaning})
    directory.of(ALONE).publish("replica-0", [Endpoint("replica-0", 0, 0, server.address)])
    settings = StreamSection(give_up_seconds=1e-9)  # given up after the first fault, however soon it comes
    source = FlightSource(Access(directory.address, TOKEN), teacher.meaning, settings, "test")
    source.fetch(batch(), TOPK)
    scorer.refuses = True
    with pytest.raises(StreamError, match="rank 0 failed in forward"):
        source.fetch(batch(), TOPK)
    assert scorer.asked == 2
    source.close()
    directory.shutdown()
    server.shutdown()


def test_closed_lines_keep_no_exchange(teacher: Teacher):
    source, rows = teacher.source(), batch()
    source.fetch(rows, TOPK)
    (line,) = source._lines._lines.values()
    taken = line.take(Header("", TOPK, teacher.meaning, rows.ids_RL.shape[1]))
    assert taken is not None
    assert line.take(Header("", TOPK, teacher.meaning, rows.ids_RL.shape[1])) is None
    source.close()
    line.give(taken)
    assert not line.idle
