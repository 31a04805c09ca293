"""Text that the teacher writes, for students to learn from (sequence-level distillation: Kim & Rush 2016, arXiv 1606.07947).

OUT.provenance.json    what wrote it: teacher, tokenizer, prompts, sampling; written first
OUT.partial            finished batches so far, a line for each continuation
OUT                    the same, whole
"""

import json
import os
import queue
import secrets
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from kdscale.cluster.security import Authority, needs_tls
from kdscale.config.schema import RunConfig
from kdscale.config.sections import GenerateSection
from kdscale.config.teachers import require_one_teacher
from kdscale.data.corpus import Split
from kdscale.data.images import Pixels
from kdscale.data.pairs import TokenizerPair
from kdscale.data.prompts import PromptStore, prompts_in
from kdscale.data.reading import RunCorpus
from kdscale.data.tokenizer import Tokenizer
from kdscale.durable import sync_directory, write_durably
from kdscale.engine.directories import load_config
from kdscale.errors import ConfigError, DataError, IdentityError
from kdscale.prepare import Prepared, corpus_of, prepare
from kdscale.spec import Continuation, Prompt, Sampling
from kdscale.start import Job, Stopped, place, replica_setup
from kdscale.stream.recording import differences
from kdscale.teacher.author import Author

_POLL_S = 0.25
_CUT = "\N{REPLACEMENT CHARACTER}"
"""What a part of a character decodes to."""


def generate(job: Job, out: Path) -> None:
    """Let the teacher write on from the prompts of the training text, into ``out``; what is there already is kept.

    Raises: KdscaleError, Stopped.
    """
    config = job.config
    if config.task != "language-modelling":
        raise ConfigError(f"task = {config.task}: only language models write; use task: language-modelling")
    require_one_teacher(config, "kdscale generate")
    if config.alignment.method is not None:
        raise ConfigError(
            f"alignment.method = {config.alignment.method}: the teacher writes with its own tokenizer; set alignment.method=null"
            " alignment.tokenizer=null"
        )
    prepared = prepare(config)
    tokenizer, corpus = prepared.reader, corpus_of(config, prepared, job.display.count)
    assert isinstance(corpus.train, Split)
    assert not isinstance(tokenizer, Pixels | TokenizerPair)
    prompts = prompts_of(corpus.train, config.generate, tokenizer)
    _require_room(prompts.longest, config, prepared)
    rows, total = config.generate.batch_rows * config.teacher.ranks, len(prompts) * config.generate.samples
    writing = Writing(out, provenance(config, prepared, corpus), rows, total)
    if writing.whole:
        job.display.close()
        print(f"{out} is whole already")
        return
    with ExitStack() as stack:
        stack.callback(writing.close)
        slots = place(job, stack, student=False)
        credentials = Authority().issue() if needs_tls(config.stream) else None
        sampling = sampling_of(config)
        ((name, groups),) = slots.teachers.items()
        setup = replica_setup(config, prepared, name, secrets.token_hex(32), credentials)
        authors: queue.SimpleQueue[Author] = queue.SimpleQueue()
        for number, group in enumerate(groups):
            author = Author(setup, group, f"replica-{number}", config.generate, sampling, job.stop)
            stack.callback(author.kill)
            authors.put(author)
        job.display.phase("loading the teacher")
        _write_all(job, prompts, tokenizer, authors, len(groups), writing)
    job.display.close()
    print(f"{out}: {writing.lines} of {total} continuations; {writing.left_out} empty ones were left out")


