"""How much of the teacher's and the student's work runs at the same time: one core each.

    bash launch/quickstart.sh --inputs     # once: fetches teacher and text
    python -m tests.benchmarks.overlap --json overlap.json

The sides and models of ``end_to_end``, with one thread each: ``live``, the student pulling from the served teacher; ``student``
alone with targets at hand; ``teacher`` alone, asked for the same targets through the same window. A perfect overlap takes
as long as the slower of the two alone (the control).
"""

import argparse
import json
import signal
import tempfile
from pathlib import Path

from tests.benchmarks import end_to_end
from tests.benchmarks.turns import Side, compare, machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kdscale-benchmark-") as temporary:
        work = Path(temporary)
        end_to_end.make_inputs(work)
        sides = [Side(name, [name, "--work", temporary]) for name in ("live", "student", "fetch")]
        teacher = end_to_end.served_teacher(work)
        try:
            compare("tests.benchmarks.end_to_end", sides, end_to_end.ROUNDS)
        finally:
            teacher.send_signal(signal.SIGTERM)
            teacher.wait(timeout=60)
    live, *alone = sides
    slower = max(alone, key=lambda side: side.median)
    for side in sides:
        print(f"{side.name:8} {side.median / end_to_end.BLOCK:6.2f} s a step ±{side.spread:.0%}")
    print(f"live takes {live.median / slower.median:.2f}x the slower of the two alone ({slower.name})")
    if arguments.json:
        result = {"sides": [side.as_dict() for side in sides], "live_of_slower": live.median / slower.median}
        arguments.json.write_text(json.dumps(result | {"machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
