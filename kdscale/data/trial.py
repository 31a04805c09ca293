"""Tokenizer files from outside are read by native code, which a malformed one can crash: a process of its own tries first."""

import resource
import signal
import subprocess
import sys
from pathlib import Path

from kdscale.errors import ModelError

_LIMIT_S = 120.0
_MEMORY_BYTES = 16 << 30
_CRASHED = 3


def require_sound(path: str) -> None:
    """Read the tokenizer files of a local directory, or a SentencePiece ``.model`` file, as the loader would, elsewhere. What
    the libraries refuse in good order is for the loader to report.

    Raises: ModelError when that crashes, hangs, or takes more memory than a tokenizer can need.
    """
    place = Path(path)
    files = [place] if place.suffix == ".model" else [place / "tokenizer.json", *sorted(place.glob("*.model"))]
    for file in filter(Path.is_file, files):
        command = [sys.executable, "-m", "kdscale.data.trial", str(file.absolute())]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            raise ModelError(_refusal(file, f"took longer than {_LIMIT_S:g} s")) from None
        if done.returncode < 0:
            raise ModelError(_refusal(file, f"ended by {signal.Signals(-done.returncode).name}"))
        if done.returncode == _CRASHED:
            raise ModelError(_refusal(file, f"panicked: {done.stderr.strip().splitlines()[-1]}"))


def _refusal(file: Path, what: str) -> str:
    return f"{file} is malformed: the process that tried to read it {what}; take the tokenizer from its source again"


def _read(file: Path) -> None:
    if file.name == "tokenizer.json":
        from tokenizers import Tokenizer

        Tokenizer.from_file(str(file)).encode("One text, to try it.")
    else:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(file.read_bytes())
        processor.EncodeAsIds("One text, to try it.")


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _read(Path(sys.argv[1]))
    except Exception:  # noqa: BLE001 - in good order, whatever it is
        return 0
    except BaseException as error:  # noqa: BLE001 - a panic of the tokenizers library is no Exception
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return _CRASHED
    return 0


if __name__ == "__main__":
    sys.exit(main())
