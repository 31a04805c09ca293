"""The command line. Heavy imports come after parsing, so that ``--help`` and mistakes answer at once."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from kdscale import __version__, log, supervise
from kdscale.config import RunConfig, load_config
from kdscale.config.anchor import anchored
from kdscale.config.finetune import load_finetune
from kdscale.config.load import dump_resolved, quoted
from kdscale.config.sections import ExportForm, GgufType
from kdscale.config.served import load_recorded, load_served, run_name
from kdscale.config.teachers import require_named
from kdscale.credentials import ACCESS_FILE
from kdscale.errors import ConfigError, KdscaleError

app = typer.Typer(
    name="kdscale",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

tokenizers = typer.Typer(no_args_is_help=True, help="Tokenizers of students that have their own.")
app.add_typer(tokenizers, name="tokenizer")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config, for instance configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="values laid over the config, for instance train.steps=20"),
]
AllowChanged = Annotated[
    str | None,
    typer.Option(
        help="settings (or sections), separated by commas, that may differ from the checkpoint's, for instance"
        " loss.temperature,train.lr"
    ),
]
Resume = Annotated[
    str,
    typer.Option(help="auto: the newest whole checkpoint of the run; never: from zero; or a checkpoint's PATH"),
]
TeacherEndpoints = Annotated[
    Path | None,
    typer.Option(help="access file that `kdscale teacher` wrote; none starts a teacher for this run alone"),
]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """Distil a large language model, served sharded elsewhere on the cluster, into a small one.

    Start with `kdscale doctor`, look at a run with `kdscale show CONFIG`, start it with `kdscale train CONFIG`.
    """
    if version:
        print(__version__)
        raise typer.Exit


@app.command(
    epilog="Examples:  kdscale train configs/quickstart.yaml  |  kdscale train configs/quickstart.yaml run.name=jsd"
    " loss.divergence=jsd  |  kdscale train my.yaml --resume runs/my/checkpoints/step-40"
)
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = "auto",
    allow_changed: AllowChanged = None,
    teacher_endpoints: TeacherEndpoints = None,
) -> None:
    """Train a student from a served teacher. Ctrl-C saves; the same command goes on."""
    _drive("train", load_config(config, [*(overrides or []), *_allowing(allow_changed)]), resume, teacher_endpoints)


@app.command(
    epilog="Examples:  kdscale finetune configs/modes/finetune.yaml  |  kdscale finetune my.yaml"
    " student.model=runs/quickstart/student data.train=[task/*.jsonl]"
)
def finetune(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = "auto",
    allow_changed: AllowChanged = None,
) -> None:
    """Train a model from a directory on task data: `train` with the true labels alone, without a teacher. Ctrl-C saves; the
    same command goes on."""
    _drive("train", load_finetune(config, [*(overrides or []), *_allowing(allow_changed)]), resume, None)


@app.command(
    epilog="Examples:  kdscale teacher configs/quickstart.yaml --write runs/teacher.json  |  kdscale train"
    " configs/quickstart.yaml --teacher-endpoints runs/teacher.json  |  kdscale teacher configs/quickstart.yaml --join"
    " runs/quickstart  |  kdscale teacher configs/modes/several-teachers.yaml --join runs/several-teachers --only code"
)
def teacher(
    config: ConfigFile,
    overrides: Overrides = None,
    write: Annotated[
        Path | None, typer.Option(help="access file to write (token in it, mode 0600; default: runs/teacher.json)")
    ] = None,
    join: Annotated[
        Path | None,
        typer.Option(help="serve a run in progress instead, as further replicas: its directory, or an access file"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="with --join: the name of one of several teachers to add replicas of (default: all)"),
    ] = None,
) -> None:
    """Serve the config's teacher for runs elsewhere, until Ctrl-C."""
    if join is None:
        if only:
            raise ConfigError(f"--only {only[0]} goes with --join: a served directory has all teachers of its config")
        _drive("serve", load_served(config, overrides, "teacher"), str(write or "runs/teacher.json"), None)
    if write is not None:
        raise ConfigError(f"--write {write} does not go with --join, which reads the run's access file; remove it")
    access_file = join / ACCESS_FILE if join.is_dir() else join
    if not access_file.is_file():
        raise ConfigError(f"--join {join}: {access_file} does not exist; a run that serves a teacher keeps it there")
    # Several may join from one machine, and none leaves anything: what a run would keep goes when this ends.
    with tempfile.TemporaryDirectory(prefix="kdscale-join-") as scratch:
        settings = load_served(config, [*(overrides or []), quoted("run.dir", scratch)], "joined")
        require_named(settings, only or [], "--only")
        _drive("join", settings, str(access_file.absolute()), None, only or [])


