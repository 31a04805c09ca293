"""Files that are not what their names say."""

from pathlib import Path

import pytest

from kdscale.engine.directories import model_digest
from kdscale.errors import ModelError
from kdscale.estimate import read_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 268435456\n"


@pytest.mark.parametrize("content", [POINTER, b"", b"\x09" + bytes(15)], ids=["pointer", "empty", "cut"])
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    rule = r"model\.safetensors is no safetensors file: .*: git lfs pull"
    with pytest.raises(ModelError, match=rule):
        model_digest(tmp_path)
    with pytest.raises(ModelError, match=rule):
        read_model(str(tmp_path))
