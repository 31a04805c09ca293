from pathlib import Path

import pytest

from kdscale.config.schema import RunConfig
from kdscale.errors import ConfigError, StudentError
from kdscale.launcher import Hosts, _verdict, alone, among, visible_gpus
from kdscale.roster import Attendee, Roster


def config(data: int, **stream: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"train": ["text"]},
            "teacher": {"model": "teacher"},
            "student": {"layers": [0], "parallel": {"data": data}},
            "train": {"batch_rows": data},
            "stream": stream,
        }
    )


def test_all_ranks_on_one_host_meet_in_the_network():
    hosts = alone(config(3), 0)
    assert hosts.slots == {hosts.master: 3}
    assert hosts.master.startswith("127.")
    assert hosts.port > 0
    assert alone(config(1), 2345).port == 2345


def test_hostfile(tmp_path: Path):
    file = tmp_path / "hosts"
    file.write_text("# students\nfirst  slots=2\n\nsecond slots=1  # the small one\n")
    assert among(config(3), file, 1, "10.0.0.1", 7) == Hosts({"first": 2, "second": 1}, 1, "10.0.0.1", 7)


@pytest.mark.parametrize(
    ("text", "here", "says"),
    [
        ("first 2\n", 0, "'first 2' is not HOST slots=RANKS"),
        ("first slots=1\nfirst slots=2\n", 0, "each host once"),
        ("first slots=3\n", 1, "lists 1 hosts"),
        ("first slots=2\n", 0, "has 2 slots and student.parallel"),
    ],
)
def test_hostfiles_that_cannot_work(tmp_path: Path, text: str, here: int, says: str):
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        among(config(3), file, here, "10.0.0.1", 7)


def test_a_missing_hostfile_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="nowhere cannot be read"):
        among(config(3), tmp_path / "nowhere", 0, "10.0.0.1", 7)


def test_gpus_are_those_that_are_visible():
    assert visible_gpus(2, 1, None) == [0, 1]
    assert visible_gpus(2, 1, "4,6,7") == [4, 6]
    assert visible_gpus(2, 3, "0,1") == [0, 1]


@pytest.mark.parametrize(
    ("hosts", "visible", "says"),
    [(1, "4", "names 1 GPUs for 2 ranks"), (1, "GPU-ab,GPU-cd", "numbers, not names"), (2, "4,5", "takes GPUs 0 to 1")],
)
def test_gpus_that_the_launcher_cannot_give(hosts: int, visible: str, says: str):
    with pytest.raises(ConfigError, match=says):
        visible_gpus(2, hosts, visible)


def roster(*codes: int | None) -> Roster:
    return Roster(Path(), {n: Attendee(n, 100 + n, code, gone=True) for n, code in enumerate(codes)})


@pytest.mark.parametrize(
    ("codes", "launcher", "asked", "code"),
    [
        ((0, 0), 0, False, 0),
        ((0, 3), 3, False, 3),
        ((130, 130), 130, True, 130),
        # Another host was asked to stop.
        ((130, 130), 130, False, 130),
        # Asked to stop, but the last save failed.
        ((130, 1), 1, True, 1),
        ((None, None), None, True, 130),
    ],
)
def test_exit_code(codes: tuple[int | None, ...], launcher: int | None, asked: bool, code: int):
    assert _verdict(roster(*codes), 2, launcher, asked=asked, lost=False) == code


@pytest.mark.parametrize(
    ("codes", "launcher", "lost", "says"),
    [
        ((1, None), 1, False, r"student rank 1 \(pid 101\) died without a word, by a signal"),
        ((130, 130), 0, True, "the DeepSpeed launcher died before its ranks"),
        ((0,), 0, False, "when 1 of 2 ranks had started"),
        ((), 2, False, "ended by 2 when 0 of 2 ranks had started"),
    ],
)
def test_fault(codes: tuple[int | None, ...], launcher: int, lost: bool, says: str):
    with pytest.raises(StudentError, match=says):
        _verdict(roster(*codes), 2, launcher, asked=False, lost=lost)