@app.command(
    epilog="Examples:  kdscale record configs/quickstart.yaml recordings/quickstart  |  kdscale train"
    " configs/quickstart.yaml targets.source=recording targets.recording=recordings/quickstart"
)
def record(
    config: ConfigFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="directory of the recording; one begun earlier goes on")],
    overrides: Overrides = None,
    teacher_endpoints: TeacherEndpoints = None,
) -> None:
    """Score the training text once and keep the targets, so that students train without a teacher. Ctrl-C stops; the same
    command goes on."""
    _drive("record", load_recorded(config, overrides, run_name(out)), str(out), teacher_endpoints)


@app.command(
    epilog="Examples:  kdscale generate configs/quickstart.yaml data/generated.jsonl generate.limit=160  |  kdscale train"
    " configs/modes/generated.yaml"
)
def generate(
    config: ConfigFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="jsonl file to write; one begun earlier goes on")],
    overrides: Overrides = None,
) -> None:
    """Let the teacher write on from the prompts of the training text, for students to learn from. Ctrl-C stops; the same
    command goes on."""
    _drive("generate", load_served(config, overrides, run_name(out)), str(out), None)


@app.command(
    epilog="Examples:  kdscale launch configs/quickstart.yaml --teacher-endpoints runs/teacher.json"
    " student.parallel.data=2  |  kdscale launch my.yaml --teacher-endpoints runs/teacher.json --hostfile hosts --node_rank 1"
    " --master_addr 10.0.0.5"
)
def launch(
    config: ConfigFile,
    teacher_endpoints: Annotated[Path, typer.Option(help="access file that `kdscale teacher` wrote")],
    overrides: Overrides = None,
    resume: Annotated[
        str, typer.Option(help="auto: the newest whole checkpoint of the run; never: from zero; or a checkpoint's PATH")
    ] = "auto",
    allow_changed: AllowChanged = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(
            help="lines HOST slots=RANKS, the same on each host, where this command runs too; none: this host alone"
        ),
    ] = None,
    node_rank: Annotated[int, typer.Option("--node_rank", help="which line of the hostfile this host is, from 0")] = 0,
    master_addr: Annotated[
        str | None, typer.Option("--master_addr", help="the first host's address in stream.network")
    ] = None,
    master_port: Annotated[
        int, typer.Option("--master_port", help="where ranks meet (default: a free one; 29500 with a hostfile)")
    ] = 0,
) -> None:
    """Train under the DeepSpeed launcher, without Ray, from a served teacher. Ctrl-C saves; the same command goes on."""
    from kdscale import launcher

    changes = [*(overrides or []), *_allowing(allow_changed)]
    settings = anchored(load_config(config, changes), Path.cwd())
    _require_served(teacher_endpoints)
    if hostfile is None:
        hosts = launcher.alone(settings, master_port)
    elif master_addr is None:
        raise ConfigError("--hostfile needs --master_addr, the first host's address in stream.network")
    else:
        hosts = launcher.among(settings, hostfile, node_rank, master_addr, master_port or 29500)
    raise typer.Exit(launcher.launch(settings, config, changes, teacher_endpoints, resume, hosts))


