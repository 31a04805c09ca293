"""One teacher rank as a Ray actor: it joins its group, builds its shard, opens its endpoint, and serves.

Only plain values go in and out; torch and DeepSpeed load on the rank's own node.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale import log
from kdscale.config.sections import TeacherSection
from kdscale.credentials import Credentials, Keys
from kdscale.errors import TeacherError
from kdscale.node import address_in
from kdscale.spec import Sampling
from kdscale.stream.protocol import Meaning
from kdscale.teacher.counters import Beat, Counters

if TYPE_CHECKING:
    from kdscale.data.tokenizer import Tokenizer
    from kdscale.spec import Continuation, Prompt
    from kdscale.stream.server import TargetServer
    from kdscale.teacher.rank import RankScorer

_ROOM_BYTES = 16 << 20
"""Mapped and given back at each heartbeat."""


@dataclass(frozen=True)
class ReplicaSetup:
    """What every rank of a replica is told."""

    teacher: TeacherSection
    directory: str
    """Where the driver's node has the model."""
    meaning: Meaning
    network: str
    token: str
    credentials: Credentials | None
    """With which the ranks listen; none: plainly, on loopback."""
    deterministic: bool

    @property
    def keys(self) -> Keys | None:
        return Keys(self.credentials, self.token) if self.credentials is not None else None

    def __repr__(self) -> str:
        return f"ReplicaSetup(directory={self.directory!r}, token=..., tls={self.credentials is not None})"


class TeacherRank:
    """The actor. Its methods are called in this order: open_store (rank 0), join, build, open_sequencer (rank 0),
    open_endpoint, serve; beat from build on; then stop. A rank that generates text is called ``generate`` in place of what
    follows ``build``."""

    def __init__(self, rank: int, world: int) -> None:
        log.setup(f"teacher {rank}")
        from kdscale.engine import process

        self._member = process.Member(rank, world)
        self._scorer: RankScorer | None = None
        self._server: TargetServer | None = None
        self._tokenizer: Tokenizer | None = None

    def open_store(self, network: str, keys: Keys | None) -> tuple[str, int]:
        return self._member.open_store(network, keys)

    def join(
        self,
        address: tuple[str, int],
        network: str,
        keys: Keys | None,
        timeout_s: float,
        collective_s: float,
        gpus_per_rank: int,
    ) -> None:
        self._device = self._member.join(address, network, keys, timeout_s, collective_s, gpus_per_rank)

    def build(self, setup: ReplicaSetup) -> dict[str, Any]:
        """Load this rank's shard; returns parameter counts, dtype and this process's memory."""
        import psutil

        from kdscale.engine import process
        from kdscale.engine.described import pixels_of
        from kdscale.engine.directories import model_here
        from kdscale.engine.settings import teacher_settings
        from kdscale.engine.sharding import InferenceModel
        from kdscale.teacher.model import TeacherModel

        process.set_threads(setup.teacher.cpus_per_rank, deterministic=setup.deterministic)
        dtype = process.resolve_dtype(setup.teacher.dtype, self._device)
        name = str(dtype).removeprefix("torch.")
        task = setup.meaning.task
        self._model_directory = str(model_here(Path(setup.directory), setup.teacher.model, setup.meaning.teacher))
        settings = teacher_settings(self._member.world, name)
        inference = InferenceModel(self._model_directory, settings, dtype, self._device, task)
        self._setup, self._inference = setup, inference
        pixels = pixels_of(Path(self._model_directory), task)
        self._model = TeacherModel(inference, setup.meaning.vocab_size, self._device, pixels)
        self._facts = {
            "parameters_held": inference.parameters_held(),
            "parameters": inference.parameters_total(),
            "dtype": name,
            "rss_bytes": psutil.Process().memory_info().rss,
        }
        return self._facts

    def open_sequencer(self) -> tuple[str, int]:
        """Rank 0: start the sequencer; returns where it listens."""
        from kdscale.teacher.lockstep import LockstepServer
        from kdscale.teacher.sequencer import Sequencer

        setup = self._setup
        sequencer = Sequencer(self._member.world, setup.teacher.max_batch_tokens, one_request=setup.deterministic)
        host, _ = address_in(setup.network)
        self._lockstep_server = LockstepServer(host, setup.token, self._member.world, sequencer, setup.keys)
        return self._lockstep_server.address

    def open_endpoint(self, sequencer: tuple[str, int], replica: str, generation: int, before: list[Counters]) -> str:
        """Connect to the sequencer and listen for requests; returns the Flight address.

        ``before``: by rank, what the replica's earlier generations had done.
        """
        from kdscale.stream.server import TargetServer
        from kdscale.teacher.lockstep import LockstepClient
        from kdscale.teacher.rank import RankScorer

        setup = self._setup
        lockstep = LockstepClient(sequencer, setup.token, self._member.rank, setup.keys)
        facts = self._facts | {"replica": replica, "generation": generation}
        self._scorer = RankScorer(self._member.rank, self._model, lockstep, facts, before[self._member.rank])
        host, _ = address_in(setup.network)
        self._server = TargetServer(host, setup.token, setup.meaning, self._scorer, setup.credentials)
        return self._server.address

    def serve(self) -> dict[str, Any]:
        """Run forwards until the sequencer closes; returns this rank's counters."""
        assert self._scorer is not None
        self._scorer.serve()
        return self._scorer.stats()

    def beat(self) -> Beat | None:
        """None: not serving yet. Answered by a thread beside the one that runs forwards.

        Raises: TeacherError when this rank cannot have memory for another answer. Its endpoint would refuse every request, and
            the forwards would know nothing of it.
        """
        if self._scorer is None or self._server is None:
            return None
        try:
            mmap.mmap(-1, _ROOM_BYTES).close()
        except OSError as error:
            raise TeacherError(f"no memory is left for an answer ({error}); give the rank's node more") from error
        return Beat(self._scorer.counters, self._scorer.forward_seconds(), self._server.in_flight)

    def generate(self, prompts: "list[Prompt]", sampling: Sampling) -> "list[Continuation]":
        """Continuations of this rank's share of a batch; every rank of the replica is called, also without a share."""
        from kdscale.data.tokenizer import load_tokenizer
        from kdscale.engine.generation import end_tokens, write_on

        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._model_directory)
        model = self._inference.model
        ends = end_tokens(model, self._tokenizer.eos_id)
        vocab_size = self._setup.meaning.vocab_size
        return write_on(model, prompts, sampling, vocab_size, ends, self._tokenizer.decode, self._device)

    def stop(self) -> None:
        """Rank 0: deal no further forward."""
        self._lockstep_server.stop()
