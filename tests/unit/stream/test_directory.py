"""Replicas that join, leave and vanish, as directory and students see it: real Flight servers, one real teacher."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdscale.config.teachers import ALONE
from kdscale.errors import IdentityError, StreamError
from kdscale.spec import TargetSpec
from kdscale.stream.directory import LEASE_S, DirectoryClient, DirectoryServer, list_endpoints
from kdscale.stream.joining import RemoteRegistry
from kdscale.stream.protocol import Access, Endpoint
from kdscale.stream.server import TargetServer
from tests.served import TOKEN, Held, Teacher, batch

TOPK = TargetSpec("topk", k=7)
ELSEWHERE = Endpoint("joined-1-0", 0, 0, "127.0.0.1:9")


@pytest.fixture
def teacher(teacher_dir: Path) -> Iterator[Teacher]:
    teacher = Teacher(teacher_dir)
    yield teacher
    teacher.close()


def access(teacher: Teacher) -> Access:
    return Access(teacher.directory.address, TOKEN)


def wait_for(condition: Callable[[], bool], what: str, within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@contextmanager
def held(teacher: Teacher) -> Iterator[tuple[Held, Endpoint]]:
    """Another endpoint of the same teacher, known to nobody yet."""
    scorer = Held(teacher.scorer)
    server = TargetServer("127.0.0.1", TOKEN, teacher.meaning, scorer)
    yield scorer, Endpoint("held", 0, 0, server.address)
    scorer.let_go.set()
    server.shutdown()


def test_a_lease_that_is_not_renewed_ends(teacher: Teacher):
    client = DirectoryClient(access(teacher))
    fields = {"replica": ELSEWHERE.replica, "state": "serving", "endpoints": [vars(ELSEWHERE)]}
    began = time.monotonic()
    client.ask("register", **fields, meaning=vars(teacher.meaning))
    assert ELSEWHERE in client.listing().endpoints
    wait_for(lambda: ELSEWHERE not in client.listing().endpoints, "the lease ends", LEASE_S + 10)
    assert time.monotonic() - began > LEASE_S - 1
    assert client.listing().endpoints == [teacher.endpoint()], "the run's own need no lease"
    client.close()


def test_a_replica_that_joins_is_known_until_it_leaves(teacher: Teacher):
    registry = RemoteRegistry(access(teacher), teacher.meaning)
    registry.publish(ELSEWHERE.replica, [ELSEWHERE])
    time.sleep(LEASE_S + 1)
    assert ELSEWHERE in list_endpoints(access(teacher)).endpoints, "renewed"
    registry.withdraw(ELSEWHERE.replica, rebuilding=True)
    assert list_endpoints(access(teacher)).rebuilding == [ELSEWHERE.replica]
    again = replace(ELSEWHERE, generation=1)
    registry.publish(ELSEWHERE.replica, [again])
    assert list_endpoints(access(teacher)).endpoints == [teacher.endpoint(), again]
    registry.leave()
    listing = list_endpoints(access(teacher))
    assert (listing.endpoints, listing.leaving) == ([teacher.endpoint()], [ELSEWHERE.replica])
    registry.close()
    assert list_endpoints(access(teacher)).leaving == []
    assert registry.fault is None


def test_only_the_same_teacher_may_join(teacher: Teacher):
    other = replace(teacher.meaning, teacher="another")
    with pytest.raises(IdentityError, match="teacher"):
        RemoteRegistry(access(teacher), other)
    client = DirectoryClient(access(teacher))
    fields = {"replica": ELSEWHERE.replica, "state": "serving", "endpoints": [vars(ELSEWHERE)]}
    with pytest.raises(IdentityError, match="teacher"):
        client.ask("register", **fields, meaning=vars(other))
    with pytest.raises(StreamError, match="another run's token"):
        DirectoryClient(Access(teacher.directory.address, "a guess")).ask("register", **fields, meaning=vars(other))
    own = {"replica": "replica-0", "state": "serving", "endpoints": [vars(teacher.endpoint())]}
    with pytest.raises(StreamError, match="one of the run's own"):
        client.ask("register", **own, meaning=vars(teacher.meaning))
    with pytest.raises(StreamError, match="malformed"):
        client.ask("register", replica="joined-2")
    client.ask("leave", replica="replica-0")
    assert client.listing().endpoints == [teacher.endpoint()], "none of these changed anything"
    client.close()


def test_who_joins_says_which_teacher_it_is_of(teacher: Teacher):
    meanings = {"left": teacher.meaning, "right": replace(teacher.meaning, teacher="another")}
    directory = DirectoryServer("127.0.0.1", 0, TOKEN, meanings)
    here = Access(directory.address, TOKEN)
    registry = RemoteRegistry(here, meanings["right"], "right")
    registry.publish(ELSEWHERE.replica, [ELSEWHERE])
    assert list_endpoints(here, "right").endpoints == [ELSEWHERE]
    assert list_endpoints(here, "left").endpoints == [], "the other one's requests don't reach it"
    registry.close()
    assert list_endpoints(here, "right").endpoints == []
    with pytest.raises(IdentityError, match="teacher"):
        RemoteRegistry(here, meanings["right"], "left")
    with pytest.raises(
        IdentityError, match=r"no teacher is called 'teacher' here; there are left, right: .*teachers\.main"
    ):
        RemoteRegistry(here, meanings["left"])
    directory.shutdown()


def test_what_vanishes_is_not_waited_for(teacher: Teacher):
    """Its connection stays open and silent, as of a node that has lost its network; the request goes elsewhere."""
    source, rows = teacher.source(stall_seconds=60, give_up_seconds=20), batch()
    with held(teacher) as (scorer, endpoint), ThreadPoolExecutor(1) as beside:
        teacher.directory.of(ALONE).withdraw("replica-0", rebuilding=False)
        teacher.directory.of(ALONE).publish("held", [endpoint])
        served = beside.submit(source.fetch, rows, TOPK)
        assert scorer.asked.acquire(timeout=10)
        teacher.directory.of(ALONE).publish("replica-0", [teacher.endpoint()])
        teacher.directory.of(ALONE).withdraw("held", rebuilding=False)
        began = time.monotonic()
        assert served.result(20).labels_T.tolist() == rows.labels().tolist()
        assert time.monotonic() - began < 10
    source.close()


def test_who_leaves_finishes_what_it_was_asked(teacher: Teacher):
    registry = RemoteRegistry(access(teacher), teacher.meaning)
    source, rows = teacher.source(stall_seconds=60, give_up_seconds=20), batch()
    with held(teacher) as (scorer, endpoint), ThreadPoolExecutor(1) as beside:
        teacher.directory.of(ALONE).withdraw("replica-0", rebuilding=False)
        registry.publish("held", [endpoint])
        served = beside.submit(source.fetch, rows, TOPK)
        assert scorer.asked.acquire(timeout=10)
        teacher.directory.of(ALONE).publish("replica-0", [teacher.endpoint()])
        registry.leave()
        time.sleep(2.5)
        for seed in range(3):
            assert len(source.fetch(batch(seed=seed), TOPK)) > 0
        assert not served.done(), "the student has heard of it, and waits"
        assert not scorer.asked.acquire(blocking=False), "nothing more is asked of it"
        scorer.let_go.set()
        for ours, again in zip(served.result(10).tensors(), source.fetch(rows, TOPK).tensors(), strict=True):
            assert torch.equal(ours, again)
        registry.close()
    source.close()


def test_who_joins_is_asked_while_the_others_serve(teacher: Teacher):
    source = teacher.source()
    source.fetch(batch(), TOPK)
    with held(teacher) as (scorer, endpoint):
        scorer.let_go.set()
        teacher.directory.of(ALONE).publish("held", [endpoint])

        def asked() -> bool:
            source.fetch(batch(), TOPK)
            return scorer.asked.acquire(blocking=False)

        wait_for(asked, "the new endpoint is asked")
        source.close()  # a server waits for exchanges that are open