def _write_all(
    job: Job,
    prompts: PromptStore,
    tokenizer: Tokenizer,
    authors: "queue.SimpleQueue[Author]",
    replicas: int,
    writing: "Writing",
) -> None:
    """Every replica has a batch in hand; batches are written in their order. Raises: TeacherError, Stopped."""
    opening, stop = tokenizer.encode(""), tuple(job.config.generate.stop)

    def one(batch: list[Prompt]) -> list[Continuation]:
        author = authors.get()
        try:
            return author.write(batch)
        finally:
            authors.put(author)

    with ThreadPoolExecutor(replicas, thread_name_prefix="author") as pool:
        window: deque[tuple[list[Prompt], Future[list[Continuation]]]] = deque()
        waiting = batches(prompts, job.config.generate.samples, writing.first, writing.rows)
        try:
            while True:
                while len(window) < 2 * replicas and (batch := next(waiting, None)) is not None:
                    window.append((batch, pool.submit(one, batch)))
                if not window:
                    break
                batch, future = window.popleft()
                found = [
                    line(*pair, tokenizer, opening, stop) for pair in zip(batch, _result(future, job), strict=True)
                ]
                writing.add(found)
                job.display.count(batch[-1].number + 1, writing.total, "writing continuation")
        finally:
            job.stop.set()  # whatever ends this ends the batches in hand
            pool.shutdown(wait=False, cancel_futures=True)
    writing.finish()


def _result(future: "Future[list[Continuation]]", job: Job) -> list[Continuation]:
    while True:
        try:
            return future.result(timeout=_POLL_S)
        except NotYet:
            if job.stop.is_set():
                raise Stopped("finished batches are kept") from None


