import errno
import hashlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdscale.durable import SealedFile, require_space, seal, seal_of, write_durably


def test_hash_of_what_was_written_is_the_hash_of_what_is_read(tmp_path: Path):
    path, state = tmp_path / "x.pt", {"w": torch.arange(3_000_000), "n": 3}
    file = SealedFile(path, seal(7, 1, "x.pt"), lambda: False)
    torch.save(state, file)
    digest = file.close()
    assert digest == seal_of(path, 7, 1, "x.pt")
    assert digest == hashlib.sha256(b"kdscale step 7 rank 1 x.pt\0" + path.read_bytes()).hexdigest()
    assert file.num_bytes == path.stat().st_size
    assert torch.equal(torch.load(path, weights_only=True)["w"], state["w"])
    others = {seal_of(path, 8, 1, "x.pt"), seal_of(path, 7, 0, "x.pt"), seal_of(path, 7, 1, "y.pt")}
    assert digest not in others
    assert len(others) == 3


def test_given_up_is_an_error_of_close(tmp_path: Path):
    asked = iter([False, True])
    file = SealedFile(tmp_path / "x", seal(1, 0, "x"), lambda: next(asked))
    file.write(b"a" * (5 << 20))
    with pytest.raises(InterruptedError, match="given up"):
        file.close()
    assert (tmp_path / "x").stat().st_size == 4 << 20


def test_a_full_disk_leaves_torch_s_writer_in_order(tmp_path: Path):
    """In a process of its own: an exception inside torch's archive writer would end the whole process."""
    code = f"""
import resource, torch, sys
from pathlib import Path
from kdscale.durable import SealedFile, seal
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, {resource.RLIM_INFINITY}))
path = Path(sys.argv[1])
file = SealedFile(path, seal(1, 0, "x"), lambda: False)
torch.save({{n: torch.ones(200_000) for n in range(5)}}, file)
try:
    file.close()
except OSError as error:
    sys.exit(error.errno)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    done = subprocess.run(command, check=False, timeout=60, cwd=Path(__file__).parents[3])
    assert done.returncode == errno.EFBIG


def test_write_durably_replaces_whole_files(tmp_path: Path):
    path = tmp_path / "x"
    write_durably(path, b"one")
    write_durably(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_space_is_asked_for_before(tmp_path: Path):
    require_space(tmp_path, 1)
    with pytest.raises(OSError, match=r"MiB are free, the checkpoint takes 1048576.*set run\.dir"):
        require_space(tmp_path, 1 << 40)
