"""What a student rank does with its life, in order. No Ray: the launcher's ranks run the same."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from kdscale import log
from kdscale.batch import TokenBatch
from kdscale.data.corpus import Corpus, build_corpus
from kdscale.data.loader import Loader
from kdscale.data.tokenizer import Tokenizer, load_tokenizer
from kdscale.engine import checkpoint as checkpoints
from kdscale.engine import process
from kdscale.engine.export import export_engine_model
from kdscale.engine.models import build_student
from kdscale.engine.settings import batch_cut, student_dtype, student_settings
from kdscale.engine.sharding import full_numel, gathered
from kdscale.engine.training import Engine, training_engine
from kdscale.errors import ConfigError, ModelError
from kdscale.evaluate.canary import run_canary, served_topk
from kdscale.evaluate.quality import Quality, TeacherView, quality, quality_sums, teacher_view
from kdscale.head import Head
from kdscale.stream.client import FlightSource
from kdscale.stream.protocol import Access
from kdscale.student.module import StudentModule, flatten_batch
from kdscale.student.step import DataParallelStep
from kdscale.student.trainer import Totals, Trainer
from kdscale.student.worker import StudentSetup

_LOG = log.get(__name__)
_HELD_OUT_ROWS = 2
"""Rows of one request for held-out targets."""


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

        model = build_student(config.student, Path(setup.teacher_directory), self._dtype)
        if config.student.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module = StudentModule(
            model,
            setup.meaning.vocab_size,
            int(config.loss.chunk_mib * 2**20),
        )
        settings = student_settings(config, str(self._dtype).removeprefix("torch."))
        self._engine: Engine = training_engine(module, settings)
        self._module = module
        self._parameters = sum(full_numel(parameter) for parameter in module.parameters())
        self._trained = sum(full_numel(one) for one in module.parameters() if one.requires_grad)
        self._start = 0
        self._notes: dict[str, Any] = {}
        if setup.resume_from is not None:
            found = checkpoints.verify(Path(setup.resume_from))
            checkpoints.require_same_identity(found, setup.identity)
            checkpoints.restore(self._engine, found, rank)
            self._start, self._notes = found.step, found.notes

    def facts(self) -> dict[str, Any]:
        return {
            "parameters": self._parameters,
            "parameters_trained": self._trained,
            "dtype": str(self._dtype).removeprefix("torch."),
            "start_step": self._start,
            "rss_bytes": psutil.Process().memory_info().rss,
        }

    def run(self, access: Access) -> dict[str, Any]:
        """Canary, quality before, training, quality after, export. Raises: any KdscaleError."""
        config, source = self._config, self._source(access)
        tokenizer, corpus = self._text()
        cut, packing, columns = batch_cut(config), config.data.packing, config.data.row_tokens
        loader = Loader(corpus.train, packing, columns, cut.rows, config.run.seed)
        trainer = Trainer(
            config,
            loader,
            cut,
            self._rank,
            DataParallelStep(self._engine, self._module.head, cut.micro_steps, cut.data),
            emit=lambda metrics: self._emit({"kind": "step", "metrics": metrics.as_dict()}),
            save=self._save,
            should_stop=self._should_stop,
        )
        report, view = self._check_teacher(loader.batch(0), corpus, source)
        # The teacher works on the first batches while the student is measured.
        prefetcher = trainer.prefetch(self._start, source) if config.loss.soft else None
        try:
            if view is not None and "quality_before" not in self._notes:
                self._phase("measuring the student before training")
                self._notes["quality_before"] = self._quality(view).as_dict()
            self._phase("training")
            totals = Totals(**self._notes["totals"]) if "totals" in self._notes else Totals()
            outcome = trainer.run(self._start, totals, prefetcher)
        finally:
            if prefetcher is not None:
                prefetcher.close()
        report |= {"step": outcome.step, "stopped": outcome.stopped, "totals": asdict(outcome.totals)}
        report["steps_per_epoch"] = loader.steps_per_epoch
        if outcome.stopped:
            return report
        if view is not None:
            self._phase("measuring the student after training")
            report |= {"quality_before": self._notes["quality_before"], "quality_after": self._quality(view).as_dict()}
        self._phase("exporting")
        report["export_max_logit_difference"] = self._export(loader.batch(0).cut(slice(0, 1)), tokenizer.save)
        report["teacher_stats"] = source.teacher_stats()
        report["received"] = {payload: asdict(received) for payload, received in source.received.items()}
        source.close()
        return report

    def evaluate(self, access: Access) -> dict[str, Any]:
        """Canary and quality of the student as it was built, without training. Raises: any KdscaleError."""
        source = self._source(access)
        _, corpus = self._text()
        report, view = self._check_teacher(self._held_out(corpus)[0], corpus, source)
        if view is None:
            raise ConfigError("evaluate.quality = false leaves nothing to evaluate; set it to true")
        self._phase("measuring the student")
        report |= self._quality(view).as_dict()
        source.close()
        return report

    def _source(self, access: Access) -> FlightSource:
        return FlightSource(access, self._setup.meaning, self._config.stream, who=f"student-{self._rank}")

    def _text(self) -> tuple[Tokenizer, Corpus]:
        """Tokenizer and corpus; the driver has tokenized it, so this finds it in the cache."""
        tokenizer = load_tokenizer(self._config.data.tokenizer or self._setup.teacher_directory)
        return tokenizer, build_corpus(self._config.data, tokenizer, lambda done, total, what: None)

    def _check_teacher(
        self, row: TokenBatch, corpus: Corpus, source: FlightSource
    ) -> tuple[dict[str, Any], TeacherView | None]:
        """The canary on ``row``; meanwhile the teacher scores the held-out text."""
        config = self._config
        needs_head = config.loss.soft and config.targets.payload == "hidden"
        head = source.fetch_head() if needs_head or config.evaluate.quality else None
        if needs_head and head is not None:
            self._module.head.teacher_head = head.to(self._device)
        with ThreadPoolExecutor(1) as beside:
            view = None
            if config.evaluate.quality:
                assert head is not None
                view = beside.submit(
                    teacher_view, self._held_out(corpus), source, head, config.stream.in_flight, self._device
                )
            report = {"canary": self._canary(row, source, head)}
            self._phase("scoring held-out text by the teacher")
            return report, None if view is None else view.result()

    def _phase(self, name: str) -> None:
        self._emit({"kind": "phase", "phase": name})

    # ---- checks and measures ----

    def _canary(self, batch: TokenBatch, source: FlightSource, head: Head | None) -> str:
        """Rank 0 compares served and plain targets; the line for the summary."""
        rows = self._config.evaluate.canary_rows
        if self._rank != 0:
            return ""
        if rows == 0:
            return "not checked: evaluate.canary_rows = 0"
        directory = Path(self._setup.teacher_directory)
        gib = sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 2**30
        if gib > self._config.evaluate.canary_max_gib:
            return f"not checked: the teacher's files are {gib:.1f} GiB, above evaluate.canary_max_gib"
        self._phase("checking the served teacher against a plain forward")
        dtype = process.resolve_dtype(self._config.teacher.dtype, self._device)
        vocab_size = self._setup.meaning.vocab_size
        served = served_topk(batch.cut(slice(0, rows)), self._config.target_spec(0), source, head)
        return run_canary(batch.cut(slice(0, rows)), served, str(directory), vocab_size, dtype).line()

    def _held_out(self, corpus: Corpus) -> list[TokenBatch]:
        """This rank's share of the held-out rows; every rank runs the same number of forwards."""
        data = self._config.data
        loader = Loader(corpus.heldout, data.packing, data.row_tokens, 1, self._config.run.seed)
        batches = loader.heldout_batches(data.heldout_tokens, rows_per_batch=_HELD_OUT_ROWS)
        ranks = self._config.student.parallel.data
        share = batches[self._rank :: ranks]
        if len(share) < -(-len(batches) // ranks):
            share.append(_untrained(batches[0]))
        return share

    def _hidden(self, batch: TokenBatch) -> torch.Tensor:
        (hidden,) = self._engine(*flatten_batch(batch, self._device))
        return hidden

    @torch.no_grad()
    def _quality(self, view: TeacherView) -> Quality:
        self._engine.eval()
        hidden = [self._hidden(batch) for batch in view.batches]
        with gathered(self._module.head.parameters()):
            sums = quality_sums(hidden, self._head(), view)
        return quality(process.sum_over_ranks(sums.to(self._device)).cpu())

    def _head(self) -> Head:
        head = self._module.head
        return Head(head.weight, head.bias, self._module.head_spec)

    # ---- what stays ----

    def _save(self, step: int, totals: Totals) -> None:
        self._emit({"kind": "leaving" if self._should_stop() else "phase", "phase": f"saving step {step}"})
        self._notes |= {"totals": asdict(totals), "dtype": str(self._dtype).removeprefix("torch.")}
        path = checkpoints.save(
            self._engine,
            self._directory / "checkpoints",
            step,
            identity=self._setup.identity,
            notes=self._notes,
            rank=self._rank,
            world=self._config.student.parallel.data,
            keep=self._config.checkpoint.keep,
        )
        self._emit({"kind": "checkpoint", "path": str(path), "step": step})

    @torch.no_grad()
    def _export(self, row: TokenBatch, save_tokenizer: Callable[[Path], None]) -> float:
        """Write ``student/`` and load it back plainly; returns how far its logits are from the engine's."""
        directory = self._directory / "student"
        export_engine_model(self._module.model, directory, self._rank, save_tokenizer)
        self._engine.eval()
        hidden = self._hidden(row)
        with gathered(self._module.head.parameters()):
            ours = self._head().logits(hidden).cpu()
        if self._rank != 0:
            return 0.0
        plain = AutoModelForCausalLM.from_pretrained(directory, dtype=self._dtype).eval()
        plain.to(self._device)  # type: ignore[arg-type]
        ids, positions, trained = flatten_batch(row, self._device)
        theirs = plain(input_ids=ids, position_ids=positions, use_cache=False).logits.flatten(0, 1)[trained]
        difference = float((ours - theirs.float().cpu()[:, : ours.shape[1]]).abs().max())
        if not difference <= 1e-3 + 1e-2 * float(ours.abs().max()):
            raise ModelError(f"the exported student's logits differ from the engine's by {difference:.3g}; not usable")
        return difference


def _untrained(batch: TokenBatch) -> TokenBatch:
    """One row that counts for nothing, for a rank that has no rows left."""
    row = batch.cut(slice(0, 1))
    return TokenBatch(row.number, row.ids_RL, row.segments_RL, row.positions_RL, row.predicts_RL & False)