class Writing:
    """The file as it grows, by whole batches."""

    def __init__(self, out: Path, provenance: dict[str, Any], rows: int, total: int) -> None:
        """Raises: IdentityError when something else has written there; DataError when it cannot be written."""
        self._out, self._partial = out, out.with_name(f"{out.name}.partial")
        self.rows, self.total = rows, total
        """Continuations of a batch, and of the whole file."""
        self.whole = out.exists()
        self.first = self.lines = self.left_out = 0
        """Number of the first continuation to write; lines written; empty continuations, of which there are no lines."""
        self._file: Any = None
        about = out.with_name(f"{out.name}.provenance.json")
        try:
            self._begin(about, provenance)
        except OSError as error:
            raise DataError(f"{out} cannot be written: {error}") from error

    def _begin(self, about: Path, provenance: dict[str, Any]) -> None:
        if about.is_file():
            try:
                differ = differences(json.loads(about.read_text()), provenance)
            except ValueError as error:
                raise DataError(f"{about} is damaged ({error}); remove it and what it is about") from error
            if differ:
                raise IdentityError(f"{self._out} is being written from something else: {'; '.join(differ)}")
        elif self.whole or self._partial.exists():
            raise IdentityError(f"{self._out} is there, but not what wrote it ({about}); name another file")
        if self.whole:
            return
        self._out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(about, (json.dumps(provenance, indent=1, sort_keys=True) + "\n").encode())
        self.first, self.lines, size = self._kept()
        self._file = self._partial.open("r+b" if self._partial.exists() else "xb")
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)
        self.left_out = self.first - self.lines
        if self.first > self.total:
            raise DataError(f"{self._partial} holds more than the {self.total} continuations that are asked for")

    def _kept(self) -> tuple[int, int, int]:
        """(number of the first continuation to write, lines before it, their bytes): of the last batch it is not known whether it
        is whole, and it is written again."""
        if not self._partial.exists():
            return 0, 0, 0
        first = before = size = lines = place = 0
        with self._partial.open("rb") as file:
            for one in file:
                if not one.endswith(b"\n"):
                    break
                try:
                    batch = json.loads(one)["number"] // self.rows * self.rows
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{self._partial} is damaged ({error!r}); remove it to write all again") from error
                if batch > first:
                    first, before, size = batch, lines, place
                lines, place = lines + 1, place + len(one)
        return first, before, size

    def add(self, batch: list[dict[str, Any] | None]) -> None:
        """Raises: DataError."""
        found = [one for one in batch if one is not None]
        self.lines, self.left_out = self.lines + len(found), self.left_out + len(batch) - len(found)
        try:
            self._file.write("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"{self._partial} cannot be written: {error}; finished batches stay good") from error

    def finish(self) -> None:
        """The file appears under its name."""
        if not self.lines:
            raise DataError(f"the teacher ended every text at once: nothing to write into {self._out}")
        self.close()
        self._partial.rename(self._out)
        sync_directory(self._out.parent)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


# ---- pure ----


def prompts_of(split: Split, section: GenerateSection, tokenizer: Tokenizer) -> PromptStore:
    """What to write on from. Raises: DataError when the text has none."""
    cut = prompts_in(split, section.prompt_tokens, section.new_tokens, tokenizer.eos_id)
    found = PromptStore(islice(filter(None, (_whole(ids, tokenizer) for ids in cut)), section.limit))
    if not len(found):
        raise DataError("data.train holds no prompt: no token stands before what is trained on")
    return found


def _whole(ids: tuple[int, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Without the parts of a character that is cut at either end: students would read other tokens in their place."""
    text = tokenizer.decode(ids)
    # Where the text itself has that character, it is read as these tokens again.
    if _CUT not in (text[:1], text[-1:]) or tuple(tokenizer.encode(text)[-len(ids) :]) == ids:
        return ids
    while ids and tokenizer.decode(ids).startswith(_CUT):
        ids = ids[1:]
    while ids and tokenizer.decode(ids).endswith(_CUT):
        ids = ids[:-1]
    return ids


def batches(prompts: PromptStore, samples: int, first: int, rows: int) -> Iterator[list[Prompt]]:
    """A prompt for each continuation to write from number ``first`` on, each ``samples`` times, by ``rows``."""
    total = len(prompts) * samples
    for start in range(first, total, rows):
        numbers = range(start, min(start + rows, total))
        yield [Prompt(prompts.ids(number // samples), number) for number in numbers]


def line(
    prompt: Prompt, written: Continuation, tokenizer: Tokenizer, opening: list[int], stop: tuple[str, ...]
) -> dict[str, Any] | None:
    """A document of prompt and completion as ``kdscale train`` reads it; none when nothing was written."""
    text = tokenizer.decode(written.ids)
    if written.finish == "length":
        text = text.rstrip(_CUT)
    places = [place for one in stop if (place := text.find(one)) >= 0]
    if places:
        text = text[: min(places)]
    if not text.strip():
        return None
    ids = prompt.ids
    if opening and list(ids[: len(opening)]) == opening:
        ids = ids[len(opening) :]  # which the tokenizer puts there itself
    return {
        "number": prompt.number,
        "prompt": tokenizer.decode(ids),
        "completion": text,
        "ends": written.finish != "length",
    }


def sampling_of(config: RunConfig) -> Sampling:
    section = config.generate
    return Sampling(
        new_tokens=section.new_tokens,
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        stop=tuple(section.stop),
        seed=config.run.seed,
    )


def provenance(config: RunConfig, prepared: Prepared, corpus: RunCorpus) -> dict[str, Any]:
    """All that the text follows from, but for the rounding of another machine."""
    section, meaning = config.generate, prepared.meaning
    fields = {
        "version": 2,
        "teacher": meaning.teacher,
        "tokenizer": meaning.tokenizer,
        "corpus": corpus.fingerprint,
        "prompts": section.model_dump(include={"prompt_tokens", "samples", "limit"}),
        "rows": [section.batch_rows, config.teacher.ranks],
        "sampling": sampling_of(config).as_dict(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(fields))
    return plain


def _require_room(longest: int, config: RunConfig, prepared: Prepared) -> None:
    """Raises: DataError when prompt and continuation are longer than the teacher can read."""
    most = getattr(load_config(prepared.teacher_directory).get_text_config(), "max_position_embeddings", None)
    new = config.generate.new_tokens
    if most is not None and longest + new > most:
        raise DataError(
            f"a prompt of {longest} tokens and generate.new_tokens = {new} are more than the {most} positions of"
            f" {config.teacher.model}; lower generate.new_tokens, or cut the prompts"
        )
