"""Model directories: found here, at a URL or on the hub, checked before anything reads them, and identified."""

import hashlib
import json
import socket
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from kdscale.errors import IdentityError, ModelError
from kdscale.storage import fetch, is_url, model_cache

_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def resolve_model(name: str) -> Path:
    """The local directory of a model: ``name`` itself, or this node's copy of the one at a URL or of the hub's model of that
    name.

    Raises:
        ModelError: no such directory, and the hub does not give it; or its weights are not in safetensors files of its own.
        StorageError: the URL cannot be read.
    """
    if is_url(name):
        path = fetch(name, model_cache(), _part_of_model)
        weight_files(path)
        return path
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} holds no config.json; give a Hugging Face model directory")
        weight_files(path)
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ModelError(f"{name} is not a directory; give a Hugging Face model directory or a hub name")
    try:
        path = Path(snapshot_download(name, allow_patterns=_MODEL_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"{name} is neither a local directory nor a model the hub gives: {str(error).splitlines()[0]}; check the"
            " name, or download the model and give its directory"
        ) from error
    weight_files(path)
    return path


def weight_files(directory: Path) -> list[str]:
    """Names of the safetensors files that hold a model's weights.

    Raises: ModelError for weights in another format (a pickle runs code when it is read), and for files elsewhere.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{index} is no index of safetensors files: {error!r}; take it from its source again"
            ) from error
    elif (directory / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        others = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(kind))
        found = f"; {', '.join(others[:3])} may be pickles, which run code when they are read" if others else ""
        raise ModelError(
            f"{directory} holds no model.safetensors and no index{found}; convert its weights to safetensors where you trust"
            " them (model.save_pretrained)"
        )
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{index} names {file!r}; weights must be safetensors files in {directory} itself")
    return files


def beside_weights(directory: Path) -> list[Path]:
    """What a model's inputs are read by, and whatever else belongs to it besides config and weights; never a pickle."""
    known = ("config.json", "generation_config.json", "model.safetensors.index.json")
    found = (path for path in directory.iterdir() if path.is_file() and _part_of_model(path.name))
    return sorted(path for path in found if path.name not in known and path.suffix != ".safetensors")


def _part_of_model(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _MODEL_FILES)


def model_here(directory: Path, name: str, digest: str) -> Path:
    """The model ``name``, which another node found in ``directory``, on this node: there too, or fetched.

    Raises:
        ModelError: it is not here, and ``name`` is a path.
        StorageError: its URL cannot be read.
        IdentityError: what is here is another model than that of ``digest``.
    """
    if not (directory / "config.json").is_file():
        if not is_url(name) and Path(name).is_absolute():
            raise ModelError(
                f"node {socket.gethostname()} has no model in {directory}: put it there, or on storage that all nodes with"
                " ranks see, or name it by a URL (file://, s3://, ...), from where each node fetches it"
            )
        directory = resolve_model(name)
    if (found := model_digest(directory)) != digest:
        raise IdentityError(
            f"node {socket.gethostname()}: the model in {directory} is another one ({found}) than the run's {name} ({digest});"
            " put the same files on all nodes"
        )
    return directory


def model_digest(directory: Path) -> str:
    """Identity of a model directory: its config and what its safetensors headers say of names, shapes and places.

    Reading all weights would take minutes for a large teacher; names, shapes and samples stand for them.

    Raises: ModelError for a file that is no safetensors file.
    """
    digest = hashlib.sha256()
    config = json.loads((directory / "config.json").read_text())
    for volatile in ("transformers_version", "_name_or_path", "use_cache"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if 8 + size > path.stat().st_size:
                raise ModelError(
                    f"{path} is no safetensors file: its header would end behind its end; it may be a Git-LFS pointer: git lfs"
                    " pull"
                )
            digest.update(path.name.encode() + file.read(min(size, 100 << 20)))
            # A fine-tuned model has the same header: a sample of the weights tells them apart.
            for place in range(8):
                file.seek(8 + size + (path.stat().st_size - 8 - size) * place // 8)
                digest.update(file.read(4096))
    return digest.hexdigest()[:32]


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype a model's files are in."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def require_unquantised(config: PretrainedConfig, where: Path) -> None:
    """Raises: ModelError for a model whose weights are quantised already."""
    if (scheme := getattr(config, "quantization_config", None)) is not None:
        method = scheme.get("quant_method") if isinstance(scheme, dict) else type(scheme).__name__
        raise ModelError(
            f"{where} is quantised already (quant_method = {getattr(method, 'value', method)}): its weights can be neither"
            " trained nor rounded once more; use the model it was made of"
        )


def require_language_model(config: PretrainedConfig, where: Path) -> None:
    """Raises: ModelError for a classifier, and for a model whose weights are quantised already."""
    require_unquantised(config, where)
    kinds = config.architectures or []
    if kinds and not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        raise ModelError(f"{where} holds a {', '.join(kinds)}, and only causal language models can be written so")


def load_config(directory: str | Path) -> PretrainedConfig:
    """Raises: ModelError for a config transformers does not know (remote code is never run)."""
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise ModelError(f"{directory}/config.json is not usable: {error}") from error
