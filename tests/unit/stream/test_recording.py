"""Recordings of a real tiny teacher's answers."""

import gc
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdscale.batch import HiddenTargets, TokenBatch
from kdscale.errors import CoverageError, IdentityError, PayloadError, RecordingError
from kdscale.spec import TargetSpec
from kdscale.stream.recording import (
    Provenance,
    Recording,
    RecordingWriter,
    begin,
    finish,
    row_key,
    save_head,
)
from kdscale.stream.whole import is_whole
from kdscale.targets.layout import VERSION
from tests.served import Teacher, batch

TOPK = TargetSpec("topk", k=7, temperature=2.0)
HIDDEN = TargetSpec("hidden", encoding="bfloat16")
ROWS = 6


def provenance(teacher: Teacher) -> Provenance:
    return Provenance(teacher.meaning, corpus="text", rows="isolated 24", targets=TOPK)


def record(teacher: Teacher, directory: Path, rows: TokenBatch, *, stop_after: int | None = None) -> None:
    """Record what is missing, two rows a shard; killed after ``stop_after`` rows."""
    source, asked = teacher.source(), provenance(teacher)
    begin(directory, asked)
    done = Recording(directory, asked)
    row_bytes = 24 * 40
    writer = RecordingWriter(directory, "train", TOPK, teacher.meaning, 24, shard_bytes=2 * row_bytes)
    for number, row in enumerate(rows.rows()):
        if stop_after is not None and number >= stop_after:
            return
        if ("train", row) not in done:
            writer.add(row_key(row), source.fetch_batches(row, TOPK))
    writer.flush()
    finish(directory)


def test_recorded_targets_are_the_served_ones(teacher: Teacher, tmp_path: Path):
    rows = batch(rows=ROWS)
    record(teacher, tmp_path / "out", rows)
    recording = Recording(tmp_path / "out", provenance(teacher))
    assert is_whole(tmp_path / "out")
    assert len(recording) == ROWS
    # Another order, number and cut than it was recorded in.
    shuffled = replace(
        rows, number=7, **{name: one[::-1].copy() for name, one in vars(rows).items() if isinstance(one, np.ndarray)}
    )
    found, served = recording.fetch(shuffled, TOPK), teacher.source().fetch(shuffled, TOPK)
    for ours, theirs in zip(found.tensors(), served.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.labels_T, torch.from_numpy(shuffled.labels()))


