"""Every setting of a run. Bounds live in the field, rules between fields in the validators; nothing is adjusted."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Dtype = Literal["auto", "float32", "bfloat16"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


def _safe_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", value) or set(value) == {"."}:
        raise ValueError(f"{value!r} must match [A-Za-z0-9._-]{{1,128}}")
    return value


SafeName = Annotated[str, AfterValidator(_safe_name)]


class Section(BaseModel):
    """A frozen part of the config; its fields' docs are the user's reference."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class RunSection(Section):
    name: SafeName = "run"
    """Name of the run; its files lie in ``dir/name``."""
    dir: str = "runs"
    """Directory that holds the runs; shared by all nodes with student ranks."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the shuffle and of fresh weights."""
    deterministic: bool = False
    """One request = one forward and deterministic kernels: the same numbers bit for bit on one kind of hardware."""


class DataSection(Section):
    train: list[str] = Field(min_length=1)
    """Files, globs, Hugging Face dataset directories or hub names to train on (text, jsonl, parquet)."""
    heldout: list[str] = []
    """The same for held-out text. Empty: every ``heldout_every``-th training document is held out."""
    heldout_every: int = Field(50, ge=2)
    """Which share of the documents is held out when ``heldout`` is empty."""
    heldout_tokens: int = Field(4096, ge=1)
    """At most about this many held-out tokens are scored (whole rows)."""
    row_tokens: int = Field(1024, ge=2)
    """Length of a packed row, tokens."""
    packing: Literal["isolated", "joined", "off"] = "isolated"
    """isolated: documents share rows but don't see each other; joined: they do; off: one document piece per row."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens of prompt+completion or chat documents are trained on (plain text: always all)."""
    append_eos: bool = True
    """Whether a document ends with the tokenizer's end token."""
    tokenizer: str | None = None
    """Tokenizer directory, hub name or SentencePiece ``.model`` file; none: the teacher's."""
    cache_dir: str = "runs/.cache"
    """Where tokenized corpora lie, one directory per fingerprint, reused by later runs."""


class TeacherSection(Section):
    model: str
    """Model directory or hub name."""
    ranks: int = Field(1, ge=1)
    """Ray actors of the replica: one ZeRO-3 engine over all of them (1: ZeRO stage 0)."""
    dtype: Dtype = "auto"
    """auto: bfloat16 where the processor multiplies it fast (GPUs, AVX512-BF16, AMX), else float32."""
    max_batch_tokens: int = Field(8192, ge=1)
    """Most tokens one rank takes into one forward (a single larger request still runs, alone)."""
    cpus_per_rank: int = Field(1, ge=1)
    """CPU cores and threads of a rank."""
    gpus_per_rank: int = Field(0, ge=0, le=1)
    """GPUs of a rank; 0 runs on CPU (gloo)."""
    start_seconds: float = Field(600, gt=0)
    """Limit for placing, loading and building a replica."""


class ParallelSection(Section):
    pipeline: int = Field(1, ge=1)
    """Pipeline stages."""
    data: int = Field(1, ge=1)
    """Data-parallel ranks."""


class StudentSection(Section):
    init: Literal["teacher_layers", "model", "config"] = "teacher_layers"
    """Start from chosen layers of the teacher, from a model directory, or from fresh weights of ``config``."""
    layers: list[int] | None = None
    """With ``teacher_layers``: which of the teacher's layers, in order."""
    model: str | None = None
    """With ``model``: directory or hub name."""
    config: dict[str, Any] | None = None
    """With ``config``: a transformers config as a mapping (``model_type`` and its fields)."""
    freeze: list[str] = []
    """Regular expressions; parameters whose name one of them finds are not trained."""
    dtype: Dtype = "auto"
    """Like ``teacher.dtype``."""
    parallel: ParallelSection = ParallelSection()
    """How the student's ranks are laid out."""
    cpus_per_rank: int = Field(1, ge=1)
    """CPU cores and threads of a rank."""
    gpus_per_rank: int = Field(0, ge=0, le=1)
    """GPUs of a rank; 0 runs on CPU (gloo)."""
    start_seconds: float = Field(600, gt=0)
    """Limit for placing, loading and building the student."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""


class TargetsSection(Section):
    payload: Literal["topk"] = "topk"
    """What a trained position receives: the k likeliest tokens and the mass of all others."""
    k: int = Field(64, ge=1, le=4096)
    """Kept entries per position."""


class LossSection(Section):
    divergence: Divergence = "forward_kl"
    """forward_kl (Hinton 2015), reverse_kl (MiniLLM 2023) or jsd (GKD 2023), between teacher and student."""
    temperature: float = Field(1.0, ge=0.05, le=100)
    """Softens both distributions; the teacher applies it before truncation."""
    hard_weight: float = Field(0.1, ge=0, le=1)
    """Share of the cross-entropy with the true labels; 1 trains on labels only."""
    beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in ``jsd``'s mixture."""
    chunk_mib: float = Field(64, gt=0)
    """Memory budget of the loss's largest tile, MiB."""


