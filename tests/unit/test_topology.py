import pytest
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from kdscale.errors import ConfigError
from kdscale.topology import BatchCut, Topology


def test_stages_vary_slowest():
    topology = Topology(pipeline=2, data=3)
    assert [(topology.stage(rank), topology.data_rank(rank)) for rank in range(topology.world)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert [rank for rank in range(6) if topology.reads_tokens(rank)] == [0, 1, 2]
    assert [rank for rank in range(6) if topology.holds_loss(rank)] == [3, 4, 5]


@pytest.mark.parametrize(("pipeline", "data"), [(1, 2), (2, 1), (2, 3), (4, 2)])
def test_layout_is_the_one_of_deepspeed(pipeline: int, data: int):
    topology, theirs = Topology(pipeline, data), PipeDataParallelTopology(num_pp=pipeline, num_dp=data)
    assert topology.world == theirs.world_size()
    for rank in range(topology.world):
        coordinates = theirs.get_coord(rank)
        assert (topology.stage(rank), topology.data_rank(rank)) == (coordinates.pipe, coordinates.data)


@pytest.mark.parametrize(("rows", "micro", "data"), [(8, 1, 1), (8, 2, 2), (12, 3, 2), (4, 4, 1)])
def test_every_row_is_dealt_once(rows: int, micro: int, data: int):
    cut = BatchCut(rows, micro, data)
    dealt = [
        row
        for rank in range(data)
        for step in range(cut.micro_steps)
        for row in range(*cut.rows_of(rank, step).indices(rows))
    ]
    assert dealt == list(range(rows))


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="batch_rows = 6"):
        BatchCut(6, 2, 2)


def test_ranks_below_one_are_refused():
    with pytest.raises(ConfigError, match="pipeline = 0"):
        Topology(0, 1)