def test_rows_are_looked_up_while_shards_are_taken_in(teacher: Teacher, tmp_path: Path):
    """As requests in flight do while their rank reads what others have recorded."""
    rows = batch(rows=ROWS)
    record(teacher, tmp_path, rows)
    seen: list[Recording] = []
    over = threading.Event()

    class Seen(Recording):
        def refresh(self) -> None:
            seen.append(self)
            super().refresh()

    def look() -> int:
        looked = 0
        while not over.is_set():
            looked += sum(seen[-1].holds(row, TOPK) for row in one_by_one) if seen else 0
        return looked

    one_by_one, before = rows.rows(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as beside:
            looking = beside.submit(look)
            for _ in range(50):
                assert len(Seen(tmp_path, provenance(teacher))) == ROWS
            over.set()
            assert looking.result() > 0
    finally:
        over.set()
        sys.setswitchinterval(before)


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_recording_goes_on_after_a_kill_and_ends_the_same(teacher: Teacher, tmp_path: Path, stop_after: int):
    rows, whole, halves = batch(rows=ROWS), tmp_path / "whole", tmp_path / "halves"
    record(teacher, whole, rows)
    record(teacher, halves, rows, stop_after=stop_after)
    before = Recording(halves, provenance(teacher))
    assert not is_whole(halves)
    assert len(before) == stop_after // 2 * 2, "what stood in an unfinished shard is not counted"
    record(teacher, halves, rows)
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert {path.name: path.read_bytes() for path in halves.iterdir() if not path.name.startswith(".")} == files
    assert len(files) == ROWS // 2 + 2


def test_held_out_rows_and_the_head_make_the_distribution(teacher: Teacher, tmp_path: Path):
    rows, asked, source = batch(rows=2), provenance(teacher), teacher.source()
    begin(tmp_path, asked)
    writer = RecordingWriter(tmp_path, "heldout", HIDDEN, teacher.meaning, 24)
    for row in rows.rows():
        writer.add(row_key(row), source.fetch_batches(row, HIDDEN))
    writer.flush()
    save_head(tmp_path, source.fetch_head())
    recording = Recording(tmp_path, asked)
    hidden = recording.fetch(rows, HIDDEN)
    assert isinstance(hidden, HiddenTargets)
    head, served = recording.fetch_head(), source.fetch_head()
    assert head.spec == served.spec
    assert torch.equal(head.weight_VD, served.weight_VD)
    with pytest.raises(CoverageError, match="as topk; go on recording"):
        recording.fetch(rows, TOPK)


def test_another_meaning_is_refused_with_every_difference(teacher: Teacher, tmp_path: Path):
    record(teacher, tmp_path, batch(rows=1))
    asked = provenance(teacher)
    other = replace(
        asked,
        meaning=replace(asked.meaning, teacher="another"),
        corpus="other text",
        targets=replace(TOPK, temperature=1.0),
    )
    for refuse in (lambda: Recording(tmp_path, other), lambda: begin(tmp_path, other)):
        with pytest.raises(IdentityError, match=r"corpus: recorded 'text', now 'other text'") as caught:
            refuse()
        assert "meaning.teacher" in str(caught.value)
        assert "targets.temperature: recorded 2.0, now 1.0" in str(caught.value)
    with pytest.raises(RecordingError, match="is no recording"):
        Recording(tmp_path / "none", asked)


def test_a_recording_of_another_layout_is_refused(teacher: Teacher, tmp_path: Path):
    """Its rows could not be read, and would count as recorded."""
    record(teacher, tmp_path, batch(rows=ROWS))
    path = tmp_path / "PROVENANCE.json"
    path.write_text(path.read_text().replace(f'"layout": {VERSION}', f'"layout": {VERSION - 1}'))
    with pytest.raises(IdentityError, match=f"layout: recorded {VERSION - 1}, now {VERSION}"):
        begin(tmp_path, provenance(teacher))


def test_rows_that_are_missing_or_damaged_are_named(teacher: Teacher, tmp_path: Path):
    rows = batch(rows=ROWS)
    record(teacher, tmp_path, rows.cut(slice(0, 2)))
    recording = Recording(tmp_path, provenance(teacher))
    with pytest.raises(CoverageError, match="holds 2 rows, and not row"):
        recording.fetch(rows, TOPK)
    (shard,) = tmp_path.glob("train-*.arrow")
    raw = np.frombuffer(shard.read_bytes(), np.uint8).copy()
    served = teacher.source().fetch_batches(rows.cut(slice(0, 1)), TOPK)[0]
    value = served.column("value").buffers()[1].to_pybytes()[:64]
    place = raw.tobytes().find(value)
    assert place > 0
    raw[place] ^= 1
    shard.write_bytes(raw.tobytes())
    with pytest.raises(PayloadError, match="does not agree with its checksum"):
        Recording(tmp_path, provenance(teacher)).fetch(rows.cut(slice(0, 1)), TOPK)
    shard.write_bytes(raw.tobytes()[:-40])
    with pytest.raises(RecordingError, match="is damaged"):
        Recording(tmp_path, provenance(teacher))


def test_every_file_is_named_with_its_hash(teacher: Teacher, tmp_path: Path):
    record(teacher, tmp_path, batch(rows=3))
    named = json.loads((tmp_path / "MANIFEST.json").read_text())["sha256"]
    assert set(named) == {"train-00000.arrow", "train-00001.arrow"}
    assert all(len(one) == 64 for one in named.values())


def test_what_cannot_be_written_is_typed(teacher: Teacher, tmp_path: Path):
    """The directory is gone when a row, the end of a shard, the head and the manifest are to be written."""
    (row,), asked = batch(rows=1).rows(), provenance(teacher)
    answer = teacher.source().fetch_batches(row, TOPK)
    gone, moved = tmp_path / "out", tmp_path / "moved"
    begin(gone, asked)
    writer = RecordingWriter(gone, "train", TOPK, teacher.meaning, 24)
    writer.add(row_key(row), answer)
    gone.rename(moved)
    late = RecordingWriter(gone, "train", TOPK, teacher.meaning, 24)
    for write in (
        writer.flush,
        lambda: late.add(row_key(row), answer),
        lambda: save_head(gone, teacher.source().fetch_head()),
        lambda: finish(gone),
    ):
        with pytest.raises(RecordingError, match=r"cannot be written: .* finished shards stay good"):
            write()


def test_few_shards_are_open_at_a_time(teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A large recording has more than a process may have files open."""
    rows = batch(rows=ROWS)
    record(teacher, tmp_path, rows)
    monkeypatch.setattr("kdscale.stream.recording._OPEN_SHARDS", 2)
    recording = Recording(tmp_path, provenance(teacher))
    assert torch.equal(recording.fetch(rows, TOPK).labels_T, torch.from_numpy(rows.labels()))
    gc.collect()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line}
    assert 1 <= len(mapped) <= 2 < len([*tmp_path.glob("train-*.arrow")])
    for shard in mapped:
        Path(shard).unlink()
    recording.close()
    with pytest.raises(RecordingError, match="cannot be read any more"):
        recording.fetch(rows, TOPK)
