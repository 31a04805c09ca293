"""A real tiny teacher of one rank behind real Flight servers, in the test's own process, and batches to ask it for."""

import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdscale.batch import TokenBatch
from kdscale.config.sections import StreamSection
from kdscale.config.teachers import ALONE
from kdscale.data.tokenizer import load_tokenizer
from kdscale.engine.settings import teacher_settings
from kdscale.engine.sharding import InferenceModel
from kdscale.stream.client import FlightSource
from kdscale.stream.directory import DirectoryServer
from kdscale.stream.protocol import Access, Endpoint, Meaning
from kdscale.stream.server import TargetServer
from kdscale.teacher.lockstep import LockstepClient, LockstepServer
from kdscale.teacher.model import TeacherModel
from kdscale.teacher.rank import RankScorer
from kdscale.teacher.sequencer import Sequencer

TOKEN = "the run's token"


class Teacher:
    """One rank, its endpoint and its directory, in this process."""

    def __init__(self, directory: Path, hidden_size: int = 32) -> None:
        tokenizer = load_tokenizer(str(directory))
        self.meaning = Meaning("teacher", tokenizer.fingerprint, tokenizer.vocab_size, hidden_size)
        device = torch.device("cpu")
        inference = InferenceModel(str(directory), teacher_settings(1, "float32"), torch.float32, device)
        self.model = TeacherModel(inference, self.meaning.vocab_size, device)
        self.lockstep = LockstepServer("127.0.0.1", TOKEN, 1, Sequencer(1, 64))
        facts = {"parameters": inference.parameters_total()}
        self.scorer = RankScorer(0, self.model, LockstepClient(self.lockstep.address, TOKEN, 0), facts)
        self.thread = threading.Thread(target=self.scorer.serve)
        self.thread.start()
        self.server = TargetServer("127.0.0.1", TOKEN, self.meaning, self.scorer)
        self.directory = DirectoryServer("127.0.0.1", 0, TOKEN, {ALONE: self.meaning})
        self.directory.of(ALONE).publish("replica-0", [self.endpoint()])
        self._sources: list[FlightSource] = []

    def endpoint(self) -> Endpoint:
        return Endpoint("replica-0", 0, 0, self.server.address)

    def source(self, **settings: Any) -> FlightSource:
        fields = {"give_up_seconds": 3.0, "stall_seconds": 20.0} | settings
        source = FlightSource(Access(self.directory.address, TOKEN), self.meaning, StreamSection(**fields), "test")
        self._sources.append(source)
        return source

    def close(self) -> None:
        self.lockstep.stop()
        self.thread.join(timeout=10)
        assert not self.thread.is_alive()
        for source in self._sources:
            source.close()  # a server waits for exchanges that are open
        self.server.shutdown()
        self.directory.shutdown()


class Held:
    """A real scorer whose answers come when they are let go."""

    def __init__(self, scorer: RankScorer) -> None:
        self._scorer = scorer
        self.asked = threading.Semaphore(0)
        self.let_go = threading.Event()

    def submit(self, request: str, rows: Any, header: Any) -> "queue.SimpleQueue[Any]":
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def answer() -> None:
            self.let_go.wait()
            answers.put(self._scorer.submit(request, rows, header).get())

        threading.Thread(target=answer, daemon=True).start()
        self.asked.release()
        return answers

    def progress(self) -> int:
        return self._scorer.progress()

    def stats(self) -> dict[str, Any]:
        return self._scorer.stats()


def batch(rows: int = 3, columns: int = 12, vocab: int = 100, seed: int = 0) -> TokenBatch:
    """Two documents a row and two columns of padding."""
    rng = np.random.default_rng(seed)
    split = columns // 2 - 1
    segments = np.repeat([[1] * split + [2] * (columns - split - 2) + [0, 0]], rows, 0).astype(np.int32)
    positions = np.concatenate([np.arange(split), np.arange(columns - split - 2), [0, 1]]).astype(np.int32)
    same = np.zeros((rows, columns), bool)
    same[:, :-1] = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] != 0)
    return TokenBatch(
        number=seed,
        ids_RL=rng.integers(0, vocab, (rows, columns), dtype=np.int32),
        segments_RL=segments,
        positions_RL=np.repeat(positions[None], rows, 0),
        predicts_RL=same & (rng.random((rows, columns)) < 0.7),
    )