@app.command(
    name="eval",
    epilog="Examples:  kdscale eval configs/quickstart.yaml --model runs/quickstart/student  |  kdscale eval"
    " configs/quickstart.yaml --checkpoint runs/quickstart/checkpoints/step-40",
)
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[Path | None, typer.Option(help="model directory to measure")] = None,
    checkpoint: Annotated[
        str, typer.Option(help="auto: the newest of the run; never: the student untrained; or a checkpoint's PATH")
    ] = "auto",
    allow_changed: AllowChanged = None,
    teacher_endpoints: TeacherEndpoints = None,
) -> None:
    """Measure a student on held-out text through the served teacher: KL, top-1 agreement, perplexity."""
    changes = [*(overrides or []), *_allowing(allow_changed)]
    if model is not None:
        if not model.is_dir():
            raise ConfigError(f"--model {model} is not a directory")
        if checkpoint != "auto":
            raise ConfigError(f"--checkpoint {checkpoint} does not go with --model {model}: name the one to measure")
        changes += ["student.init=model", quoted("student.model", str(model))]
        changes += ["student.layers=null", "student.config=null", "student.freeze=[]", "student.lora=null"]
        checkpoint = "never"
    _drive("evaluate", load_config(config, changes), checkpoint, teacher_endpoints)


@app.command(
    epilog="Examples:  kdscale export configs/quickstart.yaml  |  kdscale export runs/quickstart --format gguf --type q8_0  |"
    "  kdscale export runs/quickstart/student --format gguf --out student.gguf  |  kdscale export models/my-model --format int8"
    " --text heldout.jsonl"
)
def export(
    source: Annotated[
        Path, typer.Argument(metavar="CONFIG|RUN|MODEL", help="YAML config, a run's directory, or a model directory")
    ],
    overrides: Overrides = None,
    checkpoint: Annotated[str, typer.Option(help="auto: the newest of the run; or a checkpoint's PATH")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="what to write (default: runs/NAME/student; student-TYPE.gguf or student-int8 beside it)"),
    ] = None,
    form: Annotated[
        ExportForm,
        typer.Option(
            "--format",
            help="hf: a Hugging Face directory; gguf: one file, for llama.cpp and its like; int8: a Hugging Face directory"
            " whose linear layers compute in int8 (needs torchao)",
        ),
    ] = "hf",
    kind: Annotated[
        GgufType | None,
        typer.Option("--type", help="numbers of a GGUF file (default: the model's own); q8_0 takes 8 bits"),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="as data.heldout: text to measure what rounding costs on (default: the run's held-out text)"),
    ] = None,
) -> None:
    """Write a checkpoint's student as a Hugging Face model directory, or it or any model directory as a GGUF file or in int8."""
    if form != "gguf" and kind is not None:
        raise ConfigError(f"--type {kind} is about GGUF files, and --format is {form}; use --format gguf")
    if form == "hf" and text:
        raise ConfigError("--text is about what rounding costs; add --format gguf or int8")
    is_model = (source / "config.json").is_file()
    if is_model and (form == "hf" or overrides or checkpoint != "auto"):
        raise ConfigError(f"{source} is a model directory: all there is to do with it is --format gguf or int8")
    model = source if is_model else load_config(source / "config.yaml" if source.is_dir() else source, overrides)
    from kdscale.deploy import to_gguf, to_int8
    from kdscale.offline import export_checkpoint

    with Console(stderr=True).status("exporting"):
        if form == "gguf":
            print(to_gguf(model, checkpoint, out, kind, text).line())
        elif form == "int8":
            print(to_int8(model, checkpoint, out, text).line())
        elif isinstance(model, RunConfig):
            print(export_checkpoint(model, checkpoint, out))


