"""Which ranks of a launched run have started on this host, and how each has ended, in files of the run's temporary directory.

The launcher's exit code doesn't tell: it is 0 when the launcher is killed, whatever becomes of its ranks.
"""

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Signature:
    """One rank's own lines in the roster."""

    path: Path | None
    """None where nobody reads it."""

    def out(self, code: int) -> None:
        """The last act of a rank: the exit code it is going to end with."""
        self._write({"pid": os.getpid(), "code": code})

    def _write(self, fields: dict[str, int]) -> None:
        if self.path is None:
            return
        aside = self.path.with_suffix(".partial")
        # Where the supervisor is gone, another rank may have removed its directory.
        with contextlib.suppress(FileNotFoundError):
            aside.write_text(json.dumps(fields))
            aside.rename(self.path)


def sign_in(directory: str | None) -> Signature:
    """The first act of a rank that the launcher has started. ``directory`` is the supervisor's, none without one."""
    rank = os.environ.get("RANK")
    signature = Signature(Path(directory) / f"rank-{rank}.json" if directory and rank else None)
    signature._write({"pid": os.getpid()})
    return signature


@dataclass
class Attendee:
    rank: int
    pid: int
    code: int | None = None
    """None: it has not said."""
    gone: bool = False


@dataclass
class Roster:
    """The roster as its supervisor reads it, again and again."""

    directory: Path
    ranks: dict[int, Attendee] = field(default_factory=dict)
    _processes: dict[int, psutil.Process] = field(default_factory=dict)

    def look(self) -> None:
        """Take note of who has come and gone since the last look."""
        for path in self.directory.glob("rank-*.json"):
            rank = int(path.stem.removeprefix("rank-"))
            if rank not in self.ranks:
                self.ranks[rank] = Attendee(rank, int(json.loads(path.read_text())["pid"]))
                try:
                    self._processes[rank] = psutil.Process(self.ranks[rank].pid)
                except psutil.NoSuchProcess:
                    continue
        for rank, one in self.ranks.items():
            one.gone = one.gone or not self._lives(rank)
            if one.gone and one.code is None:
                # Read after the end: what stands there now is its last word.
                one.code = json.loads((self.directory / f"rank-{rank}.json").read_text()).get("code")

    def _lives(self, rank: int) -> bool:
        process = self._processes.get(rank)
        try:
            return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    @property
    def alive(self) -> list[Attendee]:
        return [one for one in self.ranks.values() if not one.gone]

    @property
    def silent(self) -> list[Attendee]:
        """Who has died without a word: killed by a signal."""
        return [one for one in self.ranks.values() if one.gone and one.code is None]

    @property
    def failed(self) -> list[Attendee]:
        """Who has ended by an exit code other than 0."""
        return [one for one in self.ranks.values() if one.gone and one.code]
