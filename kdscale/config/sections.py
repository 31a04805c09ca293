"""The sections of a run's configuration: every field with its bounds."""

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from kdscale.config.layers import LayersSection
from kdscale.config.schedule import Scheduled, ends, within
from kdscale.config.section import Section
from kdscale.spec import DivergenceName, Encoding, Payload, Sampler

Dtype = Literal["auto", "float32", "bfloat16"]
ExportForm = Literal["hf", "gguf", "int8"]
GgufType = Literal["f32", "f16", "bf16", "q8_0"]
"""How a GGUF file stores matrices. q8_0: 8 bits an element, and a scale for each 32."""
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


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} must be a regular expression: {error}") from None
    return value


Beta = Annotated[float, Field(ge=0, lt=1)]
SafeName = Annotated[str, AfterValidator(_safe_name)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Network = Annotated[str, AfterValidator(_network)]


Placement = Literal["pack", "strict_pack", "spread", "strict_spread"]


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
    """Files, globs, Hugging Face dataset directories or hub names to train on (text, jsonl, parquet, Arrow). A classifier's
    rows have ``text`` or ``image``, and ``label``."""
    heldout: list[str] = Field([])
    """The same for held-out text. Empty: every ``heldout_every``-th training document is held out."""
    heldout_every: int = Field(50, ge=2)
    """Which share of the documents is held out when ``heldout`` is empty."""
    heldout_tokens: int = Field(4096, ge=1)
    """At most about this many held-out tokens are scored (whole rows); of classifiers so many examples."""
    row_tokens: int = Field(1024, ge=2)
    """Length of a packed row, tokens. Classifiers of text read so many tokens of each."""
    packing: Literal["isolated", "joined", "off"] = "isolated"
    """isolated: documents share rows but don't see each other; joined: they do; off: one document piece per row."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens of prompt+completion or chat documents are trained on (plain text: always all)."""
    append_eos: bool = True
    """Whether a document ends with the tokenizer's end token."""
    tokenizer: str | None = None
    """Tokenizer directory, hub name or SentencePiece ``.model`` file; none: the teacher's."""
    teacher_column: str | None = None
    """Field of a document that names its teacher, where there are several (``teachers.combine: routing``)."""
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
    placement: Placement = "pack"
    """How ranks go to nodes: pack: few nodes; strict_pack: one node; spread: many; strict_spread: a node each."""
    nodes: dict[str, str] = Field({})
    """Labels of the nodes that may hold a rank (``ray start --labels``), with values as Ray's label selectors have them:
    ``{role: teacher}``, or ``{role: "!teacher"}`` for all other nodes."""
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
    """Pipeline stages (ZeRO 0 or 1, listed model families)."""
    split: Literal["parameters", "time"] = "parameters"
    """How layers are dealt out to the stages: by their trained parameters, or by the time rank 0 measures at the start (a frozen
    layer takes time too). Times differ from start to start, so that a resumed run may be cut elsewhere."""
    data: int = Field(1, ge=1)
    """Data-parallel ranks."""


class LoraSection(Section):
    rank: int = Field(16, ge=1)
    """Rank of what is added to a layer."""
    alpha: float = Field(32, gt=0)
    """What is added is scaled by ``alpha / rank``."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a layer's inputs that its adapter does not see in a step, drawn anew for each."""
    targets: list[Pattern] = Field(["_proj$"], min_length=1)
    """Regular expressions; linear layers whose name one of them finds get an adapter. The head cannot."""
    whole: list[Pattern] = Field([])
    """Regular expressions; parameters of the base that are trained whole beside the adapters (embedding, head, norms)."""


class StudentSection(Section):
    init: Literal["teacher_layers", "model", "config"] = "teacher_layers"
    """Start from chosen layers of the teacher, from a model directory, or from fresh weights of ``config``."""
    layers: list[int] | None = None
    """With ``teacher_layers``: which of the teacher's layers, in order."""
    model: str | None = None
    """With ``model``: directory or hub name."""
    config: dict[str, Any] | None = None
    """With ``config``: a transformers config as a mapping (``model_type`` and its fields)."""
    freeze: list[Pattern] = Field([])
    """Regular expressions; parameters whose name one of them finds are not trained."""
    lora: LoraSection | None = None
    """Train low-rank adapters on the layers instead of their weights; the export has them merged. ``freeze`` counts after."""
    dtype: Dtype = "auto"
    """Like ``teacher.dtype``."""
    parallel: ParallelSection = ParallelSection()
    """How the student's ranks are laid out."""
    cpus_per_rank: int = Field(1, ge=1)
    """CPU cores and threads of a rank."""
    gpus_per_rank: int = Field(0, ge=0, le=1)
    """GPUs of a rank; 0 runs on CPU (gloo)."""
    placement: Placement = "pack"
    """How ranks go to nodes: pack: few nodes; strict_pack: one node; spread: many; strict_spread: a node each."""
    nodes: dict[str, str] = Field({})
    """Labels of the nodes that may hold a rank (``ray start --labels``), with values as Ray's label selectors have them:
    ``{role: teacher}``, or ``{role: "!teacher"}`` for all other nodes."""
    start_seconds: float = Field(600, gt=0)
    """Limit until the student's ranks are processes, again until they have formed their group, and again until they are
    built."""
    collective_seconds: float = Field(1800, gt=0)
    """How long ranks may wait for one of them, which is then lost: it may be exporting, or waiting for a teacher that is being
    rebuilt."""
    heartbeat_seconds: float = Field(20, ge=1)
    """A rank that leaves a heartbeat unanswered for this long is lost (stopped, or its node is gone); a dead one is noticed
    at once."""
    restarts: int = Field(2, ge=0)
    """How often in a row a run starts its student again from the newest checkpoint, all ranks together, after one was lost
    or failed. With none left, the run ends."""
    restart_wait_seconds: float = Field(1, gt=0)
    """Like ``teacher.restart_wait_seconds``."""
    restart_forget_seconds: float = Field(600, gt=0)
    """Like ``teacher.restart_forget_seconds``, for a student that has lived so long since its first checkpoint: one that never
    comes to a checkpoint is not started again for ever."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""


class TargetsSection(Section):
    payload: Payload = "topk"
    """What a trained position receives. topk: the k likeliest tokens and the mass of all others; sampled: k tokens that
    stand for the whole distribution without bias; hidden: the teacher's last hidden state (its head is fetched once);
    dense: all log-probabilities."""
    k: int = Field(64, ge=1, le=4096)
    """Entries per position of ``topk``. Of ``sampled``: as many at most; tokens clearly likelier than 1/k come exactly, the
    others stand for about 1/k each, so a position whose teacher is sure takes few."""
    encoding: Literal["auto"] | Encoding = "auto"
    """How numbers travel: float16 or uint8 (topk, sampled), uint4 (topk; ids sorted, the fewest bytes), bfloat16 or int8
    (hidden), float32 (dense). auto: the first that is named here for the payload."""
    source: Literal["live", "recording", "live+record", "none"] = "live"
    """live: asked of the served teacher; recording: read from ``recording``, without a teacher; live+record: asked of the
    teacher and kept in ``recording`` during the first epoch, after which the teacher is let go; none: the true labels alone
    (``loss.hard_weight: 1``), and of ``teacher.model`` only what tokenizer and ``student.init`` need of it."""
    recording: str | None = None
    """Directory that ``kdscale record`` has filled, or that ``live+record`` fills."""
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
    layers: LayersSection | None = None
    """Learn from inside the teacher too: hidden states of chosen layers."""
    chunk_mib: float = Field(64, gt=0)
    """Memory budget of the loss's largest tile, MiB."""

    @property
    def soft(self) -> bool:
        """Whether any step learns from the teacher."""
        return min(ends(self.hard_weight)) < 1 or self.layers is not None


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
    betas: tuple[Beta, Beta] = (0.9, 0.95)
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
    """``auto``: what listens for the run (teacher endpoints, directory, sequencer, rendezvous store) uses mutual TLS where
    ``network`` is not loopback; ``always``: there too."""


class GenerateSection(Section):
    """What ``kdscale generate`` lets the teacher write. A prompt is what stands before the first trained token of a training
    document; plain text is cut into pieces of ``prompt_tokens`` + ``new_tokens``, and each begins with a prompt."""

    prompt_tokens: int = Field(64, ge=1)
    """Of plain text: tokens of a prompt (at most: a shorter text is one as a whole)."""
    new_tokens: int = Field(128, ge=1)
    """Most tokens of a continuation; one that is cut off there is learned without an end token."""
    samples: int = Field(1, ge=1)
    """Continuations of each prompt."""
    limit: int | None = Field(None, ge=1)
    """Most prompts; none: all."""
    batch_rows: int = Field(16, ge=1)
    """Continuations that one rank writes at a time."""
    temperature: float = Field(1.0, ge=0, le=100)
    """0: always the likeliest token."""
    top_k: int = Field(0, ge=0)
    """Draw among so many likeliest tokens; 0: among all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw among the likeliest tokens that hold this much of the probability."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field([])
    """Texts before which a continuation ends."""
    batch_seconds: float = Field(600, gt=0)
    """A teacher that needs longer for one batch is lost, and started again (``teacher.restarts``)."""


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
    mirror: str | None = None
    """URL (``s3://bucket/runs``, ``file:///backup``) below which, in ``NAME/``, each whole checkpoint is copied behind the
    training, and from where a host without the run's directory goes on. A copy that fails is counted and ends no run."""
    allow_changed: list[str] = Field([])
    """Settings (dotted names, or whole sections) that may differ from the checkpoint's when a run goes on from it; also
    ``--allow-changed``. Otherwise a run of other meaning is refused with the differences."""

    @model_validator(mode="after")
    def _ever(self) -> "CheckpointSection":
        if self.every_steps is None and self.every_seconds is None:
            raise ValueError("checkpoint.every_steps and checkpoint.every_seconds are both null; set one of them")
        return self

    @field_validator("mirror")
    @classmethod
    def _url(cls, mirror: str | None) -> str | None:
        if mirror is not None and ("://" not in mirror or mirror.startswith("memory:")):
            raise ValueError("a URL that other processes can open, like s3://bucket/runs or file:///backup")
        return mirror


class ExportSection(Section):
    shard_gib: float = Field(5.0, gt=0)
    """A student of more GiB of weights is exported in several safetensors files of at most so many."""

    @property
    def shard_bytes(self) -> int:
        return int(self.shard_gib * 2**30)


class EvaluateSection(Section):
    quality: bool = True
    """Measure held-out quality before and after, through the served teacher."""
    efficiency: bool = True
    """Measure size, speed and memory of teacher and student after training, each in a fresh process."""
    canary_rows: int = Field(2, ge=0)
    """Rows scored by the served teacher and by a plain forward before step 1; 0 skips (the summary says so)."""
    canary_max_gib: float = Field(8.0, ge=0)
    """A teacher of more GiB of weights is not loaded plainly, the summary then says ``not checked``; nor is an exported student,
    whose difference is then none."""


class ClusterSection(Section):
    address: str | None = None
    """Ray cluster to join (``auto`` inside ``ray job submit``); none starts a local one, closed on exit."""
    wait_seconds: float = Field(120, gt=0)
    """How long placement waits for resources, naming what is missing."""
    grace_seconds: float = Field(8.0, gt=0)
    """After Ctrl-C or SIGTERM: time to save and leave before what is left is killed."""
