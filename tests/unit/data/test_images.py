"""Images to bytes and bytes to what a model takes; everything that is no image is named."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdscale.data.images import Pixels
from kdscale.errors import DataError, ModelError

GREY = Pixels(1, 2, 3, 1 / 255, (0.5,), (0.25,))
COLOUR = Pixels(3, 2, 3, 1 / 255, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
RNG = np.random.default_rng(0)


def encoded(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


@pytest.mark.parametrize("pixels", [GREY, COLOUR])
def test_all_ways_of_storing_an_image_are_one(pixels: Pixels):
    image = RNG.integers(0, 256, (2, 3, pixels.channels), dtype=np.uint8)
    plain = image[:, :, 0] if pixels.channels == 1 else image
    png = encoded(plain)
    ways = [plain, plain.tolist(), plain.astype(np.float64), png, {"bytes": png, "path": None}]
    for way in ways:
        found = pixels.read(way, "here")
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found.reshape(pixels.channels, 2, 3), image.transpose(2, 0, 1))


def test_values_are_normalised_by_channel():
    image = RNG.integers(0, 256, (4, COLOUR.size), dtype=np.uint8)
    expected = (image.reshape(4, 3, 2, 3) / 255 - np.reshape(COLOUR.mean, (3, 1, 1))) / np.reshape(
        COLOUR.std, (3, 1, 1)
    )
    np.testing.assert_allclose(COLOUR.values(torch.from_numpy(image)).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([[0, 1, 2]], r"the image is \[1, 3, 1\] .*the teacher reads \[2, 3, 1\]; resize"),
        ([[0, 1, math.nan], [0, 0, 0]], r"1 pixels that are no numbers"),
        ([[0, 1, 256], [0, 0, 0]], r"pixels span 0\.\.256; they must be whole numbers 0 to 255"),
        ([[0, 1, -1], [0, 0, 0]], r"pixels span -1\.\.1"),
        ([[0, 1, 0.5], [0, 0, 0]], r"pixels span 0\.\.1; they must be whole"),
        ([[0, 1], [0, 0, 0]], r"neither encoded bytes nor rows of numbers"),
        ([[0, 1, 10**400], [0, 0, 0]], r"neither encoded bytes nor rows of numbers"),
        ("a path", r"neither encoded bytes nor rows of numbers"),
        ([1, 2, 3], r"1 dimensions"),
        (b"no image", r"cannot be decoded"),
    ],
)
def test_what_is_no_image_of_the_teachers_is_refused(image: object, message: str):
    with pytest.raises(DataError, match=r"^file row 7: .*" + message):
        GREY.read(image, "file row 7")


def test_an_image_too_large_to_decode_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(DataError, match=r"^file row 7: the image cannot be decoded: .*exceeds limit of 4 pixels"):
        GREY.read(encoded(np.zeros((2, 3), np.uint8)), "file row 7")


def write(directory: Path, config: dict, settings: dict | None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if settings is not None:
        (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


def test_settings_are_the_image_processors(tmp_path: Path):
    settings = {"image_mean": [0.1], "image_std": [0.2], "rescale_factor": 0.5, "do_normalize": True}
    own = write(tmp_path / "own", {"image_size": [2, 3], "num_channels": 1}, settings)
    assert Pixels.load(own) == Pixels(1, 2, 3, 0.5, (0.1,), (0.2,))
    plain = write(tmp_path / "plain", {"image_size": 4}, {"do_rescale": False, "do_normalize": False})
    assert Pixels.load(plain) == Pixels(3, 4, 4, 1.0, (0.0,) * 3, (1.0,) * 3)
    without = write(tmp_path / "without", {"image_size": 4, "num_channels": 1}, None)
    assert Pixels.load(without, settings_of=own) == Pixels(1, 4, 4, 0.5, (0.1,), (0.2,))
    with pytest.raises(ModelError, match=r"preprocessor_config\.json cannot be read"):
        Pixels.load(without)
    assert len({Pixels.load(one).fingerprint for one in (own, plain)}) == 2


def test_what_is_saved_is_read_again(tmp_path: Path):
    directory = write(tmp_path, {"image_size": [2, 3], "num_channels": 3}, None)
    COLOUR.save(directory)
    assert Pixels.load(directory) == COLOUR


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({}, {}, "image_size = None"),
        ({"image_size": 4, "num_channels": 1}, {"image_mean": [0.1, 0.2]}, "image_mean has 2 numbers.* 1 channels"),
        ({"image_size": 4, "num_channels": 1}, {"image_std": [0.0]}, r"image_std = \[0.0\].*above 0"),
        ({"image_size": 4}, [], "holds a list where an object should be"),
    ],
)
def test_unusable_settings_are_refused(config: dict, settings: dict, message: str, tmp_path: Path):
    with pytest.raises(ModelError, match=message):
        Pixels.load(write(tmp_path, config, settings))
