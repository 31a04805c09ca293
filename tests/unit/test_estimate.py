from pathlib import Path

from kdscale.config import RunConfig
from kdscale.estimate import host_memory


def test_only_what_starts_here_needs_memory_here(teacher_dir: Path):
    fields = {
        "data": {"train": ["x"]},
        "teacher": {"model": str(teacher_dir), "dtype": "float32"},
        "student": {"layers": [0, 1], "dtype": "float32"},
    }
    config = RunConfig.model_validate(fields)
    both = host_memory(config, teacher=True, student=True)
    teacher, student = (host_memory(config, teacher=one, student=not one) for one in (True, False))
    assert both is not None
    assert teacher is not None
    assert student is not None
    assert both == teacher + student
    assert min(teacher, student) > 0
    fields["teacher"]["replicas"] = 3
    three = host_memory(RunConfig.model_validate(fields), teacher=True, student=False)
    assert three is not None
    # The file that is mapped while loading is counted once.
    assert teacher < three < 3 * teacher
