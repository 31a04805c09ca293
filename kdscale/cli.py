"""The command line. Heavy imports come after parsing, so that ``--help`` and mistakes answer at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kdscale import log, supervise
from kdscale.config import RunConfig, load_config
from kdscale.config.load import dump_resolved
from kdscale.errors import KdscaleError

app = typer.Typer(
    name="kdscale",
    help="Distil a large language model, sharded elsewhere on the cluster, into a small one.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config, for instance configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values laid over the config: train.steps=20")
]


@app.command(
    epilog="Examples:\n\n  kdscale train configs/quickstart.yaml\n\n"
    "  kdscale train configs/quickstart.yaml run.name=jsd loss.divergence=jsd\n\n"
    "  kdscale train configs/quickstart.yaml --resume runs/quickstart/checkpoints/step-40"
)
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(help="auto: the newest whole checkpoint of the run; never: from zero; or a checkpoint's PATH"),
    ] = "auto",
) -> None:
    """Train a student from a served teacher; Ctrl-C saves, the same command goes on."""
    settings = load_config(config, overrides)
    directory = Path(settings.run.dir) / settings.run.name
    resolved = directory / "config.yaml"
    dump_resolved(settings, resolved)
    command = [sys.executable, "-m", "kdscale.driver", str(resolved), resume]
    raise typer.Exit(supervise.supervise(command, directory / ".lock", settings.cluster.grace_seconds))


def main() -> None:
    """Entry point: a kdscale error becomes one line on stderr and its exit code."""
    log.setup("kdscale")
    try:
        app()
    except KdscaleError as error:
        Console(stderr=True).print(f"kdscale: {error}", highlight=False, soft_wrap=True, markup=False)
        sys.exit(error.exit_code)


__all__ = ["RunConfig", "app", "main"]

if __name__ == "__main__":
    main()
