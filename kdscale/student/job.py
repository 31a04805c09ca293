"""What a student rank does with its life, in order. No Ray: the launcher's ranks run the same."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from kdscale import log
from kdscale.batch import Batch
from kdscale.data.pairs import TokenizerPair
from kdscale.data.reading import RunCorpus, load_reader, make_loader, read_corpus
from kdscale.engine import checkpoint as checkpoints
from kdscale.engine import process
from kdscale.engine.described import class_names, student_pixels
from kdscale.engine.directories import load_config, model_here
from kdscale.engine.fragments import index_files
from kdscale.engine.models import build_student
from kdscale.engine.saver import Saver
from kdscale.engine.settings import batch_cut, student_dtype, student_settings, topology_of
from kdscale.errors import ConfigError, RecordingError, StreamError
from kdscale.evaluate.quality import NO_SUMS, Quality, label_sums, quality, share_of
from kdscale.evaluate.views import AnyView, TargetSources, View, teachers_of, view_of
from kdscale.head import Head
from kdscale.losses.aligned import Alignment
from kdscale.losses.spans import Vocabularies
from kdscale.metrics import MetricsFile, StepMetrics
from kdscale.mirror import Mirror, mirror_of
from kdscale.stream.filling import Filling
from kdscale.stream.protocol import Access
from kdscale.student.canaries import check_canaries, not_checked
from kdscale.student.exporting import export
from kdscale.student.keeping import Keeping
from kdscale.student.layers import LayerLoss
from kdscale.student.layout import DataParallelStudent, PipelineStudent, Student, whole_head
from kdscale.student.own_text import OwnText, open_own_text
from kdscale.student.resume import WAYS, go_on_from, require_one_environment
from kdscale.student.saving import Saving
from kdscale.student.sources import open_source
from kdscale.student.trainer import Totals, Trainer
from kdscale.student.worker import StudentSetup

_LOG = log.get(__name__)
_HELD_OUT_ROWS, _HELD_OUT_EXAMPLES = 2, 64
"""Rows of one request for held-out targets; in a pipeline 1, where all requests have one shape."""


@dataclass(frozen=True)
class _HeldOut:
    """This rank's share of the held-out text, and the teachers' side of it where the loss is held and there is a teacher."""

    batches: list[Batch]
    view: AnyView | None


class StudentJob:
    """A rank's model, engine and data, and the run over them."""

    def __init__(
        self,
        setup: StudentSetup,
        rank: int,
        device: torch.device,
        *,
        emit: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
    ) -> None:
        config = setup.config
        self._setup, self._config, self._rank, self._device = setup, config, rank, device
        self._emit, self._should_stop = emit, should_stop
        process.set_threads(config.student.cpus_per_rank, deterministic=config.run.deterministic)
        process.set_seed(config.run.seed)
        self._dtype = process.resolve_dtype(student_dtype(config), device)
        self._directory = Path(setup.run_directory)
        self._topology = topology_of(config.student.parallel)

        self._teacher = model_here(Path(setup.teacher.directory), config.teacher.model, setup.teacher.meaning.teacher)
        self._reader = load_reader(config.task, config.data, config.alignment, self._teacher)
        self._pair = self._reader if isinstance(self._reader, TokenizerPair) else None
        model = build_student(config.student, self._teacher, self._dtype, config.task, self._pair)
        self._pixels = student_pixels(config.student, self._teacher, config.task)
        if config.student.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        self._trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if config.run.deterministic:
            require_one_environment(device)
        self._student = self._lay_out(model)
        self._student.head.alignment = self._alignment()
        self._start = 0
        self._notes: dict[str, Any] = {}
        self._metrics: MetricsFile | None = None
        self._saving: Saving | None = None
        self._keeping: Keeping | None = None
        self._own_text: OwnText | None = None
        if setup.resume_from is not None:
            # All of it was hashed before ranks were started: each rank sees to what it reads on its own node.
            found = checkpoints.verify(Path(setup.resume_from), (rank, self._topology.world))
            way, self._notes = go_on_from(
                found, setup, self._student, self._dtype_name, device, rank, self._topology.world
            )
            self._start = found.step
            self._phase(f"going on from step {found.step}, {WAYS[way]}")

    def _lay_out(self, model: PreTrainedModel) -> Student:
        config, vocab_size = self._config, (self._pair or self._setup.teacher.meaning).vocab_size
        chunk_bytes = int(config.loss.chunk_mib * 2**20)
        settings = student_settings(config, self._dtype_name)
        if self._topology.pipeline == 1:
            layers = None
            if config.loss.layers is not None:
                layers = LayerLoss(config.loss.layers, model, self._setup.teacher.meaning.hidden_size, config.run.seed)
            return DataParallelStudent(model, vocab_size, chunk_bytes, settings, self._rank, self._pixels, layers)
        by_time = config.student.parallel.split == "time"
        shape = (config.train.micro_rows, config.data.row_tokens) if by_time else None
        return PipelineStudent(model, vocab_size, chunk_bytes, settings, self._topology, self._rank, shape)

    def _alignment(self) -> Alignment | None:
        section, pair = self._config.alignment, self._pair
        if section.method is None or pair is None:
            return None
        vocabularies = Vocabularies.of(
            pair.matches, pair.vocab_size, self._setup.teacher.meaning.vocab_size, self._device
        )
        return Alignment(section.method, section.unmatched_weight, vocabularies)

    @property
    def _dtype_name(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    @property
    def _holds_loss(self) -> bool:
        return self._topology.holds_loss(self._rank)

    @property
    def _has_teacher(self) -> bool:
        """Served or recorded."""
        return self._config.targets.source != "none"

    def facts(self) -> dict[str, Any]:
        return {
            "parameters": self._parameters,
            "parameters_trained": self._trained,
            "dtype": self._dtype_name,
            "start_step": self._start,
            "rss_bytes": psutil.Process().memory_info().rss,
        }

    def run(self, access: Access | None) -> dict[str, Any]:
        """Canary, quality before, training, quality after, export. Raises: any KdscaleError."""
        with self._open_saving() as saving:
            try:
                return self._run(access, saving)
            finally:
                if self._own_text is not None:
                    self._own_text.close()

    def _run(self, access: Access | None, saving: Saving) -> dict[str, Any]:
        config = self._config
        save_reader, corpus = self._data()
        source = self._source(access, corpus)
        cut = batch_cut(config)
        loader = make_loader(corpus.train, config.data, cut.rows, config.run.seed)
        if isinstance(source, Filling):
            self._keeping = Keeping(source, config, loader, corpus, self._rank, self._device, self._emit)
        self._own_text = open_own_text(self._setup, self._student, loader, self._topology, self._rank, self._start)
        trainer = Trainer(
            config,
            loader,
            cut,
            self._topology,
            self._rank,
            self._student.step(cut),
            emit=self._step_done,
            saving=saving,
            own_text=self._own_text,
        )
        if self._rank == 0:
            self._metrics = MetricsFile(self._directory / "metrics.jsonl", self._start)
        report, held_out = self._check_teacher(loader.batch(0), corpus, source)
        # The teacher works on the first batches while the student is measured.
        prefetcher = trainer.prefetch(self._start, source) if config.loss.soft and self._holds_loss else None
        try:
            if held_out is not None and "quality_before" not in self._notes:
                self._phase("measuring the student before training")
                self._notes["quality_before"] = self._quality(held_out).as_dict()
            if held_out is not None and self._start == 0:
                self._notes |= self._own_quality(source, held_out, "own_quality_before")
            self._phase("training")
            totals = Totals(**self._notes["totals"]) if "totals" in self._notes else Totals()
            outcome = trainer.run(self._start, totals, prefetcher)
        finally:
            if prefetcher is not None:
                prefetcher.close()
        report |= {"step": outcome.step, "stopped": outcome.stopped}
        report |= {"steps_per_epoch": loader.steps_per_epoch, "changes": self._notes.get("changes", [])}
        if outcome.stopped:
            try:
                source.close()  # a recording that is being filled keeps what has arrived
            except RecordingError as error:
                _LOG.warning("the run is saved, but what was recorded last is not: %s", error)
            return report
        if held_out is not None:
            self._phase("measuring the student after training")
            after = self._quality(held_out).as_dict()
            report |= {"quality_before": self._notes["quality_before"], "quality_after": after}
            report |= {"own_quality_before": self._notes.get("own_quality_before")}
            report |= self._own_quality(source, held_out, "own_quality_after")
        if self._metrics is not None:
            report["layer_loss"] = self._metrics.last.get("layer_loss")
        self._phase("exporting")
        try:
            report["export_max_logit_difference"] = export(
                self._student,
                loader.batch(0, slice(0, 1)),
                self._directory / "student",
                save_reader,
                config,
                self._topology,
                self._rank,
                dtype=self._dtype,
                parameters=self._parameters,
            )
        except Exception:
            # The last checkpoint is being written beside: what it took to train is not lost with an export.
            saving.settle(config.checkpoint.write_seconds)
            raise
        try:
            report["teacher_stats"] = source.teacher_stats()
        except StreamError as error:
            # Nobody needs the teacher any more: one served elsewhere may have left.
            _LOG.warning("the summary lacks the teacher's counters: %s", error)
            report["teacher_stats"] = []
        report["received"] = {payload: received.as_dict() for payload, received in source.received.items()}
        source.close()
        saving.finish()
        stall_s = outcome.totals.checkpoint_stall_seconds + saving.take_stall_seconds()
        report["mirror"] = saving.mirrored()
        report["totals"] = asdict(replace(outcome.totals, checkpoint_stall_seconds=stall_s))
        return report

    def evaluate(self, access: Access | None) -> dict[str, Any]:
        """Canary and quality of the student as it was built, without training. Raises: any KdscaleError."""
        _, corpus = self._data()
        source = self._source(access, corpus)
        # As before training: of held-out rows a recording has no targets of the payload.
        loader = make_loader(corpus.train, self._config.data, batch_cut(self._config).rows, self._config.run.seed)
        report, held_out = self._check_teacher(loader.batch(0), corpus, source)
        if held_out is None:
            raise ConfigError("evaluate.quality = false leaves nothing to evaluate; set it to true")
        self._phase("measuring the student")
        report |= self._quality(held_out).as_dict()
        source.close()
        return report

    def _source(self, access: Access | None, corpus: RunCorpus) -> TargetSources:
        return open_source(self._config, self._setup.teachers, corpus.fingerprint, access, self._rank)

    def _data(self) -> tuple[Callable[[Path], None], RunCorpus]:
        """What writes by what the student reads its inputs, and the corpus; the driver has made it, so this finds it in the cache
        of its node, or makes it there."""
        task, data = self._config.task, self._config.data
        classes = () if task == "language-modelling" else class_names(load_config(self._teacher))
        kind, known = (task, data, self._reader, classes), self._setup.identity["corpus"]
        corpus = read_corpus(*kind, lambda done, total, what: None, self._config.routing, known)
        return (self._pixels or self._reader).save, corpus

    def _check_teacher(
        self, row: Batch, corpus: RunCorpus, source: TargetSources
    ) -> tuple[dict[str, Any], _HeldOut | None]:
        """The canary on ``row``; meanwhile the teachers score the held-out text."""
        config = self._config
        needs_head = config.loss.soft and config.targets.payload == "hidden"
        measures = config.evaluate.quality and self._holds_loss and self._has_teacher
        heads: dict[str, Head] = {}
        if (needs_head and (self._holds_loss or self._rank == 0)) or measures:
            heads = {name: one.fetch_head() for name, one in teachers_of(source).items()}
        if heads and isinstance(source, Filling) and self._topology.data_rank(self._rank) == 0:
            source.save_head(*heads.values())
        if needs_head and self._holds_loss:
            (head,) = heads.values()
            self._student.head.teacher_head = head.to(self._device)
        batches = self._held_out(corpus) if config.evaluate.quality else []
        with ThreadPoolExecutor(1) as beside:
            view = None
            if measures:
                view = beside.submit(view_of, batches, source, heads, config.stream.in_flight, self._device)
            report = {"canary": self._canary(row, source, heads)}
            if not config.evaluate.quality:
                return report, None
            if self._has_teacher:
                self._phase("scoring held-out text by the teacher")
            return report, _HeldOut(batches, None if view is None else view.result())

    def _step_done(self, metrics: StepMetrics) -> None:
        # Written here, not where it is shown: a step that a checkpoint counts stands in the file, whoever dies.
        if self._metrics is not None:
            self._metrics.write(metrics)
        self._emit({"kind": "step", "metrics": metrics.as_dict()})
        if self._keeping is not None:
            self._keeping.after_step(metrics.step)
        if self._own_text is not None:
            self._own_text.after_step(metrics.step)

    def _phase(self, name: str) -> None:
        self._emit({"kind": "phase", "phase": name})

    # ---- checks and measures ----

    def _canary(self, batch: Batch, source: TargetSources, heads: Mapping[str, Head]) -> str:
        """Rank 0's line for the summary."""
        if self._rank != 0:
            return ""
        if (why := not_checked(self._config)) is not None:
            return why
        self._phase("checking the served teacher against a plain forward")
        return check_canaries(self._config, self._setup.teachers, batch, source, heads, self._device)

    def _held_out(self, corpus: RunCorpus) -> list[Batch]:
        """This rank's share of the held-out rows; every rank runs the same number of forwards."""
        data = self._config.data
        loader = make_loader(corpus.heldout, data, 1, self._config.run.seed)
        rows = _HELD_OUT_ROWS if self._topology.pipeline == 1 else 1
        if self._config.task != "language-modelling":
            rows = _HELD_OUT_EXAMPLES
        batches: list[Batch] = list(loader.heldout_batches(data.heldout_tokens, rows_per_batch=rows))
        return share_of(batches, self._topology.data_rank(self._rank), self._topology.data)

    @torch.no_grad()
    def _quality(self, held_out: _HeldOut) -> Quality:
        hidden = self._student.hidden(held_out.batches)
        sums = NO_SUMS
        if self._holds_loss:
            with whole_head(self._student) as head:
                view = held_out.view
                sums = label_sums(hidden, head, held_out.batches) if view is None else view.sums(hidden, head)
        classes = self._config.task != "language-modelling"
        summed = process.sum_over_ranks(sums.to(self._device, copy=True)).cpu()
        return quality(summed, classes=classes, teacher=self._has_teacher)

    def _own_quality(self, source: TargetSources, held_out: _HeldOut, name: str) -> dict[str, Any]:
        """How near the student is to its teacher on text of its own, as a note of that ``name``; nothing without on_policy."""
        if self._own_text is None or not isinstance(held_out.view, View):
            return {}
        (teacher,) = teachers_of(source).values()
        self._phase("measuring the student on text of its own")
        return {name: self._own_text.measure(teacher, held_out.view.teacher.head, self._device)}

    # ---- what stays ----

    def _open_saving(self) -> Saving:
        config, url = self._config, mirror_of(self._config)
        saver = Saver(
            self._student.engine,
            self._directory / "checkpoints",
            self._start,
            rank=self._rank,
            world=self._topology.world,
            keep=config.checkpoint.keep,
            limit_s=config.checkpoint.write_seconds,
        )
        self._saving = Saving(
            saver,
            config.checkpoint,
            self._rank,
            identity=self._setup.identity,
            notes=self._noted,
            small=self._small_files,
            emit=self._emit,
            should_stop=self._should_stop,
            grace_s=config.cluster.grace_seconds,
            mirror=Mirror(url, config.checkpoint.keep, self._start) if url is not None and self._rank == 0 else None,
        )
        return self._saving

    def _small_files(self) -> dict[str, bytes]:
        own = {} if self._own_text is None else self._own_text.files()
        return index_files(self._rank, self._student.partition.describe()) | own

    def _noted(self, totals: Totals) -> dict[str, Any]:
        return self._notes | {"totals": asdict(totals), "dtype": self._dtype_name}

    def settle(self, limit_s: float) -> None:
        """Before the ranks are killed, from any thread: a checkpoint that is being written may become one."""
        if self._saving is not None:
            self._saving.settle(limit_s)
