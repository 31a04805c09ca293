"""Ranks that don't answer, as real actors."""

import tempfile
import time

import pytest

from kdscale.cluster.placement import Ask, cluster, reserve
from kdscale.cluster.ranks import RankGroup
from kdscale.config.sections import ClusterSection
from kdscale.errors import TeacherError


class Sleeper:
    """The second rank is not built in time."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank = rank

    def build(self) -> int:
        time.sleep(60 * self._rank)
        return self._rank


@pytest.mark.slow
def test_a_wait_that_ends_names_its_setting():
    ask = Ask("teacher", 2, 1, 0)
    with (
        # Not tmp_path: the path of a Unix socket is short.
        tempfile.TemporaryDirectory(prefix="kdscale-") as temp,
        cluster(ClusterSection(), [ask], temp, lambda fault: None),
        reserve(ask, 60) as group,
    ):
        ranks = RankGroup(Sleeper, ask, group, TeacherError)
        ranks.locate(60, "teacher.start_seconds")
        with pytest.raises(TeacherError) as caught:
            ranks.all("build", timeout_s=5, setting="teacher.load_seconds")
        ranks.kill()
    assert str(caught.value) == "teacher: rank(s) [1] did not answer 'build' within teacher.load_seconds = 5"
