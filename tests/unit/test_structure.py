"""The layers: imports go down only, heavy libraries stay where they belong, and every option is read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "kdscale"
LAYERS = [
    {"errors"},
    {"spec", "credentials", "durable"},
    {"log", "config", "topology", "node", "roster"},
    {"head", "metrics", "identity", "tunnel", "storage"},
    {"batch"},
    {"paired"},
    {"data", "targets", "losses"},
    {"stream", "engine", "cluster"},
    {"evaluate", "mirror", "on_policy"},
    {"teacher", "student"},
    {"prepare", "supervise", "display", "estimate"},
    {"summary", "start", "record"},
    {"waits"},
    {"serve", "generate"},
    {"driver"},
    {"show", "doctor", "offline", "probe", "worker", "launcher", "compare"},
    {"deploy"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MAY_IMPORT = {
    "deepspeed": {"engine"},
    "ray": {
        "cluster",
        "teacher/replica",
        "teacher/service",
        "teacher/guard",
        "teacher/author",
        "student/worker",
        "student/service",
        "on_policy/service",
        "start",
        "driver",
    },
}
FILES = sorted(ROOT.rglob("*.py"))


def unit(path: Path) -> str:
    """The package or top-level module a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Dotted names imported anywhere in a file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layers"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def wrong_imports(path: Path) -> list[str]:
    here = unit(path)
    wrong = []
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "kdscale" or len(parts) < 2 or parts[1] == here or parts[1] not in LEVEL:
            continue
        if LEVEL[parts[1]] >= LEVEL[here]:
            wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    return wrong


def test_every_unit_has_a_layer():
    units = {unit(path) for path in FILES} - {"__init__"}
    assert units <= LEVEL.keys()


def test_imports_go_down_only():
    assert [line for path in FILES if unit(path) != "__init__" for line in wrong_imports(path)] == []


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_library_stays_in_its_place(library: str):
    allowed = MAY_IMPORT[library]
    users = {
        str(path.relative_to(ROOT).with_suffix(""))
        for path in FILES
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users
    assert {user for user in users if user not in allowed and user.split("/")[0] not in allowed} == set()


def test_config_loads_without_torch():
    code = "import sys, kdscale.config, kdscale.cli; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_driver_starts_without_models():
    """Ranks import transformers' models and DeepSpeed, which a driver does not use and would start a third more slowly with."""
    code = (
        "import sys, kdscale.driver;"
        "sys.exit(any(name in sys.modules for name in ('deepspeed', 'transformers.modeling_utils', 'torch._dynamo')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_option_is_read():
    """An option that nothing reads is a promise nobody keeps."""
    from kdscale.config.schema import RunConfig

    sources = " ".join(path.read_text() for path in FILES if path.name != "schema.py")
    unread = []
    for section, field in RunConfig.model_fields.items():
        annotation = field.annotation
        for name in getattr(annotation, "model_fields", {}):
            if f".{name}" not in sources:
                unread.append(f"{section}.{name}")
    assert unread == []


def test_every_option_is_documented():
    from kdscale.config.schema import RunConfig

    sections = [RunConfig, *(field.annotation for field in RunConfig.model_fields.values())]
    missing = [
        f"{section.__name__}.{name}"
        for section in sections
        if hasattr(section, "model_fields")
        for name, field in section.model_fields.items()
        if section.__name__ != "RunSection" and not field.description
    ]
    assert missing == []


def test_files_stay_readable():
    assert [str(path) for path in FILES if len(path.read_text().splitlines()) > 400] == []
