"""A model directory in a form to deploy, a GGUF file or int8: written aside, loaded again, compared with the model, and only
then given its name."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from kdscale.batch import Batch
from kdscale.compare import Comparison, compare, heldout_rows, require_same, sample_rows, text_rows, view
from kdscale.config.hardware import cpu_sums_int8
from kdscale.config.schema import RunConfig
from kdscale.config.sections import ExportForm, ExportSection, GgufType
from kdscale.data.tokenizer import load_tokenizer
from kdscale.durable import sync_directory, sync_file, write_durably
from kdscale.engine.directories import load_config, require_language_model, stored_dtype
from kdscale.engine.export import put_in_place, require_replaceable, staged
from kdscale.engine.gguf_file import load_gguf, own_type, require_gguf, write_gguf
from kdscale.engine.gguf_tokenizer import require_same_tokens
from kdscale.engine.int8_model import load_int8, require_int8, write_int8
from kdscale.engine.models import load_causal_lm
from kdscale.errors import ConfigError
from kdscale.evaluate.efficiency import forward_rates
from kdscale.offline import export_checkpoint


@dataclass(frozen=True)
class Report(Comparison):
    """What was written, and how it compares with the model it was made of."""

    file: str
    """Or directory."""
    type: str
    bytes: int
    """Of the file, or the directory's safetensors."""
    bytes_before: int
    """Of the model directory's safetensors."""
    tokens_per_second: float | None = None
    """A forward's, here, the rest in the model's own dtype; decides nothing. None: not measured, for transformers runs a GGUF
    file's weights as if they were not rounded."""
    tokens_per_second_before: float | None = None

    def line(self) -> str:
        mib, mib_before = self.bytes / 2**20, self.bytes_before / 2**20
        speed = ""
        if self.tokens_per_second is not None:
            speed = f", forward {self.tokens_per_second:.0f} tokens/s ({self.tokens_per_second_before:.0f} before)"
        return (
            f"{self.file}: {mib:.0f} MiB as {self.type} ({mib_before:.0f} before); against the model as it was, on"
            f" {self.num_tokens} tokens: KL {self.kl:.2e} nats/token, top-1 agreement {self.top1_agreement:.4f}, perplexity"
            f" {self.perplexity:.3f} ({self.perplexity_before:.3f} before){speed}"
        )


def to_gguf(
    source: RunConfig | Path, checkpoint: str, out: Path | None, kind: GgufType | None, text: list[str] | None
) -> Report:
    """The student of a run's ``checkpoint``, or a model directory, as a GGUF file (see ``export_gguf``).

    It is measured on ``text``, or else on the run's held-out text. The default place is ``student-TYPE.gguf`` in the run's
    directory, or ``MODEL-TYPE.gguf`` beside the model's.

    Raises:
        KdscaleError: what reading checkpoint, model and text, or writing the file raises.
    """
    place = _place(source)
    if out is not None:
        # Before a run's student is built.
        _require_places(out, "gguf")
    with _model_of(source, checkpoint, text) as (directory, rows):
        kind = kind or own_type(load_config(directory))
        return export_gguf(directory, out or place.with_name(f"{place.name}-{kind}.gguf"), kind, rows)


def to_int8(source: RunConfig | Path, checkpoint: str, out: Path | None, text: list[str] | None) -> Report:
    """The student of a run's ``checkpoint``, or a model directory, as a directory that computes in int8 (see
    ``export_int8``), measured like a GGUF file. The default place is ``student-int8`` in the run's directory, or
    ``MODEL-int8`` beside the model's.

    Raises:
        KdscaleError: what reading checkpoint, model and text, or writing the directory raises.
    """
    export = ExportSection() if isinstance(source, Path) else source.export
    place = _place(source)
    out = out or place.with_name(f"{place.name}-int8")
    _require_places(out, "int8")
    with _model_of(source, checkpoint, text) as (directory, rows):
        return export_int8(directory, out, rows, export.shard_bytes)


def export_gguf(directory: Path, out: Path, kind: GgufType, batches: list[Batch] | None) -> Report:
    """Write the model in ``directory`` as the file ``out``, with a report of the comparison on ``batches`` beside it.

    Without ``batches`` a line of text has to do, which tells whether the file is the model, but not what rounding costs.

    Raises:
        ModelError: a family, tokenizer or setting that GGUF cannot carry; or what was written is not the model.
        ConfigError: a ``kind`` that rounds, and nothing to measure it on; or ``out`` is something else than a GGUF file.
    """
    fields = load_config(directory)
    require_language_model(fields, directory)
    require_gguf(fields, directory)
    _require_places(out, "gguf")
    lossless = kind in ("f32", own_type(fields))
    if batches is None and not lossless:
        raise _unmeasured(f"--type {kind}")
    vocab_size = load_tokenizer(str(directory)).vocab_size
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    batches = batches or sample_rows(directory)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.stem}.partial.gguf")
    try:
        model = load_causal_lm(directory, stored_dtype(fields))
        write_gguf(model, tokenizer, staging, kind, directory.absolute().name)
        require_same_tokens(tokenizer, AutoTokenizer.from_pretrained(staging.parent, gguf_file=staging.name))
        before = view(model.float(), vocab_size, batches)
        # Large models lie in memory one at a time.
        del model
        found = compare(load_gguf(staging, torch.float32), before)
        require_same(found, str(out), lossless=lossless, way_out="Use --type f16 or bf16")
        report = Report(
            **asdict(found),
            file=str(out),
            type=kind,
            bytes=staging.stat().st_size,
            bytes_before=_weight_bytes(directory),
        )
        sync_file(staging)
        staging.rename(out)
        sync_directory(out.parent)
    finally:
        staging.unlink(missing_ok=True)
    _write_report(report, out)
    return report


