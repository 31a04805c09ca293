"""Pure rank arithmetic: world = pipeline x data; who reads tokens, who holds the loss."""

from dataclasses import dataclass

from kdscale.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """Student ranks, laid out with the pipeline stage varying slowest (DeepSpeed's order).

    Rank ``r`` is stage ``r // data`` of data-parallel replica ``r % data``.
    """

    pipeline: int
    data: int

    def __post_init__(self) -> None:
        if self.pipeline < 1 or self.data < 1:
            raise ConfigError(f"pipeline = {self.pipeline}, data = {self.data}: both must be at least 1")

    @property
    def world(self) -> int:
        return self.pipeline * self.data

    def stage(self, rank: int) -> int:
        return rank // self.data

    def data_rank(self, rank: int) -> int:
        return rank % self.data

    def reads_tokens(self, rank: int) -> bool:
        return self.stage(rank) == 0

    def holds_loss(self, rank: int) -> bool:
        return self.stage(rank) == self.pipeline - 1


@dataclass(frozen=True)
class BatchCut:
    """How the rows of one optimizer step are dealt out: ``rows = data * micro_steps * micro_rows``.

    Data rank ``d`` takes rows ``[d * rows/data, (d+1) * rows/data)``, in ``micro_steps`` pieces of ``micro_rows``.
    """

    rows: int
    micro_rows: int
    data: int

    def __post_init__(self) -> None:
        if self.rows % (self.micro_rows * self.data):
            raise ConfigError(
                f"train.batch_rows = {self.rows} is not a multiple of train.micro_rows x student.parallel.data"
                f" = {self.micro_rows} x {self.data}; change one of the three"
            )

    @property
    def micro_steps(self) -> int:
        return self.rows // (self.micro_rows * self.data)

    def rows_of(self, data_rank: int, micro_step: int) -> slice:
        start = (data_rank * self.micro_steps + micro_step) * self.micro_rows
        return slice(start, start + self.micro_rows)
