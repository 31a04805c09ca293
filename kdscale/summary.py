"""``summary.json``: what a run was, did and reached, in one flat object."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdscale import log
from kdscale.config.schema import RunConfig
from kdscale.data.pairs import TokenizerPair
from kdscale.engine.settings import topology_of
from kdscale.errors import ModelError
from kdscale.evaluate.efficiency import Efficiency, measure
from kdscale.prepare import Prepared
from kdscale.targets.layout import row_bytes

_LOG = log.get(__name__)
_LIMIT_S = 300.0


def measure_models(
    config: RunConfig, teacher: Path, student: Path, report: dict[str, Any], student_facts: dict[str, Any]
) -> dict[str, Efficiency]:
    """Efficiency of both models on this node; a teacher too large for it is left out, and so is a failed measure."""
    if not config.evaluate.efficiency:
        return {}
    todo = {"student": (student, student_facts["dtype"], config.student)}
    size = sum(path.stat().st_size for path in teacher.glob("*.safetensors"))
    if report["teacher_stats"] and size <= config.evaluate.canary_max_gib * 2**30:
        todo["teacher"] = (teacher, report["teacher_stats"][0]["dtype"], config.student)
    measured = {}
    for name, (directory, dtype, section) in todo.items():
        device = "cuda" if section.gpus_per_rank else "cpu"
        try:
            measured[name] = measure(str(directory), dtype, section.cpus_per_rank, device, _LIMIT_S, config.task)
        except ModelError as error:
            _LOG.warning("efficiency of the %s: %s", name, error)
    return measured


def make_summary(
    config: RunConfig,
    prepared: Prepared,
    student_facts: dict[str, Any],
    report: dict[str, Any],
    measured: dict[str, Efficiency],
) -> dict[str, Any]:
    """The summary without ``wall_seconds``. What was not measured is ``None``."""
    totals, teacher_stats = report["totals"], report["teacher_stats"]
    before, after = report.get("quality_before", {}), report.get("quality_after", {})
    real = sum(stats["tokens"] for stats in teacher_stats)
    dummy = sum(stats["dummy_tokens"] for stats in teacher_stats)
    soft = config.loss.soft
    # Targets that were recorded come without a teacher.
    teacher = teacher_stats[0] if teacher_stats else {}
    summary = {
        "name": config.run.name,
        "task": config.task,
        "steps": report["step"],
        "tokens_trained": totals["tokens"],
        "tokens_per_second": totals["tokens"] / totals["seconds"] if totals["seconds"] else None,
        "epochs": report["step"] / report["steps_per_epoch"],
        "teacher_parameters": teacher.get("parameters"),
        "teacher_parameters_per_rank": [stats["parameters_held"] for stats in teacher_stats],
        "teacher_dtype": teacher.get("dtype"),
        "student_parameters": student_facts["parameters"],
        "student_parameters_trained": student_facts["parameters_trained"],
        "student_dtype": student_facts["dtype"],
        # Replicas that serve at the end; the counters of those that have left are gone with them.
        "teacher_replicas": len({stats["replica"] for stats in teacher_stats}),
        "teacher_ranks": len(teacher_stats),
        "student_ranks": topology_of(config.student.parallel).world,
        # A served teacher's count from when it began to serve, like its counters.
        "teacher_restarts": sum(stats["generation"] for stats in teacher_stats if stats["rank"] == 0),
        "teacher_tokens_per_rank": [stats["tokens"] for stats in teacher_stats],
        "teacher_forwards": sum(stats["forwards"] for stats in teacher_stats if stats["rank"] == 0),
        "dummy_token_share": dummy / (real + dummy) if real + dummy else None,
        "teachers": _teachers(config, teacher_stats) if config.teachers.others and teacher_stats else None,
        "payload": config.targets.payload if soft else None,
        "bytes_per_token": _bytes_per_token(config, prepared, report) if soft else None,
        "teacher_wait_share": totals["wait_seconds"] / totals["seconds"] if totals["seconds"] else None,
        "checkpoint_stall_seconds": totals["checkpoint_stall_seconds"],
        "mirror": report["mirror"],
        "hard_weight": config.model_dump()["loss"]["hard_weight"],
        "layer_loss": report["layer_loss"],
        "heldout_tokens": after.get("num_tokens"),
        "kl_before": before.get("kl"),
        "kl_after": after.get("kl"),
        "top1_agreement_before": before.get("top1_agreement"),
        "top1_agreement_after": after.get("top1_agreement"),
        "perplexity_teacher": after.get("perplexity_teacher"),
        "perplexity_before": before.get("perplexity_student"),
        "perplexity_after": after.get("perplexity_student"),
        # Of classifiers.
        "accuracy_teacher": after.get("accuracy_teacher"),
        "accuracy_before": before.get("accuracy_student"),
        "accuracy_after": after.get("accuracy_student"),
        **(_own_text(report) if config.on_policy is not None else {}),
        # Of students with a tokenizer of their own.
        "alignment": config.alignment.method,
        "bits_per_byte_teacher": after.get("bits_per_byte_teacher"),
        "bits_per_byte_before": before.get("bits_per_byte_student"),
        "bits_per_byte_after": after.get("bits_per_byte_student"),
        **_aligned(config, prepared, totals),
        "canary": report["canary"],
        "changes_on_resume": report["changes"],
        "export_max_logit_difference": report["export_max_logit_difference"],
    }
    for name in ("teacher", "student"):
        figures = asdict(measured[name]) if name in measured else {}
        summary[f"{name}_bytes_on_disk"] = figures.get("bytes_on_disk")
        summary[f"{name}_tokens_per_second_forward"] = figures.get("tokens_per_second")
        summary[f"{name}_peak_memory_bytes"] = figures.get("peak_memory_bytes")
    return summary


def _teachers(config: RunConfig, teacher_stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Each of several teachers by name, as of the end."""
    found = {}
    for name in config.named_teachers:
        ranks = [stats for stats in teacher_stats if stats["teacher"] == name]
        found[name] = {
            "parameters": ranks[0]["parameters"],
            "dtype": ranks[0]["dtype"],
            "replicas": len({stats["replica"] for stats in ranks}),
            "ranks": len(ranks),
            "restarts": sum(stats["generation"] for stats in ranks if stats["rank"] == 0),
            "forwards": sum(stats["forwards"] for stats in ranks if stats["rank"] == 0),
            "tokens_per_rank": [stats["tokens"] for stats in ranks],
            "targets": sum(stats["targets"] for stats in ranks),
        }
    return found


