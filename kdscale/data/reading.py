"""What a task reads, and by what: tokenizer or pixels, corpus, batches."""

from pathlib import Path

from kdscale.config.sections import DataSection
from kdscale.config.teachers import Routing
from kdscale.data.corpus import Corpus, Progress, Split, build_corpus
from kdscale.data.examples import ExampleLoader, Examples, Reader, build_examples
from kdscale.data.images import Pixels
from kdscale.data.loader import Loader
from kdscale.data.tokenizer import load_tokenizer
from kdscale.spec import Task

RunCorpus = Corpus[Split] | Corpus[Examples]
AnyLoader = Loader | ExampleLoader


def load_reader(task: Task, data: DataSection, teacher: Path) -> Reader:
    """By what the run's inputs are read. Raises: ModelError."""
    return Pixels.load(teacher) if task == "image-classification" else load_tokenizer(data.tokenizer or str(teacher))


def read_corpus(
    task: Task,
    data: DataSection,
    reader: Reader,
    classes: tuple[str, ...],
    progress: Progress,
    routing: Routing | None = None,
) -> RunCorpus:
    """What ``data`` names; classifiers read rows with a label of one of ``classes``. Raises: DataError."""
    if task == "language-modelling":
        assert not isinstance(reader, Pixels)
        return build_corpus(data, reader, progress, routing)
    return build_examples(data, reader, classes, progress)


def make_loader(part: Split | Examples, data: DataSection, batch_rows: int, seed: int) -> AnyLoader:
    """Batches of ``batch_rows`` rows. Raises: DataError."""
    if isinstance(part, Examples):
        return ExampleLoader(part, data.row_tokens, batch_rows, seed)
    return Loader(part, data.packing, data.row_tokens, batch_rows, seed)
