"""A whole training run on real ranks without Ray: tiny student under DeepSpeed, tiny teacher in the same process."""

import copy
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from kdscale.batch import SoftTargets, TokenBatch
from kdscale.config.schema import RunConfig
from kdscale.config.sections import LoraSection
from kdscale.data.loader import Loader
from kdscale.engine import checkpoint, process
from kdscale.engine.described import width_of
from kdscale.engine.export import load_checkpoint_weights
from kdscale.engine.fragments import index_files
from kdscale.engine.layers import PROJECTED, caught_layers
from kdscale.engine.lora import add_adapters
from kdscale.engine.models import freeze
from kdscale.engine.restore import restore
from kdscale.engine.saver import Saver
from kdscale.engine.settings import batch_cut, student_settings, topology_of
from kdscale.engine.shards import Shards
from kdscale.metrics import StepMetrics
from kdscale.spec import TargetSpec
from kdscale.student.layers import LayerLoss
from kdscale.student.layout import DataParallelStudent, PipelineStudent
from kdscale.student.saving import Saving
from kdscale.student.step import MicroBatch, Signals, Step, StepResult
from kdscale.student.trainer import Totals, Trainer
from kdscale.targets.payloads import with_layers
from tests.conftest import FAMILIES, PADDED_VOCAB, make_model
from tests.properties.test_packing_properties import Documents
from tests.targets import topk_of_logits

PAIRS = {0: 1, 1: 2, 2: 4}
COLUMNS, ROWS, VOCAB = 24, 4, PADDED_VOCAB - 9
DOCUMENTS = [9, 15] * 10
"""Ten full rows of two documents: an epoch is two and a half steps."""
TIMES = ("seconds", "wait_seconds", "tokens_per_second")