def _own_text(report: dict[str, Any]) -> dict[str, Any]:
    """Of on-policy distillation: what the student learned on text of its own, and how near it is to the teacher there."""
    totals = report["totals"]
    before, after = report.get("own_quality_before") or {}, report.get("own_quality_after") or {}
    steps, seconds = totals["rollout_steps"], totals["seconds"]
    return {
        "rollout_steps": steps,
        "rollout_tokens": totals["rollout_tokens"],
        "rollout_staleness_steps": totals["staleness_steps"] / steps if steps else None,
        "rollout_staleness_steps_most": totals["most_staleness_steps"] if steps else None,
        "rollout_wait_share": totals["rollout_wait_seconds"] / seconds if seconds else None,
        "on_policy_tokens": after.get("num_tokens"),
        "on_policy_kl_before": before.get("kl"),
        "on_policy_kl": after.get("kl"),
        "on_policy_reverse_kl_before": before.get("reverse_kl"),
        "on_policy_reverse_kl": after.get("reverse_kl"),
    }


def _aligned(config: RunConfig, prepared: Prepared, totals: dict[str, Any]) -> dict[str, Any]:
    """What of the text and of the vocabularies teacher and student have in common, over all steps."""
    pair = prepared.reader if isinstance(prepared.reader, TokenizerPair) else None
    learned = pair is not None and config.loss.soft and totals["tokens"]
    return {
        "matched_tokens": len(pair.matches) if pair is not None else None,
        "aligned_share": totals["covered_tokens"] / totals["tokens"] if learned else None,
        "unaligned_bytes": totals["unaligned_bytes"] if learned else None,
    }


def _bytes_per_token(config: RunConfig, prepared: Prepared, report: dict[str, Any]) -> float:
    """Of a trained position: as the layout has it, or as received where that depends on the text."""
    spec, meaning = config.target_spec(0), prepared.meaning
    parts = len(config.named_teachers) if config.teachers.weights else 1
    received = report["received"].get(spec.payload)
    if spec.payload == "sampled" and received is not None:
        # A mixture's tokens are counted once for each teacher.
        return parts * received["bytes"] / received["tokens"]
    return parts * row_bytes(spec, meaning.vocab_size, meaning.hidden_size)
