"""A recording that fills while a student trains, to the moment when the teacher has done its work."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from kdscale.batch import Batch
from kdscale.config.schema import RunConfig
from kdscale.data.reading import AnyLoader, RunCorpus, make_loader
from kdscale.engine import process
from kdscale.evaluate.quality import HIDDEN
from kdscale.spec import TargetSpec
from kdscale.stream.filling import Filling
from kdscale.stream.recording import finish


class Keeping:
    """One rank's part; every rank calls ``after_step``."""

    def __init__(
        self,
        filling: Filling,
        config: RunConfig,
        loader: AnyLoader,
        corpus: RunCorpus,
        rank: int,
        device: torch.device,
        emit: Callable[[dict[str, Any]], None],
    ) -> None:
        self._filling, self._config, self._loader, self._corpus = filling, config, loader, corpus
        self._rank, self._device, self._emit = rank, device, emit
        self._whole = False

    def after_step(self, step: int) -> None:
        """At an epoch's end with nothing missing, make the recording whole and say so. A run that was killed and went on in the
        middle of an epoch may lack some rows; they are asked for in the next one.

        Raises: RecordingError, StreamError.
        """
        if self._whole or not self._ends_epoch(step):
            return
        self._filling.flush()
        process.barrier()
        missing = self._filling.lacks(self._rows()) if self._rank == 0 else 0
        if process.any_rank(missing > 0, self._device):
            if self._rank == 0:
                self._emit(
                    {"kind": "phase", "phase": f"the recording lacks {missing} rows; the next epoch asks for them"}
                )
            return
        self._filling.let_go(self._config.stream.give_up_seconds)
        process.barrier()
        self._whole = True
        if self._rank == 0:
            assert self._config.targets.recording is not None
            finish(Path(self._config.targets.recording))
            self._emit({"kind": "recorded", "phase": "the recording is whole: letting the teacher go"})

    def _ends_epoch(self, step: int) -> bool:
        rows, batch_rows = self._loader.num_rows, self._config.train.batch_rows
        return step * batch_rows // rows > (step - 1) * batch_rows // rows

    def _rows(self) -> Iterator[tuple[Batch, TargetSpec]]:
        """What the recording must hold."""
        config, data = self._config, self._config.data
        spec = config.target_spec(0)
        for number in range(-(-self._loader.num_rows // config.train.batch_rows)):
            yield from ((row.asked, spec) for row in self._loader.batch(number).rows())
        if config.evaluate.quality:
            loader = make_loader(self._corpus.heldout, data, 1, config.run.seed)
            yield from ((row.asked, HIDDEN) for row in loader.heldout_batches(data.heldout_tokens, rows_per_batch=1))
