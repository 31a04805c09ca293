"""One actor that writes with the student's weights, as they come. Ray calls it; it imports no Ray."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdscale import log
from kdscale.config.schema import RunConfig
from kdscale.stream.protocol import Meaning

if TYPE_CHECKING:
    import torch

    from kdscale.on_policy.rows import Written
    from kdscale.spec import Prompt

_POLL_S = 0.02


@dataclass(frozen=True)
class RolloutSetup:
    """What every writing rank is told."""

    config: RunConfig
    meaning: Meaning
    corpus: str
    """Fingerprint of the text."""
    teacher_directory: str
    """Where the driver's node has the teacher."""
    exchange: str
    """Directory of the student's life that is written for."""
    start: int
    """The step it begins with."""


@dataclass(frozen=True)
class _Task:
    """A file to write: with the weights of ``version``, from ``prompts``."""

    name: str
    version: int
    prompts: "list[Prompt]"


class RolloutRank:
    """The actor. Its methods are called in this order: build, write; beat at any time.

    What is to be written follows from the run's config and first step, so a rank that is started again goes on with what is
    missing, and writes the same.
    """

    def __init__(self, rank: int, world: int) -> None:
        log.setup(f"rollout {rank}")
        self._rank, self._world = rank, world
        self._version: int | None = None

    def build(self, setup: RolloutSetup) -> None:
        """Load the student as it starts, and the prompts. Raises: KdscaleError."""
        from kdscale.data.corpus import build_corpus
        from kdscale.data.tokenizer import load_tokenizer
        from kdscale.engine import process
        from kdscale.engine.directories import model_here
        from kdscale.engine.generation import end_tokens
        from kdscale.engine.models import build_student
        from kdscale.engine.settings import student_dtype
        from kdscale.on_policy.exchange import Exchange
        from kdscale.on_policy.rows import Prompts, heldout_prompts, texts_of_step
        from kdscale.on_policy.schedule import Plan

        config, section = setup.config, setup.config.on_policy
        assert section is not None
        process.set_threads(section.cpus_per_rank, deterministic=config.run.deterministic)
        # Fresh weights that stay as they are were drawn from it in the student too.
        process.set_seed(config.run.seed)
        self._device = process.use_device(section.gpus_per_rank)
        dtype = process.resolve_dtype(student_dtype(config), self._device)
        teacher = model_here(Path(setup.teacher_directory), config.teacher.model, setup.meaning.teacher)
        self._model = build_student(config.student, teacher, dtype, config.task).to(self._device).eval()  # type: ignore[arg-type]
        self._tokenizer = load_tokenizer(config.data.tokenizer or str(teacher))
        eos_id = self._tokenizer.eos_id
        self._ends = end_tokens(self._model, eos_id)
        corpus = build_corpus(config.data, self._tokenizer, lambda done, total, what: None, known=setup.corpus)
        self._plan = Plan.of(section, config.run.seed)
        self._prompts = Prompts(corpus.train, section, self._plan, texts_of_step(config), eos_id)
        self._heldout = heldout_prompts(corpus.heldout, section, eos_id)
        self._exchange, self._setup, self._section = Exchange(Path(setup.exchange)), setup, section

    def write(self) -> None:
        """Everything the student's life needs of this rank, as fast as weights come. Raises: OnPolicyError."""
        from kdscale.on_policy.rows import to_tensors

        for task in self._tasks():
            if self._exchange.find(task.name) is None and self._load(task.version):
                self._exchange.put(task.name, to_tensors(self._written(task.prompts), task.version))

    def beat(self) -> int | None:
        """Version of the weights in use. Answered by a thread beside the one that writes."""
        return self._version

    def _tasks(self) -> Iterator[_Task]:
        """In the order they are needed in."""
        config, start, plan = self._setup.config, self._setup.start, self._plan
        measures = config.evaluate.quality and self._rank == 0
        if measures and start == 0:
            yield _Task("heldout-0", 0, self._heldout)
        for step in range(start, config.train.steps):
            if plan.on_policy(step) and plan.ordinal(step) % self._world == self._rank:
                yield _Task(f"rollout-{step}", plan.version(step), self._prompts.of_step(step))
        if measures:
            yield _Task(f"heldout-{config.train.steps}", config.train.steps, self._heldout)

    def _load(self, version: int) -> bool:
        """Take the weights of ``version``, once they are there. False: they have been, and nobody needs them any more."""
        if self._version == version:
            return True
        name = f"weights-{version}"
        while (state := self._exchange.get(name)) is None:
            # Versions appear in their order, and one is dropped when all that it wrote was trained on.
            if self._exchange.newest_weights() > version and self._exchange.find(name) is None:
                return False
            time.sleep(_POLL_S)
        self._take(state)
        self._version = version
        return True

    def _take(self, state: "dict[str, torch.Tensor]") -> None:
        import torch

        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)

    def _written(self, prompts: "list[Prompt]") -> "list[Written]":
        from kdscale.engine.generation import write_on
        from kdscale.on_policy.rows import written
        from kdscale.spec import Sampling

        section, seed = self._section, self._setup.config.run.seed
        sampling = Sampling(section.new_tokens, section.temperature, section.top_k, section.top_p, (), seed)
        found: list[Written] = []
        for start in range(0, len(prompts), section.batch_rows):
            batch = prompts[start : start + section.batch_rows]
            vocab_size, decode = self._setup.meaning.vocab_size, self._tokenizer.decode
            continuations = write_on(self._model, batch, sampling, vocab_size, self._ends, decode, self._device)
            found += written(batch, continuations, self._ends[0] if self._ends else None)
        return found
