"""A student that asks for more than it can hold: ``python -m tests.failure.greedy_student ACCESS_FILE THREADS``."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kdscale.config.sections import StreamSection
from kdscale.spec import TargetSpec
from kdscale.stream.client import FlightSource
from kdscale.stream.directory import list_endpoints
from kdscale.stream.protocol import Access
from tests.served import batch

access = Access.load(Path(sys.argv[1]))
source = FlightSource(access, list_endpoints(access).meaning, StreamSection(), "greedy")


def ask_on(_: int) -> None:
    for seed in itertools.count():
        source.fetch(batch(rows=64, columns=48, seed=seed), TargetSpec("dense", encoding="float32"))
        print("served", flush=True)


with ThreadPoolExecutor(int(sys.argv[2])) as pool:
    list(pool.map(ask_on, range(int(sys.argv[2]))))
