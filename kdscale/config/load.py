"""YAML and dotted overrides to a checked ``RunConfig``; every error names key, value, rule and place."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from kdscale.config.schema import RunConfig
from kdscale.errors import ConfigError


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The config in ``path``, with ``section.key=value`` overrides (values are YAML) laid over it.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest name and its line), bad value, or a combination of
            values that cannot work.
    """
    given = read_fields(path, overrides)
    return checked(given.fields, given)


def quoted(key: str, text: str) -> str:
    """The override that sets ``key`` to ``text`` as it is: YAML would read ``2024`` as a number."""
    return f"{key}={json.dumps(text, ensure_ascii=False)}"


@dataclass(frozen=True)
class Given:
    """What a user wrote, before it is checked."""

    fields: dict[str, Any]
    places: dict[str, str]
    """Where each dotted key stands."""
    path: Path


def read_fields(path: str | Path, overrides: list[str] | None = None) -> Given:
    """The mapping in ``path`` with overrides laid over it. Raises: ConfigError."""
    path = Path(path)
    fields, lines = _read_yaml(path)
    for override in overrides or []:
        key = _apply(fields, override)
        lines[key] = f"override {override!r}"
    return Given(fields, lines, path)


def checked(fields: dict[str, Any], given: Given) -> RunConfig:
    """``fields``, made of what was given, as a config. Raises: ConfigError naming places in what was given."""
    fields = {**fields, "deepspeed": _deepspeed(fields.get("deepspeed"), given.path.parent)}
    try:
        return RunConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_explain(error, given.path, given.places)) from None


def load_resolved(path: Path) -> RunConfig:
    """A config that ``dump_resolved`` wrote."""
    return RunConfig.model_validate(yaml.safe_load(path.read_text()))


def dump_resolved(config: RunConfig, path: Path) -> None:
    """Write every field, defaults included, as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in ``path``, and where each dotted key stands."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    try:
        fields = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if fields is None:
        raise ConfigError(f"{path} is empty; a config has at least data.train and teacher.model")
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds a {type(fields).__name__}; a config is a mapping of sections")
    lines: dict[str, str] = {}
    _note_lines(node, "", path, lines)
    return fields, lines


def _note_lines(node: Any, prefix: str, path: Path, lines: dict[str, str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        if dotted in lines:
            raise ConfigError(f"{path}:{key.start_mark.line + 1}: {dotted} is set twice ({lines[dotted]})")
        lines[dotted] = f"{path}:{key.start_mark.line + 1}"
        _note_lines(value, f"{dotted}.", path, lines)


def _apply(fields: dict[str, Any], override: str) -> str:
    """Lay one override over ``fields``; returns its dotted key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error
    *parents, last = key.split(".")
    here = fields
    for parent in parents:
        inner = here.setdefault(parent, {})
        if inner is None:
            inner = here[parent] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {parent} holds {inner!r}, not a section")
        here = inner
    here[last] = value
    return key


def _deepspeed(value: Any, beside: Path) -> Any:
    """The DeepSpeed config itself, where a path is given; looked for beside the YAML, then in the working directory."""
    if not isinstance(value, str):
        return {} if value is None else value
    for candidate in (beside / value, Path(value)):
        if candidate.is_file():
            try:
                fields = json.loads(candidate.read_text())
            except (OSError, ValueError) as error:
                raise ConfigError(f"deepspeed = {value}: {candidate} is not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise ConfigError(f"deepspeed = {value}: {candidate} holds no JSON object")
            return fields
    raise ConfigError(f"deepspeed = {value}: no such file beside the config ({beside}) or in {Path.cwd()}")


def _explain(error: ValidationError, path: Path, lines: dict[str, str]) -> str:
    messages = []
    for fault in error.errors():
        parts = [str(part) for part in fault["loc"] if not str(part).startswith("<")]
        dotted = ".".join(parts)
        place = next((lines[key] for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in lines), str(path))
        match fault["type"]:
            case "extra_forbidden":
                known = _fields_of(parts[:-1])
                near = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.5)
                parent = ".".join(parts[:-1])
                hint = (
                    f"did you mean {f'{parent}.' if parent else ''}{near[0]}?" if near else f"known: {', '.join(known)}"
                )
                messages.append(f"{place}: unknown key {dotted}; {hint}")
            case "missing":
                messages.append(f"{place}: {dotted} is required")
            case "value_error":
                where = f"{dotted}: " if dotted else ""
                messages.append(f"{place}: {where}{fault['msg'].removeprefix('Value error, ')}")
            case _:
                messages.append(f"{place}: {dotted} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}")
    return "\n".join(messages)


def _fields_of(parts: list[str]) -> list[str]:
    """Field names of the section at ``parts``."""
    model: type[BaseModel] = RunConfig
    for part in parts:
        # The next part of a mapping's key is a name in it, not a field.
        if part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        options = [annotation, *get_args(annotation), *(one for arg in get_args(annotation) for one in get_args(arg))]
        model = next(one for one in options if isinstance(one, type) and issubclass(one, BaseModel))
    return list(model.model_fields)
