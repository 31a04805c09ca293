"""How the loops over packed entries become machine code; what they compute is tested through the codec."""

import os
import subprocess
import sys
from pathlib import Path

from numba import types

from kdscale.targets import kernels

LOAD = "from kdscale.targets import kernels; print(sum(kernels.sorted_ids.stats.cache_hits.values()))"


def load(cache: Path) -> "subprocess.Popen[str]":
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    return subprocess.Popen([sys.executable, "-c", LOAD], env=environment, stdout=subprocess.PIPE, text=True)


def test_several_processes_compile_at_once_and_later_ones_not_at_all(tmp_path: Path):
    together = [load(tmp_path) for _ in range(2)]
    assert [process.wait(timeout=120) for process in together] == [0, 0]
    later = load(tmp_path)
    assert later.communicate(timeout=60) == ("1\n", None)


def test_no_place_to_keep_machine_code():
    """A function without a file has none."""
    space: dict[str, object] = {}
    exec("def double(value): return 2 * value", space)
    assert kernels._compiled(types.int64(types.int64))(space["double"])(4) == 8


def test_only_who_needs_it_waits_for_the_compiler():
    code = "import sys, kdscale.stream.client, kdscale.stream.server; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