def export_int8(directory: Path, out: Path, batches: list[Batch] | None, shard_bytes: int) -> Report:
    """Write the model in ``directory`` with int8 linear layers as the directory ``out`` (see ``write_int8``), with a report of
    the comparison on ``batches`` beside it.

    Raises:
        ModelError: a family that is not supported, or quantised already; or what was written is not the model.
        ConfigError: torchao or VNNI is missing, there is nothing to measure on, or ``out`` is something else than an int8
            export.
    """
    fields = load_config(directory)
    require_language_model(fields, directory)
    require_int8(fields, directory)
    if batches is None:
        raise _unmeasured("--format int8")
    _require_places(out, "int8")
    if not cpu_sums_int8():
        raise ConfigError(
            "--format int8: sums of int8 products overflow on this processor, which has no VNNI, so that what is written could"
            " not be compared with the model; export on one that has it, or use --format gguf --type q8_0"
        )
    vocab_size = load_tokenizer(str(directory)).vocab_size
    own = stored_dtype(fields)
    staging = staged(out, "int8")
    try:
        model = load_causal_lm(directory, own)
        before = view(model.float(), vocab_size, batches)
        # Large models lie in memory one at a time.
        del model
        write_int8(directory, staging, shard_bytes)
        found = compare(load_int8(staging, torch.float32), before)
        way_out = (
            "Keep it as it is (--format hf), or try --format gguf --type q8_0, which has a scale for every 32 weights"
        )
        require_same(found, str(out), lossless=False, way_out=way_out)
        # Both at once: half more memory than a bfloat16 model takes, a quarter more than a float32 one.
        both = [load_causal_lm(directory, own), load_int8(staging, own)]
        rate_before, rate = forward_rates([model.eval() for model in both], "language-modelling")
        del both
        report = Report(
            **asdict(found),
            file=str(out),
            type="int8",
            bytes=_weight_bytes(staging),
            bytes_before=_weight_bytes(directory),
            tokens_per_second=rate,
            tokens_per_second_before=rate_before,
        )
        for path in staging.iterdir():
            sync_file(path)
        put_in_place(staging, out)
        sync_directory(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _write_report(report, out)
    return report


def _place(source: RunConfig | Path) -> Path:
    """What default names of exports begin with."""
    return source.absolute() if isinstance(source, Path) else Path(source.run.dir) / source.run.name / "student"


@contextmanager
def _model_of(
    source: RunConfig | Path, checkpoint: str, text: list[str] | None
) -> Iterator[tuple[Path, list[Batch] | None]]:
    """(model directory, what it is measured on). A run's is gone afterwards."""
    if isinstance(source, Path):
        directory = source.absolute()
        yield directory, text_rows(text, directory) if text else None
        return
    if source.task != "language-modelling":
        raise ConfigError(
            f"task = {source.task}: a GGUF file is a language model, and so is what is written as int8; neither has a place for a"
            " classifier's head. Use --format hf"
        )
    run = Path(source.run.dir) / source.run.name
    # A run that is not there is missed by name below.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=run if run.is_dir() else None) as scratch:
        directory = export_checkpoint(source, checkpoint, Path(scratch) / source.run.name)
        require_language_model(load_config(directory), directory)
        yield directory, text_rows(text, directory) if text else heldout_rows(source)


def _unmeasured(what: str) -> ConfigError:
    return ConfigError(f"{what} rounds the weights; name text to measure what that costs on with --text FILE")


def _require_places(out: Path, form: ExportForm) -> None:
    """Whether an export may be written to ``out``, and its report beside it. Raises: ConfigError."""
    require_replaceable(out, form)
    report = _report_of(out)
    if report.exists() and not _is_report(report):
        raise ConfigError(
            f"--out {out}: its report would replace {report}, which is none; name another one, or move it away"
        )


def _report_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def _is_report(path: Path) -> bool:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"file", "type", "kl"} <= found.keys()


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _write_report(report: Report, out: Path) -> None:
    write_durably(_report_of(out), (json.dumps(asdict(report), indent=1) + "\n").encode())
