"""What a task reads, and by what: tokenizer or pixels, corpus, batches."""

from pathlib import Path

from kdscale.config.alignment import AlignmentSection
from kdscale.config.sections import DataSection
from kdscale.config.teachers import Routing
from kdscale.data.corpus import Corpus, Progress, Split, build_corpus
from kdscale.data.examples import ExampleLoader, Examples, Reader, build_examples
from kdscale.data.images import Pixels
from kdscale.data.loader import Loader
from kdscale.data.pairs import PairLoader, PairSplit, TokenizerPair, build_pairs
from kdscale.data.tokenizer import load_tokenizer
from kdscale.spec import Task

AnyReader = Reader | TokenizerPair
RunCorpus = Corpus[Split] | Corpus[Examples] | Corpus[PairSplit]
AnyLoader = Loader | ExampleLoader


def load_reader(task: Task, data: DataSection, alignment: AlignmentSection, teacher: Path) -> AnyReader:
    """By what the run's inputs are read. Raises: ModelError."""
    if task == "image-classification":
        return Pixels.load(teacher)
    tokenizer = load_tokenizer(data.tokenizer or str(teacher))
    if alignment.method is None:
        return tokenizer
    assert alignment.tokenizer is not None
    return TokenizerPair(load_tokenizer(alignment.tokenizer), tokenizer)


def read_corpus(
    task: Task,
    data: DataSection,
    reader: AnyReader,
    classes: tuple[str, ...],
    progress: Progress,
    routing: Routing | None = None,
    known: str | None = None,
) -> RunCorpus:
    """What ``data`` names; classifiers read rows with a label of one of ``classes``. ``known``: see ``fingerprint_of``. Raises:
    DataError."""
    if isinstance(reader, TokenizerPair):
        return build_pairs(data, reader, progress, known)
    if task == "language-modelling":
        assert not isinstance(reader, Pixels)
        return build_corpus(data, reader, progress, routing, known)
    return build_examples(data, reader, classes, progress, known)


def make_loader(part: Split | Examples | PairSplit, data: DataSection, batch_rows: int, seed: int) -> AnyLoader:
    """Batches of ``batch_rows`` rows. Raises: DataError."""
    if isinstance(part, Examples):
        return ExampleLoader(part, data.row_tokens, batch_rows, seed)
    if isinstance(part, PairSplit):
        return PairLoader(part, data.packing, data.row_tokens, batch_rows, seed)
    return Loader(part, data.packing, data.row_tokens, batch_rows, seed)
