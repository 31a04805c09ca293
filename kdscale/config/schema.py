"""Every setting of a run. Bounds live in the field, rules between fields in the validators; nothing is adjusted."""

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from kdscale.config.schedule import Scheduled, ends, value_at, within
from kdscale.config.section import Section
from kdscale.spec import ENCODINGS, SUPPORT, DivergenceName, Encoding, Payload, Sampler, TargetSpec

# From a fault's deadline until the directory tells of it.
_NOTICE_S = 2.0
Dtype = Literal["auto", "float32", "bfloat16"]
Temperature = Annotated[Scheduled, AfterValidator(within(lambda v: 0.05 <= v <= 100, "lie in [0.05, 100]"))]
Share = Annotated[Scheduled, AfterValidator(within(lambda v: 0 <= v <= 1, "lie in [0, 1]"))]
OpenShare = Annotated[Scheduled, AfterValidator(within(lambda v: 0 < v < 1, "lie strictly between 0 and 1"))]
Skew = Annotated[Scheduled, AfterValidator(within(lambda v: 0 <= v < 1, "lie in [0, 1)"))]


def _safe_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", value) or set(value) == {"."}:
        raise ValueError(f"{value!r} must match [A-Za-z0-9._-]{{1,128}}")
    return value


def _network(value: str) -> str:
    try:
        ipaddress.ip_network(value)
    except ValueError as error:
        raise ValueError(f"{value!r} must be a network in CIDR form, like 10.0.0.0/8: {error}") from None
    return value


SafeName = Annotated[str, AfterValidator(_safe_name)]
Network = Annotated[str, AfterValidator(_network)]


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
    heldout: list[str] = Field([])
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
    """Ray actors of a replica: one ZeRO-3 engine over all of them (1: ZeRO stage 0)."""
    replicas: int = Field(1, ge=1)
    """Teachers alike that share the requests. When one is lost, the others go on; more may join a run while it trains
    (``kdscale teacher --join``)."""
    dtype: Dtype = "auto"
    """auto: bfloat16 where the processor multiplies it fast (GPUs, AVX512-BF16, AMX), else float32."""
    max_batch_tokens: int = Field(8192, ge=1)
    """Most tokens one rank takes into one forward (a single larger request still runs, alone)."""
    cpus_per_rank: int = Field(1, ge=1)
    """CPU cores and threads of a rank."""
    gpus_per_rank: int = Field(0, ge=0, le=1)
    """GPUs of a rank; 0 runs on CPU (gloo)."""
    start_seconds: float = Field(120, gt=0)
    """Limit until the ranks of a replica are processes, and again until they have formed their group."""
    load_seconds: float = Field(600, gt=0)
    """Limit for loading and building a replica."""
    load_heartbeat_seconds: float = Field(30, ge=1)
    """Like ``heartbeat_seconds``, while a replica loads: reading weights may keep a rank from answering for a while."""
    heartbeat_seconds: float = Field(4, ge=1)
    """A serving rank that leaves a heartbeat unanswered for this long is lost (stopped, or its node is gone); a dead one is
    noticed at once. A long forward does not count: another thread answers."""
    forward_seconds: float = Field(600, gt=0)
    """A rank whose forward runs longer than this is lost: it hangs, though it answers."""
    restarts: int = Field(3, ge=0)
    """How often in a row a replica that is lost is rebuilt, all ranks together, while students wait or use another one. With
    none left anywhere, the run ends with its newest checkpoint."""
    restart_wait_seconds: float = Field(1, gt=0)
    """Wait before the first rebuild; doubles with each further one, 60 s at most."""
    restart_forget_seconds: float = Field(600, gt=0)
    """A replica that has served for this long counts its restarts, and waits before them, from the beginning."""