@app.command(epilog="Examples:  kdscale show configs/quickstart.yaml  |  kdscale show my.yaml teacher.ranks=8")
def show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the resolved config, rank layout, batch arithmetic, memory and bandwidth; starts nothing."""
    from kdscale.show import show as show_config

    show_config(load_config(config, overrides), Console())


@app.command(
    epilog="Examples:  kdscale probe configs/quickstart.yaml  |  kdscale probe my.yaml loss.temperature=2 --max-angle 2"
    " --rate 200000"
)
def probe(
    config: ConfigFile,
    overrides: Overrides = None,
    tokens: Annotated[int, typer.Option(help="positions of the training text to measure on")] = 512,
    max_angle: Annotated[
        float,
        typer.Option(help="degrees by which the student's gradient may turn; the smallest payload within is named"),
    ] = 5.0,
    rate: Annotated[
        float | None, typer.Option(help="the student's tokens per second (default: measured on this machine)")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the figures to this file")] = None,
) -> None:
    """Compare payloads on your own teacher, student and text: bytes, errors of the gradient, speed; recommend one."""
    from kdscale.probe import probe as probe_config

    probe_config(
        load_config(config, overrides),
        tokens=tokens,
        max_angle=max_angle,
        student_rate=rate,
        out=json_file,
        console=Console(),
    )


@app.command(epilog="Examples:  kdscale doctor  |  kdscale doctor configs/quickstart.yaml")
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="config whose needs are checked too")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check this machine: versions, shared memory, cores, memory, GPUs, ports, Ray's token."""
    from kdscale.doctor import report

    if not report(load_config(config, overrides) if config else None, Console()):
        raise typer.Exit(1)


@tokenizers.command(
    name="train",
    epilog="Examples:  kdscale tokenizer train configs/quickstart.yaml models/own.model --size 4096  |  kdscale train my.yaml"
    " alignment.method=gold alignment.tokenizer=models/own.model",
)
def train_tokenizer(
    config: ConfigFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="SentencePiece file to write (NAME.model)")],
    overrides: Overrides = None,
    size: Annotated[int, typer.Option(min=300, help="tokens, 256 for single bytes among them")] = 8192,
) -> None:
    """Make a SentencePiece vocabulary from the config's training text, for `alignment.tokenizer`."""
    if out.suffix != ".model":
        raise ConfigError(f"{out}: a SentencePiece file's name ends in .model; write {out.with_suffix('.model')}")
    settings = load_config(config, overrides)
    from kdscale.data.vocabulary import train_vocabulary

    with Console(stderr=True).status("making a vocabulary"):
        tokens = train_vocabulary(settings.data, out, size)
    print(f"{out}: {tokens} tokens")


def _allowing(names: str | None) -> list[str]:
    """``--allow-changed`` as an override."""
    return [] if names is None else [f"checkpoint.allow_changed=[{names}]"]


def _require_served(access_file: Path) -> None:
    """Raises: ConfigError."""
    if not access_file.is_file():
        raise ConfigError(f"--teacher-endpoints {access_file} does not exist; `kdscale teacher` writes it")


def _drive(
    flow: str, settings: RunConfig, argument: str, teacher_endpoints: Path | None, only: Sequence[str] = ()
) -> NoReturn:
    """Run a flow of the driver under supervision and exit with its code."""
    settings = anchored(settings, Path.cwd())
    if teacher_endpoints is not None:
        _require_served(teacher_endpoints)
    # Not in the run's directory: what another invocation there goes by is not changed, and its config.yaml is written by the
    # driver, once it is clear that this run may go on in it.
    with supervise.owned(Path(settings.run.dir) / settings.run.name / f".{flow}.lock") as run:
        resolved = run.temp / "config.yaml"
        dump_resolved(settings, resolved)
        command = [sys.executable, "-m", "kdscale.driver", flow, str(resolved), argument]
        command += [str(teacher_endpoints or ""), *only]
        code = supervise.supervise(run, command, settings.cluster.grace_seconds)
    raise typer.Exit(code)


def main() -> None:
    """Entry point: a kdscale error becomes one line on stderr and its exit code."""
    log.setup("kdscale")
    try:
        app()
    except KdscaleError as error:
        print(f"kdscale: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
