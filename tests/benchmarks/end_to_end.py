"""Distillation end to end: tokens a second, peak memory of the training process, held-out KL after equal steps.

    bash launch/quickstart.sh --inputs     # once: fetches teacher and text
    bash tests/benchmarks/peers.sh                              # once: TRL and Liger, in an environment of their own
    python -m tests.benchmarks.end_to_end --peers .venv-peers/bin/python --json end_to_end.json

The quickstart's teacher, student and rows; 4 x 256 tokens a step, AdamW at a constant rate, forward KL alone, frozen embedding,
bfloat16 products with float32 master weights, the same batches in the same order. Two threads in all:

- ``live``: kdscale; ``kdscale teacher`` with one thread in processes of its own, the student with the other. A round ends
  when the teacher has refilled the window, so that it has scored as many tokens as were trained on. That refill is part
  of the time, though a run without turns would not wait for it: up to 0.6 s a step here;
- ``ready``: kdscale, targets of the same payload (top-64 + tail) at hand, the student with both threads;
- ``plain`` (the control): one process, plain transformers and autograd over whole logits;
- ``trl``, ``trl-liger``: TRL's GKDTrainer with lmbda 0 and beta 0, without and with Liger's fused loss. It knows no packed
  documents: its rows are read as one text each.
"""

import argparse
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.turns import ROOT, Side, compare, machine, say, serve

CONFIG = "configs/quickstart.yaml"
BLOCK, ROUNDS, RATE = 6, 7, 5e-4
"""Steps of a round, rounds, learning rate."""
STEPS = BLOCK * (ROUNDS + 2)
OVERRIDES = [
    *(f"train.steps={STEPS}", "train.batch_rows=4", "train.micro_rows=4", f"train.lr={RATE}", "train.warmup_steps=0"),
    *("train.schedule=constant", "loss.hard_weight=0", "stream.in_flight=2", "run.name=benchmark"),
]
FROZEN = "embed_tokens"


def batches(work: Path) -> dict[str, np.ndarray]:
    """ids, positions, predicts: [steps, rows, columns]."""
    return dict(np.load(work / "batches.npz"))


