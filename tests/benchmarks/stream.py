"""Soft targets from a server process to a client process over Flight on loopback, against a bare stream of the same batches.

    python -m tests.benchmarks.stream --json stream.json

A request's answer is 0.25 to 16 MiB of top-64 targets (float16, V = 49,152) in messages of 4,096 positions. Sides, in turns
over the same two processes, one thread each:

- ``bare`` (the control): Flight sends record batches that are ready, the client reads them;
- ``kdscale``: a TargetServer encodes, checksums and sends; the client checks schema, Arrow validity, sizes, both checksums and
  the trailer, as in training. ``decode`` is what comes behind: values checked and unpacked.

Rows with TLS: both sides over mutual TLS of a certificate authority made for the benchmark.
"""

import argparse
import json
import queue
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
import torch

from kdscale.batch import TokenBatch, TopkTargets
from kdscale.config.schema import StreamSection
from kdscale.spec import TargetSpec
from kdscale.stream.client import FlightSource
from kdscale.stream.directory import DirectoryServer
from kdscale.stream.protocol import Access, Endpoint, Header, Meaning, connect
from kdscale.stream.server import Answer, TargetServer
from kdscale.targets.decode import decode
from kdscale.targets.encode import encode
from kdscale.targets.layout import row_bytes, schema
from tests.benchmarks.turns import ROOT, alternate, machine, spread

VOCAB, WIDTH = 49_152, 576
SPEC = TargetSpec("topk", 64)
MEANING = Meaning("benchmark", "benchmark", VOCAB, WIDTH)
TOKEN = "benchmark"
COLUMNS = 1025
MESSAGE = 4096
SIZES_MIB = (0.25, 1.0, 4.0, 16.0)


def targets_of(tokens: int) -> TopkTargets:
    """Plausible targets, soon made: what they are makes no difference to the time."""
    generator = torch.Generator().manual_seed(0)
    logp = torch.log_softmax(torch.randn(tokens, SPEC.k, generator=generator) * 3, -1).sort(-1, descending=True).values
    ids = (torch.arange(SPEC.k) * 701 + torch.randint(0, 700, (tokens, 1), generator=generator)).int()
    none = torch.zeros(tokens)
    return TopkTargets(none.int(), ids, logp + torch.tensor(0.9).log(), none + torch.tensor(0.1).log(), none, none, 1.0)


class ReadyScorer:
    """Answers at once: the teacher's time is another benchmark's."""

    def __init__(self) -> None:
        self._ready: dict[int, TopkTargets] = {}

    def submit(self, request: str, batch: TokenBatch | None, header: Header | None) -> "queue.SimpleQueue[Answer]":
        assert batch is not None
        tokens = batch.num_tokens
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        answers.put(self._ready.setdefault(tokens, targets_of(tokens)))
        return answers

    def progress(self) -> int:
        return 0

    def stats(self) -> dict[str, Any]:
        return {}


class BareServer(fl.FlightServerBase):
    """Sends batches that lie ready; the command is how many positions."""

    def __init__(self, **tls: Any) -> None:
        super().__init__("grpc+tls://127.0.0.1:0" if tls else "grpc+tcp://127.0.0.1:0", **tls)
        self._ready: dict[int, list[pa.RecordBatch]] = {}

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        tokens = int(descriptor.command)
        if tokens not in self._ready:
            targets, wanted = targets_of(tokens), schema(SPEC, VOCAB, WIDTH)
            parts = (targets.cut(slice(start, start + MESSAGE)) for start in range(0, tokens, MESSAGE))
            self._ready[tokens] = [encode(part, SPEC, wanted, VOCAB) for part in parts]
        reader.read_chunk()
        writer.begin(self._ready[tokens][0].schema)
        for batch in self._ready[tokens]:
            writer.write_batch(batch)


def rows_of(tokens: int) -> TokenBatch:
    """Token rows with ``tokens`` trained positions."""
    rows = tokens // (COLUMNS - 1)
    shape = (rows, COLUMNS)
    predicts = np.ones(shape, bool)
    predicts[:, -1] = False
    positions = np.repeat(np.arange(COLUMNS, dtype=np.int32)[None], rows, 0)
    return TokenBatch(0, np.zeros(shape, np.int32), np.ones(shape, np.int32), positions, predicts)
