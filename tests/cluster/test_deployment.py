"""Scripts, images and manifests, as far as they can be checked without the engines that run them."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import pytest
import yaml

from kdscale.cluster.placement import _fits

ROOT = Path(__file__).parents[2]
BIN = Path(sys.prefix) / "bin"
DOCKERFILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]
KUBERNETES = "1.31"
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("launch/*.sh", "launch/*.bash", "launch/*.sbatch", ".ci/*", "tests/**/*.sh")
    for path in ROOT.glob(pattern)
)


def lint(*command: str) -> None:
    done = subprocess.run(
        [BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_pass_shellcheck():
    assert len(SCRIPTS) > 10
    lint("shellcheck", "--external-sources", *SCRIPTS)


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def started(script: str, *arguments: str, cwd: Path, **changed: str) -> "subprocess.CompletedProcess[str]":
    command, env = ["bash", str(ROOT / script), *arguments], os.environ | changed
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("script", "command", "given"),
    [
        ("launch/quickstart.sh", "train", ["mine.yaml", "train.steps=2"]),
        ("launch/deepspeed.sh", "launch", ["mine.yaml", "--teacher-endpoints", "access.json"]),
    ],
)
def test_files_of_the_caller_s_directory_are_found(tmp_path: Path, script: str, command: str, given: list[str]):
    venv, here = tmp_path / "venv", tmp_path / "here"
    program(venv / "bin/python", "exit 0")
    program(venv / "bin/kdscale", 'echo "$@"')
    content = b"".join((ROOT / one).read_bytes() for one in ("pyproject.toml", "launch/constraints.txt"))
    (venv / ".kdscale-installed").write_text(f"gguf {hashlib.sha256(content).hexdigest()}  -\n")
    here.mkdir()
    files = {one: str(here / one) for one in ("mine.yaml", "access.json")}
    for path in files.values():
        Path(path).touch()
    done = started(script, *given, cwd=here, KDSCALE_VENV=str(venv))
    assert done.stdout.split() == [command, *(files.get(one, one) for one in given)], done.stderr
    done = started(script, "configs/quickstart.yaml", cwd=here, KDSCALE_VENV=str(venv))
    assert done.stdout.split() == [command, "configs/quickstart.yaml"], "or kdscale's own"


def test_an_environment_without_pip_is_made_again(tmp_path: Path):
    program(tmp_path / "venv/bin/python", "exit 1")
    python = program(tmp_path / "python", f'[[ "$1" == -c ]] || {{ echo "$@" >{tmp_path}/asked; exit 3; }}')
    done = started("launch/install.sh", cwd=tmp_path, KDSCALE_VENV=str(tmp_path / "venv"), KDSCALE_PYTHON=str(python))
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "asked").read_text() == f"-m venv {tmp_path}/venv\n"


def test_dockerfiles_pass_hadolint():
    lint("hadolint", *DOCKERFILES)


def ignored(path: str) -> bool:
    """Whether ``.dockerignore``, which lets in what it names after an exclamation mark alone, keeps ``path`` out."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    let_in = [line.removeprefix("!") for line in lines if line.startswith("!")]
    return not any(path == one or path.startswith(f"{one}/") for one in let_in)


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_gets_what_it_copies_and_runs_as_nobody(dockerfile: str):
    text = (ROOT / dockerfile).read_text()
    copied = [
        source
        for words in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
        for source in words.split()[:-1]
        if source != "."
    ]
    assert "launch/install.sh" in copied
    assert [source for source in copied if not (ROOT / source).exists() or ignored(source)] == []
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] not in ("0", "root")
    assert "RUN bash launch/install.sh" in text
    # A base without a tag is another one tomorrow.
    assert re.fullmatch(r"[a-z0-9/.]+:[a-z0-9.-]*\d[a-z0-9.-]*", re.findall(r"^ARG BASE=(.+)$", text, re.MULTILINE)[0])


def test_secrets_and_data_stay_out_of_images():
    assert all(ignored(path) for path in ("docker/token", "runs/quickstart", "models/teacher", ".git/config", "tests"))


def compose(file: str) -> dict[str, Any]:
    """A compose file with its variables at their defaults, checked against the specification. Raises: ValueError."""
    text = (ROOT / file).read_text()
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    text = re.sub(r"\$\{\w+:\?[^}]*\}", "1000", text).replace("$$", "$")
    fields: dict[str, Any] = yaml.safe_load(text)
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(fields))
    return fields


def test_compose_files_are_what_the_specification_says():
    services = compose("docker/compose.yaml")["services"]
    assert compose("docker/compose.gpu.yaml")["services"].keys() == services.keys() == {"head", "teacher", "student"}
    for service in services.values():
        assert service["secrets"] == ["token"]
        assert service["healthcheck"]["test"]
        assert service["cap_drop"] == ["ALL"]
        assert "ports" not in service
    command = services["head"]["command"][-1]
    assert_placed(command, {name: services[name]["environment"]["KDSCALE_LABELS"] for name in ("teacher", "student")})


def assert_placed(command: str, labels: dict[str, str]) -> None:
    """Ranks of a role go to the nodes of that role and to no other; ``labels`` as ``role=teacher``."""
    for role in labels:
        found = re.search(rf"{role}\.nodes=(\{{[^}}]*\}})", command)
        assert found is not None
        selector = yaml.safe_load(found[1])
        fitting = {
            name
            for name, label in labels.items()
            if all(_fits(dict([label.split("=")]), *one) for one in selector.items())
        }
        assert fitting == {role}


def test_kubernetes_manifests_are_what_the_api_takes():
    volume, policy, job = yaml.safe_load_all((ROOT / "launch/kuberay-rayjob.yaml").read_text())
    for manifest in (volume, policy):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    templates = [spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"]]
    templates += [group["template"] for group in groups.values()]
    for number, template in enumerate(templates):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{number}"} | template["metadata"]}
        kubernetes_validate.validate(pod | {"spec": template["spec"]}, KUBERNETES, strict=True)
        assert template["metadata"]["labels"] == policy["spec"]["podSelector"]["matchLabels"]
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        assert all(one["resources"]["requests"] for one in template["spec"]["containers"])
    assert cluster["authOptions"] == {"mode": "token", "secretName": "kdscale-token"}
    assert spec["shutdownAfterJobFinishes"]
    assert min(spec["activeDeadlineSeconds"], spec["ttlSecondsAfterFinished"]) > 0
    assert_placed(spec["entrypoint"], {name: f"role={group['labels']['role']}" for name, group in groups.items()})
    pinned = dict(
        line.split("==") for line in (ROOT / "launch/constraints.txt").read_text().splitlines() if "==" in line
    )
    assert cluster["rayVersion"] == pinned["ray"]
