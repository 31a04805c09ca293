"""Soft targets from a server process to a client process over Flight on loopback, against a bare stream of the same batches.

    python -m tests.benchmarks.stream --json stream.json

A request's answer is 0.25 to 16 MiB of top-64 targets (float16, V = 49,152) in messages of 2 MiB. Sides, in turns
over the same two processes, one thread each, which manage memory as ranks on processors do:

- ``bare`` (the control): Flight sends record batches that are ready, the client reads them;
- ``kdscale``: a TargetServer encodes, checksums and sends what a teacher's forward leaves (entries rounded where they were
  computed, which is part of ``teacher.py``); the client checks schema, Arrow validity, sizes, both checksums and the trailer, as
  in training. Requests share an open exchange; ``bare`` makes one for each. ``decode`` is what comes behind: values checked and
  unpacked.

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
from kdscale.cluster.security import Authority
from kdscale.config.sections import StreamSection
from kdscale.config.teachers import ALONE
from kdscale.credentials import Credentials
from kdscale.spec import TargetSpec
from kdscale.stream.client import FlightSource
from kdscale.stream.directory import DirectoryServer
from kdscale.stream.protocol import Access, Endpoint, Header, Meaning, connect, encode_rows, listening
from kdscale.stream.server import Answer, TargetServer
from kdscale.targets.codec import narrow_ids, narrow_logp
from kdscale.targets.decode import decode
from kdscale.targets.encode import encode
from kdscale.targets.layout import row_bytes, schema
from tests.benchmarks.turns import ROOT, alternate, machine, manage_memory_as_a_rank, spread

VOCAB, WIDTH = 49_152, 576
SPEC = TargetSpec("topk", 64)
MEANING = Meaning("benchmark", "benchmark", VOCAB, WIDTH)
TOKEN = "benchmark"
COLUMNS = 1025
MESSAGE = 8192
SIZES_MIB = (0.25, 1.0, 4.0, 16.0)


def targets_of(tokens: int) -> TopkTargets:
    """Plausible targets, soon made: what they are makes no difference to the time."""
    generator = torch.Generator().manual_seed(0)
    logp = torch.log_softmax(torch.randn(tokens, SPEC.k, generator=generator) * 3, -1).sort(-1, descending=True).values
    ids = (torch.arange(SPEC.k) * 701 + torch.randint(0, 700, (tokens, 1), generator=generator)).int()
    ids, logp = narrow_ids(ids, SPEC, VOCAB), narrow_logp(logp + torch.tensor(0.9).log(), SPEC)
    none = torch.zeros(tokens)
    return TopkTargets(none.int(), ids, logp, none + torch.tensor(0.1).log(), none, none, 1.0)


class ReadyScorer:
    """Answers at once: the teacher's time is another benchmark's."""

    def __init__(self) -> None:
        self._ready: dict[int, TopkTargets] = {}

    def submit(self, request: str, batch: TokenBatch | None, header: Header | None) -> "queue.SimpleQueue[Answer]":
        assert batch is not None
        tokens = batch.num_tokens
        if tokens not in self._ready:
            self._ready[tokens] = targets_of(tokens)
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        answers.put(self._ready[tokens])
        return answers

    def progress(self) -> int:
        return 0

    def stats(self) -> dict[str, Any]:
        return {}


class BareServer(fl.FlightServerBase):
    """Sends batches that lie ready; the command is how many positions."""

    def __init__(self, credentials: Credentials | None) -> None:
        super().__init__(**listening("127.0.0.1", 0, credentials))
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


def serve_until_told() -> None:
    """The server process: both servers, plain and over TLS, and how to reach them on one line; until stdin closes."""
    torch.set_num_threads(1)
    authority = Authority()
    servers: list[fl.FlightServerBase] = []
    for credentials in (None, authority.issue()):
        servers += [
            BareServer(credentials),
            TargetServer("127.0.0.1", TOKEN, MEANING, ReadyScorer(), credentials),
        ]
    ports = [server.port for server in servers]
    print(json.dumps({"ports": ports, "credentials": asdict(authority.issue())}), flush=True)
    sys.stdin.read()


def read_bare(client: fl.FlightClient, batch: TokenBatch) -> list[pa.RecordBatch]:
    writer, reader = client.do_exchange(fl.FlightDescriptor.for_command(str(batch.num_tokens).encode()))
    with writer:
        rows = encode_rows(batch)
        writer.begin(rows.schema)
        writer.write_batch(rows)
        writer.done_writing()
        return [chunk.data for chunk in reader]


def measure(ports: list[int], credentials: Credentials | None, rounds: int) -> list[dict[str, Any]]:
    bare_address, our_address = (f"127.0.0.1:{port}" for port in ports)
    directory = DirectoryServer("127.0.0.1", 0, TOKEN, {ALONE: MEANING}, credentials)
    directory.of(ALONE).publish("one", [Endpoint("one", 0, 0, our_address)])
    source = FlightSource(Access(directory.address, TOKEN, credentials), MEANING, StreamSection(), "benchmark")
    client = connect(bare_address, credentials)
    results = []
    for mib in SIZES_MIB:
        tokens = max(1, round(mib * 2**20 / row_bytes(SPEC, VOCAB, WIDTH) / (COLUMNS - 1))) * (COLUMNS - 1)
        batch = rows_of(tokens)
        bare, ours = read_bare(client, batch), source.fetch_batches(batch, SPEC)
        if pa.Table.from_batches(bare) != pa.Table.from_batches(ours):
            raise SystemExit("the two streams differ")
        seconds = alternate(
            {
                "bare": lambda batch=batch: read_bare(client, batch),
                "kdscale": lambda batch=batch: source.fetch_batches(batch, SPEC),
                "decode": lambda ours=ours: [decode(part, SPEC, VOCAB) for part in ours],
            },
            rounds,
        )
        size = sum(part.nbytes for part in ours)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        results.append(
            {
                "transport": "TLS" if credentials else "plain",
                "mib": size / 2**20,
                "tokens": tokens,
                **{f"{name}_seconds": value for name, value in medians.items()},
                **{f"{name}_spread": spread(values) for name, values in seconds.items()},
                "kdscale_of_bare": medians["bare"] / medians["kdscale"],
            }
        )
    directory.shutdown()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_until_told()
        return
    manage_memory_as_a_rank()
    torch.set_num_threads(1)
    command = [sys.executable, "-m", "tests.benchmarks.stream", "--serve"]
    server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        told = json.loads(server.stdout.readline())
        results = measure(told["ports"][:2], None, arguments.rounds)
        results += measure(told["ports"][2:], Credentials(**told["credentials"]), arguments.rounds)
    finally:
        server.kill()
        server.wait()
    for one in results:
        rate = one["mib"] / one["kdscale_seconds"]
        print(
            f"{one['transport']:6} {one['mib']:6.2f} MiB {one['tokens']:6} positions  kdscale {rate:6.0f} MiB/s"
            f" ±{one['kdscale_spread']:.0%}  {one['kdscale_of_bare']:.2f}x bare  decode {one['decode_seconds'] * 1e3:.1f} ms"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": results, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