class ParallelSection(Section):
    pipeline: int = Field(1, ge=1)
    """Pipeline stages; the layers are dealt out by their trained parameters (ZeRO 0 or 1, listed model families)."""
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
    freeze: list[str] = Field([])
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
    """Limit until the student's ranks are processes, again until they have formed their group, and again until they are
    built."""
    heartbeat_seconds: float = Field(20, ge=1)
    """A rank that leaves a heartbeat unanswered for this long is lost (stopped, or its node is gone); a dead one is noticed
    at once."""
    restarts: int = Field(2, ge=0)
    """How often in a row a run starts its student again from the newest checkpoint, all ranks together, after one was lost
    or failed. With none left, the run ends."""
    restart_wait_seconds: float = Field(1, gt=0)
    """Like ``teacher.restart_wait_seconds``."""
    restart_forget_seconds: float = Field(600, gt=0)
    """Like ``teacher.restart_forget_seconds``, for a student that has lived so long."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""


class TargetsSection(Section):
    payload: Payload = "topk"
    """What a trained position receives. topk: the k likeliest tokens and the mass of all others; sampled: k tokens that
    stand for the whole distribution without bias; hidden: the teacher's last hidden state (its head is fetched once);
    dense: all log-probabilities."""
    k: int = Field(64, ge=1, le=4096)
    """Entries per position of ``topk``. Of ``sampled``: as many at most; tokens of probability 1/k and more come exactly, the
    others stand for about 1/k each, so a position whose teacher is sure takes few."""
    encoding: Literal["auto"] | Encoding = "auto"
    """How numbers travel: float16 or uint8 (topk, sampled), uint4 (topk; ids sorted, the fewest bytes), bfloat16 or int8
    (hidden), float32 (dense). auto: the first that is named here for the payload."""
    source: Literal["live", "recording"] = "live"
    """live: asked of the served teacher; recording: read from ``recording``, without a teacher."""
    recording: str | None = None
    """Directory that ``kdscale record`` has filled."""
    sampler: Sampler = "threshold"
    """How ``sampled`` draws. threshold: likely tokens exactly, the others by systematic sampling; replacement:
    independent draws (arXiv 2503.16870)."""


class LossSection(Section):
    """``temperature``, ``hard_weight``, ``beta`` and ``skew`` take a number, or ``{shape: linear, start: A, end: B}``."""

    divergence: DivergenceName = "forward_kl"
    """Between teacher and student; ``kdscale.losses.divergence`` defines each."""
    temperature: Temperature = 1.0
    """Softens both distributions; the teacher applies it before truncation."""
    hard_weight: Share = 0.1
    """Share of the cross-entropy with the true labels; 1 trains on labels only."""
    beta: OpenShare = 0.5
    """Weight of the teacher in ``jsd``'s mixture."""
    skew: Skew = 0.1
    """Weight of the first distribution in the mixture of the skewed divergences."""
    head_mass: float = Field(0.5, gt=0, lt=1)
    """``adaptive_kl``: mass of the least likely tokens that make the tail."""
    chunk_mib: float = Field(64, gt=0)
    """Memory budget of the loss's largest tile, MiB."""

    @property
    def soft(self) -> bool:
        """Whether any step learns from the teacher."""
        return min(ends(self.hard_weight)) < 1


class TrainSection(Section):
    steps: int = Field(100, ge=1)
    """Optimizer steps. A finished run can be given more: at a constant rate it goes on as if it had always been longer;
    under a schedule the change must be allowed (``checkpoint.allow_changed``), and the rest follows the longer schedule."""
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
    """When no endpoint has served a request for this long, the run ends. The clock starts anew each time the directory says
    that a teacher is being rebuilt."""
    network: Network = "127.0.0.0/8"
    """Private network (CIDR) our listeners bind to; each node uses its address in it."""
    directory_port: int = Field(0, ge=0, le=65535)
    """Port of the endpoint directory; 0 picks a free one."""
    tls: Literal["auto", "always"] = "auto"
    """``auto``: teacher endpoints and directory use mutual TLS where ``network`` is not loopback; ``always``: there too."""


