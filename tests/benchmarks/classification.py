"""Distilled against labels only: whole runs of configs/modes, equal but for what is learned from, over several seeds.

    python -m tests.benchmarks.classification image
    python -m tests.benchmarks.classification sequence --seeds 5

Prints held-out accuracy and KL to the teacher of every run, mean and spread (standard deviation), and of the differences at
equal seeds. `launch/prepare_classifiers.py` makes the inputs.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.runs import assert_nothing_left, run

ARMS: dict[str, dict[str, list[str]]] = {
    "image": {
        "distilled": [],
        "labels only": ["loss.hard_weight=1", "data.train=[data/digits/labelled.parquet]"],
    },
    "sequence": {
        "distilled": [],
        "labels only": ["loss.hard_weight=1", "data.train=[data/topics/labelled.jsonl]"],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="laid over both arms")
    given = parser.parse_args()
    config = f"configs/modes/{given.kind}-classification.yaml"
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS[given.kind]}
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(given.seeds):
            for arm, overrides in ARMS[given.kind].items():
                name, log = f"{arm.replace(' ', '-')}-{seed}", Path(scratch) / "log"
                settings = [f"run.name={name}", f"run.dir={scratch}", f"run.seed={seed}", "evaluate.efficiency=false"]
                code = run("train", config, *settings, *overrides, *given.overrides, log=log)
                assert code == 0, log.read_text()
                found[arm].append(json.loads((Path(scratch) / name / "summary.json").read_text()))
                last = found[arm][-1]
                console.print(f"seed {seed}, {arm}: accuracy {last['accuracy_after']:.3f}, KL {last['kl_after']:.3f}")
    console.print(table(given.kind, found))
    assert_nothing_left()


def table(kind: str, found: dict[str, list[dict[str, float]]]) -> Table:
    teacher = next(iter(found.values()))[0]["accuracy_teacher"]
    made = Table(
        title=f"{kind} classification, {len(found['distilled'])} seeds; the teacher's accuracy is {teacher:.3f}"
    )
    for column in ("", "accuracy", "spread", "agreement", "KL"):
        made.add_column(column, justify="right" if column else "left")
    for arm, runs in found.items():
        accuracy, agreement, kl = (
            [one[name] for one in runs] for name in ("accuracy_after", "top1_agreement_after", "kl_after")
        )
        made.add_row(
            arm, *(f"{one:.3f}" for one in (*spread(accuracy), statistics.mean(agreement), statistics.mean(kl)))
        )
    gains = [ours["accuracy_after"] - theirs["accuracy_after"] for ours, theirs in zip(*found.values(), strict=True)]
    made.add_row("difference", *(f"{one:+.3f}" for one in spread(gains)), "", "")
    return made


def spread(values: list[float]) -> tuple[float, float]:
    """(mean, standard deviation)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