def leave(work: Path, name: str, save: Callable[[Path], None]) -> None:
    """What a side leaves: its student, and its peak resident memory before saving it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (work / f"{name}.json").write_text(json.dumps({"peak_memory_bytes": peak}))
    save(work / name)


# ---- kdscale's sides ----


def kdscale(name: str, work: Path) -> None:
    """``live`` and ``ready``; for the benchmark of the overlap also ``student`` (ready, with one thread) and ``fetch`` (which
    leaves the student alone)."""
    from kdscale.batch import SoftTargets, TokenBatch
    from kdscale.config import load_config
    from kdscale.data.loader import Loader
    from kdscale.engine import process
    from kdscale.engine.export import whole_state, write_model
    from kdscale.engine.models import build_student
    from kdscale.engine.settings import batch_cut, student_settings
    from kdscale.engine.training import training_engine
    from kdscale.losses.objective import objective_at
    from kdscale.prepare import corpus_of, prepare
    from kdscale.spec import TargetSpec
    from kdscale.stream.client import FlightSource
    from kdscale.stream.prefetch import Prefetcher
    from kdscale.stream.protocol import Access
    from kdscale.student.module import StudentModule
    from kdscale.student.step import DataParallelStep, MicroBatch

    served, threads = name in ("live", "fetch"), 2 if name == "ready" else 1
    config = load_config(CONFIG, OVERRIDES)
    device = process.Member(0, 1)
    joined = device.join(device.open_store("127.0.0.0/8", None), "127.0.0.0/8", None, 60.0, 60.0, 0)
    process.set_threads(threads, deterministic=False)
    process.set_seed(config.run.seed)
    prepared = prepare(config)
    model = build_student(config.student, prepared.teacher_directory, torch.bfloat16)
    module = StudentModule(model, prepared.meaning.vocab_size, int(config.loss.chunk_mib * 2**20))
    engine = training_engine(module, student_settings(config, "bfloat16"))
    cut = batch_cut(config)
    step = DataParallelStep(engine, module, cut.micro_steps, 1)
    corpus = corpus_of(config, prepared, lambda done, total, what: None)
    loader = Loader(corpus.train, config.data.packing, config.data.row_tokens, cut.rows, config.run.seed)

    class Ready:
        def __init__(self) -> None:
            with (work / "targets.pickle").open("rb") as file:
                self._targets: dict[tuple[int, bytes], SoftTargets] = pickle.load(file)

        def fetch(self, batch: TokenBatch, spec: TargetSpec) -> SoftTargets:
            return self._targets[batch.number, batch.ids_RL.tobytes()]

    def requests() -> Iterator[tuple[TokenBatch, TargetSpec]]:
        for number in range(STEPS):
            for micro in range(cut.micro_steps):
                yield loader.batch(number).cut(cut.rows_of(0, micro)), config.target_spec(number)

    access = Access.load(work / "teacher.json") if served else None
    source = FlightSource(access, prepared.meaning, config.stream, "benchmark") if access else Ready()
    prefetcher = Prefetcher(source, requests(), config.stream.in_flight)
    numbers = iter(range(STEPS))

    def block() -> dict[str, float]:
        for _ in range(BLOCK):
            number = next(numbers)
            if name == "fetch":
                for _ in range(cut.micro_steps):
                    prefetcher.next()
                continue
            fetched = (prefetcher.next() for _ in range(cut.micro_steps))
            micro = (MicroBatch(one.batch, one.targets, one.waited_s) for one in fetched)
            result = step.train(micro, objective_at(config.loss, number, STEPS), loader.batch(number).num_tokens, RATE)
            print(f"{name} step {number + 1} loss {result.loss:.3f} wait {result.wait_seconds:.2f}", file=sys.stderr)
        prefetcher.settle()
        return {}

    serve(block)
    prefetcher.close()
    leave(work, name, lambda path: write_model(model, whole_state(model, 0), path, lambda directory: None, 5 << 30))
    del joined
    os._exit(0)  # DeepSpeed's and Flight's threads have nothing left to do


# ---- the peers' sides: neither imports kdscale ----


def plain(name: str, work: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    teacher = AutoModelForCausalLM.from_pretrained(work / "teacher", dtype=torch.bfloat16).eval()
    student = _peer_student(work)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    data, numbers = batches(work), iter(range(STEPS))

    def block() -> dict[str, float]:
        for _ in range(BLOCK):
            number = next(numbers)
            ids, positions, predicts = (torch.from_numpy(data[key][number]) for key in ("ids", "positions", "predicts"))
            with torch.no_grad():
                theirs = teacher(input_ids=ids.long(), position_ids=positions.long(), use_cache=False).logits[predicts]
            with torch.autocast("cpu", torch.bfloat16):
                ours = student(input_ids=ids.long(), position_ids=positions.long(), use_cache=False).logits[predicts]
            logq, logp = (torch.log_softmax(logits.float(), -1) for logits in (ours, theirs))
            loss = torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="sum") / predicts.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            print(f"{name} step {number + 1} loss {loss.item():.3f}", file=sys.stderr)
        return {}

    serve(block)
    leave(work, name, student.save_pretrained)


def trl(name: str, work: Path) -> None:
    import datasets
    import transformers
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    torch.set_num_threads(2)
    data = batches(work)
    rows, columns = data["ids"].shape[1:]

    # The label at a position is the token there: what the position before predicts.
    labelled = np.concatenate([np.zeros((STEPS, rows, 1), bool), data["predicts"][..., :-1]], axis=-1)
    texts = {"input_ids": data["ids"], "attention_mask": np.ones_like(data["ids"])}
    texts["labels"] = np.where(labelled, data["ids"], -100)
    dataset = datasets.Dataset.from_dict({key: plane.reshape(-1, columns) for key, plane in texts.items()})

    class Turns(transformers.TrainerCallback):
        """Trains a block for each line on stdin, and says how long it took."""

        began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % BLOCK == 0:
                if state.global_step >= BLOCK:
                    sys.stdin.readline()
                self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == BLOCK:
                say(json.dumps({"figures": {}, "transient_bytes": None}))
            elif state.global_step % BLOCK == 0:
                say(str(time.perf_counter() - self.began))

    with tempfile.TemporaryDirectory() as out:
        arguments = GKDConfig(
            output_dir=out,
            per_device_train_batch_size=rows,
            max_steps=STEPS,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            use_cpu=True,
            bf16=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        tokenizer = AutoTokenizer.from_pretrained(work / "teacher")
        trainer = GKDTrainer(
            model=_peer_student(work),
            teacher_model=AutoModelForCausalLM.from_pretrained(work / "teacher", dtype=torch.bfloat16),
            args=arguments,
            train_dataset=dataset,
            data_collator=transformers.default_data_collator,
            processing_class=tokenizer,
            callbacks=[Turns()],
        )
        if name == "trl-liger":
            # What use_liger_kernel sets, without its model kernels, which need a GPU.
            trainer.use_liger_gkd_loss = True
            trainer.liger_jsd_loss = LigerFusedLinearJSDLoss(beta=0.0, ignore_index=-100, compiled=False)
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
        trainer.train()
    leave(work, name, trainer.model.save_pretrained)


def _peer_student(work: Path) -> Any:
    """Float32 master weights, under autocast; the embedding frozen as in the quickstart."""
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(work / "student", dtype=torch.float32).train()
    for parameter_name, parameter in student.named_parameters():
        parameter.requires_grad_(FROZEN not in parameter_name)
    return student


# ---- the benchmark ----


def make_inputs(work: Path) -> dict[str, np.ndarray]:
    """Batches, initial student, targets at hand; returns the held-out rows."""
    from kdscale.batch import SoftTargets
    from kdscale.config import load_config
    from kdscale.data.loader import Loader
    from kdscale.engine import process
    from kdscale.engine.models import base_hidden, build_student, head_of, load_causal_lm
    from kdscale.engine.settings import batch_cut
    from kdscale.head import Head
    from kdscale.prepare import corpus_of, prepare
    from kdscale.targets.payloads import make_targets

    config = load_config(CONFIG, OVERRIDES)
    process.set_seed(config.run.seed)
    prepared, cut = prepare(config), batch_cut(config)
    (work / "teacher").symlink_to(prepared.teacher_directory.absolute())
    build_student(config.student, prepared.teacher_directory, torch.float32).save_pretrained(work / "student")
    corpus = corpus_of(config, prepared, lambda done, total, what: None)
    loader = Loader(corpus.train, config.data.packing, config.data.row_tokens, cut.rows, config.run.seed)
    steps = [loader.batch(number) for number in range(STEPS)]
    planes = {"ids": "ids_RL", "positions": "positions_RL", "predicts": "predicts_RL"}
    np.savez(
        work / "batches.npz", **{key: np.stack([getattr(one, plane) for one in steps]) for key, plane in planes.items()}
    )
    teacher = load_causal_lm(prepared.teacher_directory, torch.bfloat16).eval()
    head = Head(*head_of(teacher, prepared.meaning.vocab_size))
    targets: dict[tuple[int, bytes], SoftTargets] = {}
    with torch.no_grad():
        for number, batch in enumerate(steps):
            for micro in range(cut.micro_steps):
                part = batch.cut(cut.rows_of(0, micro))
                ids, positions = (torch.from_numpy(plane).long() for plane in (part.ids_RL, part.positions_RL))
                hidden = base_hidden(teacher, ids, positions)[torch.from_numpy(part.predicts_RL)]
                labels = torch.from_numpy(part.labels())
                targets[number, part.ids_RL.tobytes()] = make_targets(hidden, head, labels, config.target_spec(number))
    with (work / "targets.pickle").open("wb") as file:
        pickle.dump(targets, file)
    heldout = Loader(corpus.heldout, config.data.packing, config.data.row_tokens, 1, 0).heldout_batches(3584, 2)
    return {key: np.concatenate([getattr(one, plane) for one in heldout]) for key, plane in planes.items()}


@torch.no_grad()
def heldout_kl(work: Path, names: list[str], rows: dict[str, np.ndarray]) -> dict[str, float]:
    """KL(teacher || student) in nats per token over the whole vocabulary, by plain transformers in bfloat16."""
    from transformers import AutoModelForCausalLM

    models = {
        name: AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.bfloat16).eval()
        for name in ("teacher", *names)
    }
    total, count = dict.fromkeys(names, 0.0), 0
    for row in range(len(rows["ids"])):
        ids, positions = (torch.from_numpy(rows[key][row : row + 1]).long() for key in ("ids", "positions"))
        here = torch.from_numpy(rows["predicts"][row])

        def logp(name: str, ids=ids, positions=positions, here=here) -> torch.Tensor:
            logits = models[name](input_ids=ids, position_ids=positions, use_cache=False).logits[0][here]
            return torch.log_softmax(logits.float(), -1)

        theirs = logp("teacher")
        for name in names:
            total[name] += float((theirs.exp() * (theirs - logp(name))).sum())
        count += int(here.sum())
    return {name: value / count for name, value in total.items()}


def served_teacher(work: Path) -> subprocess.Popen[str]:
    """``kdscale teacher`` with one rank and one thread, waited for."""
    overrides = ["teacher.ranks=1", "run.name=benchmark", f"run.dir={work / 'runs'}"]
    command = [
        sys.executable,
        "-m",
        "kdscale.cli",
        "teacher",
        CONFIG,
        *overrides,
        "--write",
        str(work / "teacher.json"),
    ]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL)
    while not (work / "teacher.json").exists():
        if process.poll() is not None:
            raise SystemExit("the teacher did not start")
        time.sleep(0.5)
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of an environment with TRL and Liger")
    parser.add_argument("--only", metavar="SIDE", nargs="+", help="these sides alone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.side:
        {"plain": plain, "trl": trl, "trl-liger": trl}.get(arguments.side, kdscale)(arguments.side, arguments.work)
        return
    with tempfile.TemporaryDirectory(prefix="kdscale-benchmark-") as temporary:
        work = Path(temporary)
        print("preparing batches and targets", file=sys.stderr)
        heldout = make_inputs(work)
        names = arguments.only or ["live", "ready", "plain", *(["trl", "trl-liger"] if arguments.peers else [])]
        python = {"trl": arguments.peers, "trl-liger": arguments.peers}
        sides = [Side(name, [name, "--work", temporary], python=python.get(name, sys.executable)) for name in names]
        teacher = served_teacher(work)
        try:
            compare("tests.benchmarks.end_to_end", sides, ROUNDS)
        finally:
            teacher.send_signal(signal.SIGTERM)
            teacher.wait(timeout=60)
        rows = report(work, sides, heldout)
        if arguments.json:
            arguments.json.write_text(json.dumps({"rows": rows, "machine": machine()}, indent=1) + "\n")


def report(work: Path, sides: list[Side], heldout: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    predicts = batches(work)["predicts"]
    # One block sets a side up, one warms it up with the others.
    tokens = float(predicts[2 * BLOCK :].sum()) / ROUNDS
    rows, kl = [], heldout_kl(work, [side.name for side in sides], heldout)
    for side in sides:
        peak = json.loads((work / f"{side.name}.json").read_text())["peak_memory_bytes"]
        row = side.as_dict() | {"tokens_per_second": tokens / side.median, "peak_memory_bytes": peak}
        row["heldout_kl"] = kl[side.name]
        rows.append(row)
    by_name = {row["name"]: row for row in rows}
    control = by_name.get("trl") or by_name.get("plain") or rows[0]
    for row in rows:
        print(
            f"{row['name']:10} {row['tokens_per_second']:6.0f} tokens/s ±{row['spread']:.0%}"
            f"  {row['tokens_per_second'] / control['tokens_per_second']:.2f}x {control['name']}"
            f"  peak {row['peak_memory_bytes'] / 2**20:5.0f} MiB ({row['peak_memory_bytes'] / control['peak_memory_bytes']:.2f}x)"
            f"  held-out KL {row['heldout_kl']:.3f}"
        )
    return rows


if __name__ == "__main__":
    main()
