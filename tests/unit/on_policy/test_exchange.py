"""Files between student and writers: whole, checked, dropped."""

import threading
import time
from pathlib import Path

import pytest
import torch

from kdscale.errors import OnPolicyError
from kdscale.on_policy.exchange import Exchange


def never() -> bool:
    return False


def test_what_is_put_is_found_under_its_own_name_alone(tmp_path: Path):
    exchange = Exchange(tmp_path / "made")
    assert exchange.get("weights-4") is None
    assert exchange.newest_weights() == -1
    exchange.put("weights-40", {"a": torch.arange(3)})
    assert exchange.get("weights-4") is None
    found = exchange.wait("weights-40", 1, never)
    assert found["a"].tolist() == [0, 1, 2]
    exchange.put("weights-8", {"a": torch.arange(2)})
    assert exchange.newest_weights() == 40
    exchange.drop("weights-40")
    exchange.drop("weights-40")
    assert exchange.get("weights-40") is None


def test_a_file_travels_as_it_is(tmp_path: Path):
    first, second = Exchange(tmp_path / "first"), Exchange(tmp_path / "second")
    first.put("weights-2", {"a": torch.ones(2)})
    path = first.find("weights-2")
    assert path is not None
    second.put_file(path.name, path.read_bytes())
    assert second.wait("weights-2", 1, never)["a"].tolist() == [1, 1]


def test_damage_is_named(tmp_path: Path):
    exchange = Exchange(tmp_path)
    exchange.put("rollout-3", {"a": torch.ones(4)})
    path = exchange.find("rollout-3")
    assert path is not None
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(OnPolicyError, match="damaged"):
        exchange.get("rollout-3")


def test_waiting_has_a_limit_and_an_end(tmp_path: Path):
    exchange = Exchange(tmp_path)
    with pytest.raises(
        OnPolicyError, match=r"rollout-3 was not written, nor anything else within on_policy\.give_up_seconds"
    ):
        exchange.wait("rollout-3", 0.05, never)
    with pytest.raises(OnPolicyError, match="nobody waits"):
        exchange.wait("rollout-3", 60, lambda: True)


def test_who_waits_for_a_later_step_waits_while_earlier_ones_are_written(tmp_path: Path):
    exchange = Exchange(tmp_path)

    def write() -> None:
        for step in range(8):
            time.sleep(0.25)
            exchange.put(f"rollout-{step}", {"a": torch.ones(1)})

    writer = threading.Thread(target=write)
    writer.start()
    assert exchange.wait("rollout-7", 1.5, never)["a"].tolist() == [1]
    writer.join()
