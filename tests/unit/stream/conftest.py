"""What tests of the stream ask: a real tiny teacher behind its server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.served import Teacher


@pytest.fixture(scope="module")
def teacher(teacher_dir: Path) -> Iterator[Teacher]:
    teacher = Teacher(teacher_dir)
    yield teacher
    teacher.close()
