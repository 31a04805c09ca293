"""A run's configuration and the rules between its settings; nothing is adjusted. ``sections`` has the settings."""

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from kdscale.config.alignment import AlignmentSection
from kdscale.config.on_policy import OnPolicySection
from kdscale.config.schedule import ends, value_at
from kdscale.config.section import Section
from kdscale.config.sections import (
    CheckpointSection,
    ClusterSection,
    DataSection,
    EvaluateSection,
    ExportSection,
    GenerateSection,
    LossSection,
    RunSection,
    StreamSection,
    StudentSection,
    TargetsSection,
    TeacherSection,
    TrainSection,
)
from kdscale.config.teachers import ALONE, Routing, TeachersSection, require_combinable
from kdscale.spec import ENCODINGS, SUPPORT, TargetSpec, Task

# From a fault's deadline until the directory tells of it.
_NOTICE_S = 2.0


class RunConfig(Section):
    """A whole run."""

    task: Task = Field("language-modelling")
    """What models are for: language-modelling predicts the next token at every position of packed text; the
    classifications predict the class of a text, or of an image, which then is the one position of its row."""
    run: RunSection = RunSection()
    """Name, place and seed."""
    data: DataSection
    """Text, tokenizer and packing."""
    teacher: TeacherSection
    """The served model; of several the main one, whose tokenizer all have and whose layers a student may start from."""
    teachers: TeachersSection = TeachersSection()
    """Further teachers."""
    student: StudentSection = StudentSection()
    """The trained model."""
    targets: TargetsSection = TargetsSection()
    """What the teacher sends."""
    loss: LossSection = LossSection()
    """What the student minimises."""
    alignment: AlignmentSection = AlignmentSection()
    """Whether the student has a tokenizer of its own."""
    train: TrainSection = TrainSection()
    """Steps, batch and optimizer."""
    deepspeed: dict[str, Any] = Field({})
    """The student's DeepSpeed config: path of a JSON file, or the same inline; kdscale fills in batch sizes."""
    stream: StreamSection = StreamSection()
    """Requests and listeners."""
    generate: GenerateSection = GenerateSection()
    """What ``kdscale generate`` writes."""
    on_policy: OnPolicySection | None = None
    """Let the student learn on text of its own."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When to save."""
    export: ExportSection = ExportSection()
    """How the student is written."""
    evaluate: EvaluateSection = EvaluateSection()
    """What to measure."""
    cluster: ClusterSection = ClusterSection()
    """Where to run."""

    @field_validator("deepspeed")
    @classmethod
    def _mappings(cls, value: dict[str, Any]) -> dict[str, Any]:
        """What is read of the section must be what DeepSpeed's own files have there."""
        zero = value.get("zero_optimization", {})
        parts = {"zero_optimization": zero, "bf16": value.get("bf16", "auto"), "fp16": value.get("fp16", "auto")}
        if isinstance(zero, dict):
            offloads = ("offload_optimizer", "offload_param")
            parts |= {f"zero_optimization.{name}": one for name in offloads if (one := zero.get(name)) is not None}
        for name, part in parts.items():
            if not isinstance(part, dict) and not (part == "auto" and name in ("bf16", "fp16")):
                raise ValueError(f"{name} = {part!r} must be a mapping, as in configs/deepspeed/*.json")
        return value

    def precision(self, name: Literal["bf16", "fp16"]) -> Any:
        """Whether the ``deepspeed`` section enables it; ``auto`` where it says nothing."""
        section = self.deepspeed.get(name, "auto")
        return "auto" if section == "auto" else section.get("enabled", "auto")

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the student."""
        stage: int = self.deepspeed.get("zero_optimization", {}).get("stage", 0)
        return stage

    @property
    def named_teachers(self) -> dict[str, TeacherSection]:
        """All teachers, the main one first."""
        others = self.teachers.others
        return {self.teachers.main: self.teacher, **others} if others else {ALONE: self.teacher}

    @property
    def routing(self) -> Routing | None:
        """How documents find their teacher; none where they don't need to."""
        column = self.data.teacher_column
        return None if column is None else Routing(column, tuple(self.named_teachers), self.teachers.default)

    @property
    def recording_refusal(self) -> str | None:
        """Why no recording can hold the targets; none where one can."""
        if self.targets.payload == "hidden" or len(set(ends(self.loss.temperature))) == 1:
            return None
        return (
            f"loss.temperature changes during the run, but a recording of targets.payload = {self.targets.payload} holds one"
            " temperature; use a constant one, or targets.payload: hidden"
        )

    def target_spec(self, step: int) -> TargetSpec:
        """What step ``step`` (from 0) asks the teacher for."""
        targets = self.targets
        encoding = ENCODINGS[targets.payload][0] if targets.encoding == "auto" else targets.encoding
        # Only what the payload uses: a request is not another one for what makes no difference to its answer.
        named = targets.payload in ("topk", "sampled")
        temperature = 1.0 if targets.payload == "hidden" else value_at(self.loss.temperature, step, self.train.steps)
        spec = TargetSpec(targets.payload, targets.k if named else 0, temperature, encoding)
        if targets.payload == "sampled":
            spec = replace(spec, sampler=targets.sampler, seed=self.run.seed)
        if (layers := self.loss.layers) is not None:
            spec = replace(spec, layers=layers.teacher_layers, layers_encoding=layers.encoding)
        return spec

    @model_validator(mode="after")
    def _task(self) -> "RunConfig":
        if self.task == "language-modelling":
            return self
        if (stages := self.student.parallel.pipeline) > 1:
            raise ValueError(
                f"student.parallel.pipeline = {stages}: a model for {self.task} cannot be cut into stages; use"
                " student.parallel.pipeline: 1 with data ranks"
            )
        for name in ("packing", "loss_on", "append_eos"):
            value, default = getattr(self.data, name), DataSection.model_fields[name].default
            if value != default:
                raise ValueError(
                    f"data.{name} = {value}: {self.task} does not read it (an example is a row, as the tokenizer or image"
                    f" processor has it); remove it, or set task: language-modelling"
                )
        if self.task == "image-classification" and self.data.tokenizer is not None:
            raise ValueError(f"data.tokenizer = {self.data.tokenizer}: images have none; remove it")
        return self

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
    def _alignment(self) -> "RunConfig":
        refusal = self.alignment.refusal(
            task=self.task,
            payload=self.targets.payload,
            divergence=self.loss.divergence,
            temperatures=ends(self.loss.temperature),
            pipeline=self.student.parallel.pipeline,
            soft=self.loss.soft,
            several=bool(self.teachers.others),
        )
        if refusal is not None:
            raise ValueError(refusal)
        return self

    @model_validator(mode="after")
    def _layers(self) -> "RunConfig":
        if self.loss.layers is None:
            return self
        if self.task != "language-modelling":
            raise ValueError(f"loss.layers: task = {self.task} has no states of single tokens; remove loss.layers")
        if self.teachers.others:
            raise ValueError(
                "loss.layers: several teachers have layers of their own each; remove it, or teachers.others"
            )
        if self.alignment.method is not None:
            raise ValueError(
                "loss.layers: a student with a tokenizer of its own has states of other tokens; remove it, or alignment"
            )
        if (stages := self.student.parallel.pipeline) > 1:
            raise ValueError(
                f"loss.layers with student.parallel.pipeline = {stages}: only the last stage meets the teacher's states; use"
                " student.parallel.data, with any ZeRO stage"
            )
        return self

    @model_validator(mode="after")
    def _patience(self) -> "RunConfig":
        give_up_s = self.stream.give_up_seconds
        for teacher in self.named_teachers.values():
            if teacher.restarts and give_up_s <= teacher.heartbeat_seconds + _NOTICE_S:
                raise ValueError(
                    f"stream.give_up_seconds = {give_up_s:g}: students would give up before a lost teacher is noticed"
                    f" (teacher.heartbeat_seconds = {teacher.heartbeat_seconds:g} and {_NOTICE_S:g} s more); raise it, or"
                    " set teacher.restarts: 0"
                )
        longest = {"checkpoint.write_seconds": self.checkpoint.write_seconds}
        if self.targets.source in ("live", "live+record"):
            longest["teacher.load_seconds"] = max(one.load_seconds for one in self.named_teachers.values())
        for name, limit_s in longest.items():
            if self.student.collective_seconds < limit_s:
                raise ValueError(
                    f"student.collective_seconds = {self.student.collective_seconds:g}: ranks would give each other up before"
                    f" {name} = {limit_s:g} is over, for which one of them may wait; raise it"
                )
        return self

    @model_validator(mode="after")
    def _teachers(self) -> "RunConfig":
        require_combinable(self)
        return self

    @model_validator(mode="after")
    def _recording(self) -> "RunConfig":
        targets = self.targets
        if (targets.source in ("recording", "live+record")) != (targets.recording is not None):
            state = (
                "is missing: the directory that `kdscale record` has filled, or that live+record fills"
                if targets.recording is None
                else "is not read"
            )
            raise ValueError(f"targets.source = {targets.source}: targets.recording {state}")
        if targets.source == "none" and self.loss.layers is not None:
            raise ValueError(
                "targets.source = none has no teacher, and loss.layers learns from one; remove loss.layers, or set"
                " targets.source: live"
            )
        if targets.source == "none" and self.loss.soft:
            raise ValueError(
                f"targets.source = none has no teacher to learn from, and loss.hard_weight = {self.loss.hard_weight} asks for"
                " one; set loss.hard_weight: 1, or targets.source: live"
            )
        if targets.recording is not None and (refusal := self.recording_refusal) is not None:
            raise ValueError(refusal)
        return self

    @model_validator(mode="after")
    def _on_policy(self) -> "RunConfig":
        if self.on_policy is None:
            return self
        refused = {
            f"task = {self.task}": (self.task != "language-modelling", "only language models write"),
            f"alignment.method = {self.alignment.method}": (
                self.alignment.method is not None,
                "the teacher judges its own tokens; let both have one tokenizer",
            ),
            f"teachers.others = {', '.join(self.teachers.others)}": (
                bool(self.teachers.others),
                "text of the student belongs to no teacher of several; use one",
            ),
            f"targets.source = {self.targets.source}": (
                self.targets.source != "live",
                "what the student will write is in no recording, and needs a teacher; use targets.source: live",
            ),
            f"student.parallel.pipeline = {self.student.parallel.pipeline}": (
                self.student.parallel.pipeline > 1,
                "use student.parallel.pipeline: 1 with data ranks, at any ZeRO stage",
            ),
            f"loss.hard_weight = {self.loss.hard_weight}": (
                not self.loss.soft,
                "the student's own text has no true labels; lower it",
            ),
            f"data.row_tokens = {self.data.row_tokens}": (
                self.data.row_tokens < self.on_policy.longest_text,
                f"below the {self.on_policy.longest_text} tokens that on_policy.prompt_tokens, new_tokens and an end token take;"
                " raise it",
            ),
        }
        for what, (is_so, why) in refused.items():
            if is_so:
                raise ValueError(f"{what} does not go with on_policy: {why}, or remove on_policy")
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
        if parallel.split == "time" and (self.run.deterministic or parallel.pipeline == 1):
            why = (
                "run.deterministic = true, and measured times differ"
                if self.run.deterministic
                else "there is one stage"
            )
            raise ValueError(f"student.parallel.split = time: {why}; use student.parallel.split: parameters")
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
        bf16 = self.precision("bf16")
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
        if self.student.lora is not None:
            raise ValueError(
                f"{what} with student.lora is not supported; use student.parallel.data, with any ZeRO stage"
            )
        if self.deepspeed.get("pipeline"):
            raise ValueError(
                f"deepspeed.pipeline = {self.deepspeed['pipeline']}: kdscale sets up the pipeline; remove it, and use"
                " student.activation_checkpointing to save memory"
            )
