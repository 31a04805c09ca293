"""Ranks on the nodes that the config names, on a real cluster of two nodes."""

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from kdscale.cluster.placement import Ask, _fits, reserve
from kdscale.errors import PlacementError


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, str]]:
    """Node ids by role: a node for teachers and one for students."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "labels": {"role": "student"}, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=2, labels={"role": "teacher"})
    cluster.connect()
    cluster.wait_for_nodes()
    yield {node["Labels"]["role"]: node["NodeID"] for node in ray.nodes()}
    ray.shutdown()
    cluster.shutdown()


def where(ask: Ask) -> list[str]:
    with reserve(ask, 20) as group:
        return list(placement_group_table(group)["bundles_to_node_id"].values())


@pytest.mark.slow
def test_ranks_go_where_the_labels_say(nodes: dict[str, str]):
    assert where(Ask("teacher", 2, 1, 0, nodes={"role": "teacher"})) == [nodes["teacher"]] * 2
    assert where(Ask("student", 2, 1, 0, nodes={"role": "!teacher"})) == [nodes["student"]] * 2
    assert sorted(where(Ask("student", 2, 1, 0, "strict_spread"))) == sorted(nodes.values())
    assert len(set(where(Ask("student", 2, 1, 0, "strict_pack")))) == 1


@pytest.mark.slow
def test_a_wait_says_which_labels_are_missing(nodes: dict[str, str]):
    with (
        pytest.raises(PlacementError, match=r"on nodes with role=judge: 0 of 2 nodes"),
        reserve(Ask("teacher", 1, 1, 0, nodes={"role": "judge"}), 1),
    ):
        pytest.fail("placed where nothing fits")
    with (
        pytest.raises(PlacementError, match=r"needs 3 x 1 CPU, 4 free of 4, placed by strict_spread"),
        reserve(Ask("teacher", 3, 1, 0, "strict_spread"), 1),
    ):
        pytest.fail("three nodes of two")


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [("a", True), ("b", False), ("!a", False), ("!b", True), ("in(b, a)", True), ("!in(a,b)", False)],
)
def test_selectors(wanted: str, fits: bool):
    assert _fits({"role": "a"}, "role", wanted) == fits
    assert _fits({}, "role", wanted) == wanted.startswith("!")
