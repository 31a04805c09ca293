"""A student rank under the DeepSpeed launcher, which learns from a teacher that `kdscale teacher` serves. No Ray of its own.

`kdscale launch` starts and watches the launcher; by hand it is

    deepspeed --num_accelerators 2 --module kdscale.worker --config CONFIG --teacher-endpoints runs/teacher.json \
        student.parallel.data=2
"""

import argparse
import os
import sys
import threading
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from kdscale import log, roster, supervise
from kdscale.config import RunConfig, load_config
from kdscale.config.anchor import anchored
from kdscale.config.load import dump_resolved
from kdscale.config.on_policy import require_none
from kdscale.errors import ConfigError, KdscaleError


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML config, the same on all hosts")
    parser.add_argument(
        "--teacher-endpoints", type=Path, required=True, help="access file that `kdscale teacher` wrote"
    )
    parser.add_argument("--resume", default="auto", help="auto, never, or a checkpoint's path")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values laid over the config")
    return parser.parse_args()


def launched(name: str) -> str:
    """A variable of the launcher. Raises: ConfigError."""
    if name not in os.environ:
        raise ConfigError(f"{name} is not set: start this module with the deepspeed launcher (see --help)")
    return os.environ[name]


def train(config: RunConfig, given: argparse.Namespace) -> int:
    """One rank, from joining the others to the summary (rank 0); returns the exit code. Raises: KdscaleError."""
    from kdscale.display import Display
    from kdscale.driver import write_json
    from kdscale.engine import process
    from kdscale.engine.settings import topology_of
    from kdscale.mirror import find
    from kdscale.prepare import corpus_of, prepare, require_resumable, run_identity
    from kdscale.start import ServedTeacher, stop_on_signals
    from kdscale.student.job import StudentJob
    from kdscale.student.worker import StudentSetup
    from kdscale.summary import make_summary, measure_models
    from kdscale.waits import show

    require_none(config.on_policy)
    began, rank, world = time.monotonic(), int(launched("RANK")), int(launched("WORLD_SIZE"))
    wanted = topology_of(config.student.parallel).world
    if wanted != world:
        raise ConfigError(
            f"the launcher started {world} ranks and student.parallel = {config.student.parallel.model_dump()} needs"
            f" {wanted}; change one of them (deepspeed --num_accelerators N, student.parallel.data=N)"
        )
    stop = threading.Event()
    stop_on_signals(stop)
    supervise.follow_supervisor(config.cluster.grace_seconds)
    display = Display(config.train.steps) if rank == 0 else None

    def emit(event: dict[str, Any]) -> None:
        if display is not None:
            show([event], display)

    prepared = prepare(config)
    access = ServedTeacher(given.teacher_endpoints, config.stream, prepared).access
    # Before the ranks meet: on one host the text may be in the cache, and take long to read on another.
    identity = run_identity(config, prepared)
    identity["corpus"] = corpus_of(config, prepared, lambda done, total, what: None).fingerprint
    if stop.is_set():
        return supervise.INTERRUPTED
    network, limit_s = config.stream.network, config.student.start_seconds
    address = launched("MASTER_ADDR"), int(launched("MASTER_PORT"))
    member = process.Member(rank, world)
    if rank == 0:
        address = member.open_store(network, access.keys, address[1])
    gpus = config.student.gpus_per_rank
    collective_s = config.student.collective_seconds
    device = member.join(address, network, access.keys, limit_s, collective_s, gpus, given.local_rank)
    directory = Path(config.run.dir) / config.run.name
    resume_from = ""
    if rank == 0:
        checkpoint = find(config, given.resume)
        require_resumable(config, checkpoint, identity)
        dump_resolved(config, directory / "config.yaml")
        resume_from = str(checkpoint.directory.absolute()) if checkpoint else ""
    resume_from = process.text_of_ranks(resume_from, device)[0]
    setup = StudentSetup(
        config=config,
        teachers=prepared.teachers,
        identity=identity,
        run_directory=str(directory.absolute()),
        resume_from=resume_from or None,
    )
    job = StudentJob(setup, rank, device, emit=emit, should_stop=stop.is_set)
    report = job.run(access)
    process.barrier()
    if report.get("stopped"):
        if display is not None:
            display.close()
            print(f"kdscale: stopped, saved at step {report['step']}; the same command goes on", file=sys.stderr)
        return supervise.INTERRUPTED
    if display is not None:
        measured = measure_models(config, prepared.teacher_directory, directory / "student", report, job.facts())
        summary = make_summary(config, prepared, job.facts(), report, measured)
        summary |= {"student_restarts": 0, "wall_seconds": time.monotonic() - began}
        write_json(directory / "summary.json", summary)
        display.summary(summary)
    return 0


def main() -> None:
    given = arguments()
    log.setup(f"student {os.environ.get('RANK', '')}")
    signed = roster.sign_in(supervise.temp_dir())
    try:
        config = anchored(load_config(given.config, given.overrides), Path.cwd())
        if config.targets.source != "live":
            raise ConfigError(
                f"targets.source = {config.targets.source}: under the launcher targets are live; use `kdscale train`"
            )
        lock = Path(config.run.dir) / config.run.name / ".train.lock"
        with supervise.only_one(lock) if os.environ.get("RANK") == "0" else nullcontext():
            code = train(config, given)
    except KdscaleError as error:
        print(f"kdscale: {type(error).__name__}: {error}", file=sys.stderr)
        code = error.exit_code
    except Exception:  # noqa: BLE001 - whatever it is (torch's, when another rank is gone), the process must end, see below
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    signed.out(code)
    supervise.tidy()
    # Threads of DeepSpeed and Flight that wait for nothing any more would keep the process.
    os._exit(code)


if __name__ == "__main__":
    main()
