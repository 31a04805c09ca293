"""How a model reads images: their size, and what its processor makes of bytes. Pixels travel and lie as bytes; each model
normalises them by its own settings.

R = rows, C = channels, H, W = height and width, P = C * H * W.
"""

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdscale.errors import DataError, ModelError

_FILE = "preprocessor_config.json"
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_HALF = 0.5


@dataclass(frozen=True)
class Pixels:
    """Size of a model's images, and ``(byte * scale - mean) / std`` by channel."""

    channels: int
    height: int
    width: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def load(directory: Path, *, settings_of: Path | None = None) -> "Pixels":
        """From ``config.json`` and ``preprocessor_config.json``; where the latter is missing, from that in ``settings_of``.

        Raises:
            ModelError: a file is missing or unusable.
        """
        config = _json(directory / "config.json")
        size, channels = config.get("image_size"), int(config.get("num_channels", 3))
        height, width = size if isinstance(size, list) else (size, size)
        if not isinstance(height, int) or not isinstance(width, int):
            raise ModelError(
                f"{directory}/config.json has image_size = {size!r}; a number, or height and width, is needed"
            )
        place = directory if settings_of is None or (directory / _FILE).is_file() else settings_of
        settings = _json(place / _FILE)
        normalised = settings.get("do_normalize", True)
        mean, std = (
            _by_channel(settings.get(name, _HALF) if normalised else plain, channels, f"{place / _FILE}: {name}")
            for name, plain in (("image_mean", 0.0), ("image_std", 1.0))
        )
        if min(std) <= 0:
            raise ModelError(
                f"{place / _FILE}: image_std = {list(std)}; pixels are divided by it, so it must be above 0"
            )
        scale = float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0
        return Pixels(channels, height, width, scale, mean, std)

    @property
    def size(self) -> int:
        """Bytes of an image, P."""
        return self.channels * self.height * self.width

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides what a model sees of an image."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write the file beside an exported model by which ``AutoImageProcessor`` reads images alike."""
        fields = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.height, "width": self.width},
            "do_rescale": True,
            "rescale_factor": self.scale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        (directory / _FILE).write_text(json.dumps(fields, indent=2) + "\n")

    def values(self, pixels_RP: torch.Tensor) -> torch.Tensor:
        """What the model takes, float32 [R, C, H, W], on the device of ``pixels_RP``."""
        images = pixels_RP.view(-1, self.channels, self.height, self.width).float() * self.scale
        mean, std = (torch.tensor(one, device=images.device).view(1, -1, 1, 1) for one in (self.mean, self.std))
        return (images - mean) / std

    def read(self, image: Any, place: str) -> np.ndarray:
        """The bytes of an image, uint8 [P]: from encoded bytes (``image`` or its field ``bytes``), or from rows of whole
        numbers 0 to 255, [H, W] or [H, W, C].

        Raises:
            DataError: no image, one of another size, or pixels that are no bytes.
        """
        if isinstance(image, dict):
            image = image.get("bytes")
        pixels = _decode(image, _MODES.get(self.channels), place) if isinstance(image, bytes) else _array(image, place)
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if pixels.shape != (self.height, self.width, self.channels):
            raise DataError(
                f"{place}: the image is {list(pixels.shape)} (height, width, channels), the teacher reads"
                f" {[self.height, self.width, self.channels]}; resize the data set"
            )
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)).reshape(-1)


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); an image classifier's directory has it") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} holds a {type(fields).__name__} where an object should be")
    return fields


def _by_channel(value: Any, channels: int, what: str) -> tuple[float, ...]:
    values = tuple(map(float, value)) if isinstance(value, list) else (float(value),) * channels
    if len(values) != channels:
        raise ModelError(f"{what} has {len(values)} numbers, and the model's images {channels} channels")
    return values


def _decode(raw: bytes, mode: str | None, place: str) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DataError(f"{place}: an encoded image needs Pillow; pip install -e '.[images]'") from error
    if mode is None:
        raise DataError(
            f"{place}: encoded images have {' or '.join(map(str, _MODES))} channels, the teacher reads others"
        )
    try:
        with Image.open(io.BytesIO(raw)) as opened:
            return np.asarray(opened.convert(mode))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        raise DataError(f"{place}: the image cannot be decoded: {error}") from error


def _array(image: Any, place: str) -> np.ndarray:
    try:
        pixels = np.asarray(image, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{place}: image is neither encoded bytes nor rows of numbers: {error}") from error
    if pixels.ndim not in (2, 3):
        raise DataError(
            f"{place}: image has {pixels.ndim} dimensions; it must be [height, width] or with channels last"
        )
    if not np.isfinite(pixels).all():
        raise DataError(
            f"{place}: the image has {int((~np.isfinite(pixels)).sum())} pixels that are no numbers (NaN, infinite)"
        )
    if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 255 and (pixels == np.rint(pixels)).all()):
        raise DataError(
            f"{place}: pixels span {pixels.min():g}..{pixels.max():g}; they must be whole numbers 0 to 255, which the model's"
            f" {_FILE} normalises"
        )
    return pixels.astype(np.uint8)