class TrainSection(Section):
    steps: int = Field(100, ge=1)
    """Optimizer steps."""
    batch_rows: int = Field(8, ge=1)
    """Rows of one optimizer step, over all ranks."""
    micro_rows: int = Field(1, ge=1)
    """Rows of one forward and backward on one rank."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate goes from its peak to ``final_lr_share`` of it."""
    final_lr_share: float = Field(0.1, ge=0, le=1)
    """Learning rate of the last step, as a share of ``lr``."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""


class StreamSection(Section):
    in_flight: int = Field(8, ge=1)
    """Requests a student rank keeps open ahead of the one it trains on; bounds memory on both sides."""
    endpoints_per_rank: int = Field(8, ge=1)
    """Most teacher endpoints a student rank connects to."""
    stall_seconds: float = Field(60, gt=0)
    """A request without progress for this long is cancelled and retried elsewhere."""
    give_up_seconds: float = Field(120, gt=0)
    """When no endpoint has served a request for this long, the run ends."""
    network: str = "127.0.0.0/8"
    """Private network (CIDR) our listeners bind to; each node uses its address in it."""
    directory_port: int = Field(0, ge=0, le=65535)
    """Port of the endpoint directory; 0 picks a free one."""


class CheckpointSection(Section):
    every_steps: int = Field(50, ge=1)
    """Save after this many steps (and after the last)."""
    keep: int = Field(2, ge=2)
    """How many checkpoints are kept."""


class EvaluateSection(Section):
    quality: bool = True
    """Measure held-out quality before and after, through the served teacher."""
    efficiency: bool = True
    """Measure size, speed and memory of teacher and student after training, each in a fresh process."""
    canary_rows: int = Field(2, ge=0)
    """Rows scored by the served teacher and by a plain forward before step 1; 0 skips (the summary says so)."""
    canary_max_gib: float = Field(8.0, ge=0)
    """A teacher of more GiB of weights is not loaded plainly; the summary then says ``not checked``."""


class ClusterSection(Section):
    address: str | None = None
    """Ray cluster to join (``auto`` inside ``ray job submit``); none starts a local one, closed on exit."""
    wait_seconds: float = Field(120, gt=0)
    """How long placement waits for resources, naming what is missing."""
    grace_seconds: float = Field(8.0, gt=0)
    """After Ctrl-C or SIGTERM: time to save and leave before what is left is killed."""


class RunConfig(Section):
    """A whole run."""

    run: RunSection = RunSection()
    """Name, place and seed."""
    data: DataSection
    """Text, tokenizer and packing."""
    teacher: TeacherSection
    """The served model."""
    student: StudentSection = StudentSection()
    """The trained model."""
    targets: TargetsSection = TargetsSection()
    """What the teacher sends."""
    loss: LossSection = LossSection()
    """What the student minimises."""
    train: TrainSection = TrainSection()
    """Steps, batch and optimizer."""
    deepspeed: dict[str, Any] = {}
    """The student's DeepSpeed config: path of a JSON file, or the same inline; kdscale fills in batch sizes."""
    stream: StreamSection = StreamSection()
    """Requests and listeners."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When to save."""
    evaluate: EvaluateSection = EvaluateSection()
    """What to measure."""
    cluster: ClusterSection = ClusterSection()
    """Where to run."""

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the student."""
        stage: int = self.deepspeed.get("zero_optimization", {}).get("stage", 0)
        return stage

    @model_validator(mode="after")
    def _student_source(self) -> "RunConfig":
        student = self.student
        needed = {"teacher_layers": "layers", "model": "model", "config": "config"}[student.init]
        for field in ("layers", "model", "config"):
            given = getattr(student, field) is not None
            if given != (field == needed):
                state = "is missing" if field == needed else "is not read"
                raise ValueError(f"student.init = {student.init} reads student.{needed}; student.{field} {state}")
        if student.layers is not None and (not student.layers or min(student.layers) < 0):
            raise ValueError(f"student.layers = {student.layers}: at least one layer, counted from 0")
        return self

    @model_validator(mode="after")
    def _parallel(self) -> "RunConfig":
        parallel, stage = self.student.parallel, self.zero_stage
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"deepspeed.zero_optimization.stage = {stage!r}: DeepSpeed knows 0, 1, 2 and 3")
        if parallel.pipeline > 1 and stage > 1:
            raise ValueError(
                f"student.parallel.pipeline = {parallel.pipeline} needs ZeRO stage 0 or 1, the deepspeed section sets"
                f" {stage}; use configs/deepspeed/zero1.json"
            )
        if parallel.pipeline > 1:
            raise ValueError(
                f"student.parallel.pipeline = {parallel.pipeline}: this version trains data-parallel students only;"
                " use student.parallel.pipeline=1 with student.parallel.data ranks"
            )
        unit = self.train.micro_rows * parallel.data
        if self.train.batch_rows % unit:
            raise ValueError(
                f"train.batch_rows = {self.train.batch_rows} is not a multiple of train.micro_rows x"
                f" student.parallel.data = {self.train.micro_rows} x {parallel.data} = {unit}"
            )
        if self.train.warmup_steps >= self.train.steps:
            raise ValueError(
                f"train.warmup_steps = {self.train.warmup_steps} must be below train.steps = {self.train.steps}"
            )
        return self