@dataclass(frozen=True)
class Case:
    """One student and how it is cut."""

    stage: int = 1
    pipeline: int = 1
    dtype: str = "float32"
    family: str = "llama"
    """``gpt2`` has dropout."""
    micro_rows: int = 1
    frozen: str = ""
    lora: bool = False
    """Adapters with dropout on a base that is the same in every run."""
    layers: bool = False
    """Learns from inside the teacher, beside its soft targets."""
    soft: bool = True
    steps: int = 6
    until: int = 0
    """Stop and save after this many steps; 0 goes on to the last."""
    save_at: tuple[int, ...] = (3,)
    clip: float = 1.0
    weight_decay: float = 0.1

    @property
    def name(self) -> str:
        return "-".join(
            f"{key}={value}".replace(" ", "") for key, value in asdict(self).items() if key not in ("steps", "until")
        )

    def config(self, world: int) -> RunConfig:
        return RunConfig.model_validate(
            {
                "run": {"seed": 3, "deterministic": True},
                "data": {"train": ["in memory"], "row_tokens": COLUMNS},
                "teacher": {"model": "in memory"},
                "student": {
                    "layers": [0],
                    "dtype": self.dtype,
                    "parallel": {"pipeline": self.pipeline, "data": world // self.pipeline},
                },
                "targets": {"k": 8},
                "loss": {
                    "hard_weight": 0.3 if self.soft else 1.0,
                    "temperature": {"shape": "linear", "start": 2.0, "end": 1.0},
                    "layers": {"pairs": PAIRS} if self.layers else None,
                },
                "train": {
                    "steps": self.steps,
                    "batch_rows": ROWS,
                    "micro_rows": self.micro_rows,
                    "lr": 1e-3,
                    "weight_decay": self.weight_decay,
                    "warmup_steps": 2,
                    "clip": self.clip,
                },
                "deepspeed": {"zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 100}},
                "stream": {"in_flight": 2},
            }
        )


class Rows(Loader):
    """Ids within the tiny vocabulary."""

    def batch(self, number: int, rows: slice = slice(None)) -> TokenBatch:
        batch = super().batch(number, rows)
        batch.ids_RL[:] %= VOCAB
        return batch


class LocalTeacher:
    """A ``TargetSource`` in this process."""

    def __init__(self) -> None:
        self._model = make_model("llama", seed=7)
        # Layers are caught by hooks of the one model, and a student asks from several threads.
        self._alone = threading.Lock()

    @torch.no_grad()
    def fetch(self, batch: TokenBatch, spec: TargetSpec) -> SoftTargets:
        ids, positions = (torch.from_numpy(one).long() for one in (batch.ids_RL, batch.positions_RL))
        trained_RL = torch.from_numpy(batch.predicts_RL)
        with self._alone, caught_layers(self._model, spec.layers) as caught:
            logits = self._model(input_ids=ids, position_ids=positions, use_cache=False).logits
        targets = topk_of_logits(logits[trained_RL][:, :VOCAB], spec.k, spec.temperature, torch.float32)
        targets = with_layers(targets, [caught[layer][trained_RL] for layer in spec.layers])
        return replace(targets, labels_T=torch.from_numpy(batch.labels()))


class Watched(Step):
    """A step that notes the rows it trains on, and calls ``interrupt`` inside optimizer step ``at``, half-way through."""

    def __init__(self, step: Step, first: int, micro_steps: int, at: int, interrupt: Callable[[], None]) -> None:
        self._step, self._next, self._at, self._interrupt = step, first, at, interrupt
        self._after = micro_steps // 2
        self.rows: list[list[int]] = []
        """By step, the sum of the ids of each row."""

    def train(self, micro_batches: Iterable[MicroBatch], *arguments: Any, **named: Any) -> StepResult:
        here, self._next = self._next, self._next + 1
        self.rows.append([])
        return self._step.train(self._watched(micro_batches, here), *arguments, **named)

    def _watched(self, micro_batches: Iterable[MicroBatch], here: int) -> Iterable[MicroBatch]:
        for number, micro in enumerate(micro_batches):
            if (here, number) == (self._at, self._after):
                self._interrupt()
            self.rows[-1] += micro.batch.ids_RL.sum(1).tolist()
            yield micro


def make_rows(seed: int) -> Rows:
    loader = Rows(Documents(DOCUMENTS), "isolated", COLUMNS, ROWS, seed)
    assert loader.steps_per_epoch == 2.5
    return loader


def make_student(case: Case, seed: int) -> transformers.PreTrainedModel:
    if case.family == "gpt2":
        fields = copy.deepcopy(FAMILIES["gpt2"])
        fields.attn_pdrop = fields.embd_pdrop = fields.resid_pdrop = 0.1
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(fields, dtype=torch.float32)
        model.config.use_cache = False
    else:
        model = make_model(case.family, seed)
    if case.lora:
        model = make_model(case.family, seed=99)
        torch.manual_seed(seed)
        add_adapters(model, LoraSection(rank=4, dropout=0.1), torch.float32)
    if case.frozen:
        # What is frozen is what the student starts from, in every run of it.
        torch.manual_seed(99)
        freeze(model, [case.frozen])
        for parameter in model.parameters():
            if not parameter.requires_grad:
                torch.nn.init.normal_(parameter)
    return model.to(getattr(torch, case.dtype))


class Saves(Saving):
    """Saves at the steps that the case names, and stops where it says."""

    def __init__(self, run: "TinyRun", root: Path | None) -> None:
        self._run, self._root = run, root
        self._real = None if root is None else run.saver(root)

    def signals(self) -> Signals:
        return Signals(stop=int(self._run.start + len(self._run.rows) == self._run.case.until))

    def after_step(self, done: int, heard: Signals, totals: Totals, *, last: bool) -> None:
        if self._real is None or self._root is None or done not in (*self._run.case.save_at, self._run.case.until):
            return
        self._run.begin_save(self._real, self._root, done)
        outcome = self._real.wait()
        assert outcome is not None
        assert outcome.fault == "", outcome

    def take_stall_seconds(self) -> float:
        return 0.0


class TinyRun:
    """One rank's student and trainer."""

    def __init__(self, case: Case, rank: int, world: int, seed: int) -> None:
        self.case, self._rank, self._world = case, rank, world
        config = case.config(world)
        self._config, self._topology = config, topology_of(config.student.parallel)
        process.set_threads(1, deterministic=True)
        settings = student_settings(config, case.dtype)
        model, chunk_bytes = make_student(case, seed), 4 * PADDED_VOCAB * 3
        self.student: DataParallelStudent | PipelineStudent
        if case.pipeline > 1:
            self.student = PipelineStudent(model, VOCAB, chunk_bytes, settings, self._topology, rank)
        else:
            layers = config.loss.layers and LayerLoss(
                config.loss.layers, model, width_of(model.config), config.run.seed
            )
            self.student = DataParallelStudent(model, VOCAB, chunk_bytes, settings, rank, layers=layers)
        self.start = 0
        self.rows: list[list[int]] = []
        """What this rank trained on, see ``Watched``."""

    def resume(self, root: Path) -> str:
        found = checkpoint.newest(root)
        assert found is not None
        self.start = found.step
        if self._rank == 0:
            self._assert_exports(found, root.parent / f"weights-{found.step}.safetensors")
        return restore(self.student.engine, self.student.partition, found, self._rank, self._world)

    def _assert_exports(self, found: checkpoint.Checkpoint, weights: Path) -> None:
        """A plain model of other weights takes from the shards what the engine had when it saved."""
        plain = make_student(self.case, seed=2)
        load_checkpoint_weights(plain, found)
        expected, state = load_file(weights), dict(plain.named_parameters())
        assert expected.keys() == state.keys()
        for name, weight in expected.items():
            # Where the dtypes differ, one is a rounding of the other.
            dtype = min(weight.dtype, state[name].dtype, key=lambda one: one.itemsize)
            assert torch.equal(weight.to(dtype), state[name].to(dtype)), f"{self.case.name}: {name}"
        if self.case.lora:
            self._assert_holds_adapters(Shards(found.directory))

    def _assert_holds_adapters(self, shards: Shards) -> None:
        """And projections that have learned, and nothing else."""
        adapters = {name for name in shards.names if "lora_" in name}
        projections = set(shards.names) - adapters
        pairs = range(len(PAIRS) if self.case.layers else 0)
        assert projections == {f"{PROJECTED}.projections.{number}.weight" for number in pairs}
        assert adapters < dict(self.student.model.named_parameters()).keys()
        for name in projections:
            learned = shards.read(name, "master")
            assert not torch.equal(learned, torch.eye(*learned.shape)), f"{self.case.name}: {name}"

    def train(self, root: Path | None = None, interrupt: tuple[int, Callable[[], None]] | None = None) -> list[dict]:
        """Train from where it stands to the end, saving below ``root``; the metrics of the steps, but for times."""
        cut, steps = batch_cut(self._config), []
        at, what = interrupt or (-1, lambda: None)
        step = Watched(self.student.step(cut), self.start, cut.micro_steps, at, what)
        self.rows = step.rows

        def keep(metrics: StepMetrics) -> None:
            steps.append({name: value for name, value in metrics.as_dict().items() if name not in TIMES})

        loader = make_rows(self._config.run.seed)
        trainer = Trainer(
            self._config, loader, cut, self._topology, self._rank, step, emit=keep, saving=Saves(self, root)
        )
        holds = self._topology.holds_loss(self._rank)
        prefetcher = trainer.prefetch(self.start, LocalTeacher()) if holds and self.case.soft else None
        trainer.run(self.start, Totals(), prefetcher)
        if prefetcher is not None:
            prefetcher.close()
        return steps

    def saver(self, root: Path) -> Saver:
        return Saver(self.student.engine, root, self.start, rank=self._rank, world=self._world, keep=9, limit_s=60.0)

    def begin_save(self, saver: Saver, root: Path, step: int) -> None:
        weights = self.student.whole_state()
        if self._rank == 0:
            save_file(weights, root.parent / f"weights-{step}.safetensors")
        saver.begin(step, identity={}, notes={}, small=index_files(self._rank, self.student.partition.describe()))

    def state(self) -> dict[str, torch.Tensor]:
        """Every number this rank trains: slots with their optimizer states, and on rank 0 the student's weights."""
        found = {f"student.{name}": value for name, value in self.student.whole_state().items()}
        states = self.student.engine.basic_optimizer.state
        for number, slot in enumerate(self.student.partition.slots):
            found[f"slot.{number}"] = slot.detach()
            found |= {f"slot.{number}.{key}": value for key, value in states[slot].items()}
        return {name: value.detach().cpu().clone().contiguous() for name, value in found.items()}

    def save_state(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.state(), file)
