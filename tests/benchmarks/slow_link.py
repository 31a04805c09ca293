"""Targets over a slow link, against what `kdscale show` says of them: ``python -m tests.benchmarks.slow_link``. As root.

The tiny job of ``tests/cluster/nodes.py``, whose students get what they are sent at the rate given; tokens per second of the
steps from the tenth on. The payload is ``dense``, of which a token takes so much that nothing else on the link counts.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

from tests.cluster.hosts import missing
from tests.cluster.nodes import Nodes, config_of, three_nodes
from tests.conftest import make_model, make_tokenizer, write_text
from tests.runs import finish, run, wait_for_step


def measure(nodes: Nodes, config: Path, directory: Path, rate: float, log: Path) -> tuple[float, float]:
    """Tokens per second, predicted and measured."""
    assert run("show", str(config), log=log) == 0, log.read_text()
    found = re.search(r"([0-9]+) bytes a token", log.read_text())
    assert found is not None, log.read_text()
    process = nodes.train(config, "--resume", "never", log=log)
    wait_for_step(directory, 1, process, log)
    with nodes.third.slowed_down(rate):
        assert finish(process, log) == 0, log.read_text()
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][10:]
    return rate / int(found[1]), sum(row["num_tokens"] for row in metrics) / sum(row["seconds"] for row in metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[100e3, 200e3, 400e3], help="bytes per second")
    options = parser.parse_args()
    if reason := missing():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory(prefix="kdscale-slow-") as scratch:
        root = Path(scratch)
        teacher, text = root / "teacher", root / "text"
        text.mkdir()
        make_model("llama").save_pretrained(teacher)
        make_tokenizer(teacher)
        write_text(text)
        with three_nodes(root) as nodes:
            for rate in options.rates:
                place = root / f"{rate:.0f}"
                place.mkdir()
                config = config_of(place, teacher, text, nodes, targets={"payload": "dense"}, train={"steps": 30})
                predicted, measured = measure(nodes, config, place / "runs" / "tiny", rate, place / "log")
                print(f"{rate:,.0f}: {predicted:.1f}, {measured:.1f} ({measured / predicted:.2f})", flush=True)


if __name__ == "__main__":
    main()