class CheckpointSection(Section):
    every_steps: int | None = Field(50, ge=1)
    """Save after this many steps (and after the last); ``null``: by ``every_seconds`` alone."""
    every_seconds: float | None = Field(None, gt=0)
    """Save when this long has passed since the last save began, by rank 0's clock, at the end of the step."""
    keep: int = Field(2, ge=2)
    """How many checkpoints are kept; older ones go once a new one has been read back."""
    on_failure: Literal["continue", "stop"] = "continue"
    """When a checkpoint cannot be written: warn and train on with the older ones, or end the run. The last save of a run,
    and the one before it leaves on a signal, always end it."""
    write_seconds: float = Field(600, gt=0)
    """A checkpoint that is not written within this time counts as failed."""
    allow_changed: list[str] = Field([])
    """Settings (dotted names, or whole sections) that may differ from the checkpoint's when a run goes on from it; also
    ``--allow-changed``. Otherwise a run of other meaning is refused with the differences."""

    @model_validator(mode="after")
    def _ever(self) -> "CheckpointSection":
        if self.every_steps is None and self.every_seconds is None:
            raise ValueError("checkpoint.every_steps and checkpoint.every_seconds are both null; set one of them")
        return self


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
    deepspeed: dict[str, Any] = Field({})
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

    def target_spec(self, step: int) -> TargetSpec:
        """What step ``step`` (from 0) asks the teacher for."""
        targets = self.targets
        encoding = ENCODINGS[targets.payload][0] if targets.encoding == "auto" else targets.encoding
        # Only what the payload uses: a request is not another one for what makes no difference to its answer.
        named = targets.payload in ("topk", "sampled")
        temperature = 1.0 if targets.payload == "hidden" else value_at(self.loss.temperature, step, self.train.steps)
        if targets.payload == "sampled":
            return TargetSpec("sampled", targets.k, temperature, encoding, targets.sampler, self.run.seed)
        return TargetSpec(targets.payload, targets.k if named else 0, temperature, encoding)

    @model_validator(mode="after")
    def _targets(self) -> "RunConfig":
        payload, divergence = self.targets.payload, self.loss.divergence
        if divergence not in SUPPORT[payload]:
            others = [name for name, carried in SUPPORT.items() if divergence in carried]
            raise ValueError(
                f"loss.divergence = {divergence} cannot be had from targets.payload = {payload}, which carries"
                f" {', '.join(SUPPORT[payload])}; use targets.payload = {' or '.join(others)}"
            )
        if self.targets.encoding not in ("auto", *ENCODINGS[payload]):
            raise ValueError(
                f"targets.encoding = {self.targets.encoding}: payload {payload} travels as"
                f" {' or '.join(ENCODINGS[payload])}"
            )
        return self

    @model_validator(mode="after")
    def _patience(self) -> "RunConfig":
        teacher, give_up_s = self.teacher, self.stream.give_up_seconds
        if teacher.restarts and give_up_s <= teacher.heartbeat_seconds + _NOTICE_S:
            raise ValueError(
                f"stream.give_up_seconds = {give_up_s:g}: students would give up before a lost teacher is noticed"
                f" (teacher.heartbeat_seconds = {teacher.heartbeat_seconds:g} and {_NOTICE_S:g} s more); raise it, or set"
                " teacher.restarts: 0"
            )
        return self

    @model_validator(mode="after")
    def _recording(self) -> "RunConfig":
        targets, temperature = self.targets, self.loss.temperature
        if (targets.source == "recording") != (targets.recording is not None):
            state = (
                "is missing: the directory that `kdscale record` has filled"
                if targets.recording is None
                else "is not read"
            )
            raise ValueError(f"targets.source = {targets.source}: targets.recording {state}")
        if targets.source == "recording" and targets.payload != "hidden" and len(set(ends(temperature))) > 1:
            raise ValueError(
                f"loss.temperature changes during the run, but a recording of targets.payload = {targets.payload} holds one"
                " temperature; use a constant one, or targets.payload: hidden"
            )
        return self

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
        if parallel.pipeline > 1:
            self._pipeline(parallel.pipeline, stage)
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

    def _pipeline(self, stages: int, zero_stage: int) -> None:
        """What DeepSpeed's pipeline engine does wrongly or not at all."""
        what, way_out = f"student.parallel.pipeline = {stages}", "use configs/deepspeed/zero1.json"
        if zero_stage > 1:
            raise ValueError(f"{what} needs ZeRO stage 0 or 1, the deepspeed section sets {zero_stage}; {way_out}")
        bf16 = self.deepspeed.get("bf16", {}).get("enabled", "auto")
        dtype = self.student.dtype
        if zero_stage == 0 and dtype != "float32" and not (dtype == "auto" and bf16 is False):
            raise ValueError(
                f"{what} with ZeRO stage 0 cannot load its own bfloat16 checkpoints, and student.dtype = {dtype} is or may"
                f" become bfloat16; {way_out}, or set student.dtype: float32"
            )
        if zero_stage == 0 and self.train.clip > 0:
            raise ValueError(
                f"{what} with ZeRO stage 0 clips by a wrong gradient norm, and train.clip = {self.train.clip:g}; {way_out},"
                " or set train.clip: 0"
            )
        if self.deepspeed.get("pipeline"):
            raise ValueError(
                f"deepspeed.pipeline = {self.deepspeed['pipeline']}: kdscale sets up the pipeline; remove it, and use"
                " student.activation_checkpointing to save memory"
            )
