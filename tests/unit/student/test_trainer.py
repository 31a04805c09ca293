"""What a rank asks for of the batches it trains on."""

from typing import Any

from kdscale.config.schema import RunConfig
from kdscale.data.loader import Loader
from kdscale.student.trainer import Trainer
from kdscale.topology import BatchCut, Topology
from tests.unit.data.test_loader import Watched, assert_same


def test_a_step_reads_the_text_of_its_own_rows_once():
    fields: dict[str, Any] = {"data": {"train": ["x"]}, "teacher": {"model": "t"}}
    student = {"layers": [0], "parallel": {"data": 2}}
    train = {"steps": 2, "batch_rows": 8, "micro_rows": 1}
    config = RunConfig.model_validate(fields | {"student": student, "train": train})
    documents = Watched([24] * 20)
    loader = Loader(documents, "isolated", 24, 8, seed=0)
    nothing: Any = None  # is used by no request
    cut, topology = BatchCut(8, 1, data=2), Topology(pipeline=1, data=2)
    trainer = Trainer(config, loader, cut, topology, 1, nothing, emit=nothing, saving=nothing)
    batches = [batch() for batch, _ in trainer.requests(0)]
    assert len(documents.read) == len(batches) == 2 * 4
    for place, batch in enumerate(batches):
        row = 4 + place % 4
        assert_same(batch, loader.batch(place // 4).cut(slice(row, row + 1)))
