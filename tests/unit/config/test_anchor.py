from pathlib import Path

from kdscale.config import RunConfig
from kdscale.config.anchor import anchored
from kdscale.data.sources import find_sources


def test_paths_start_from_the_base_and_hub_names_stay(tmp_path: Path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").touch()
    (tmp_path / "models" / "teacher").mkdir(parents=True)
    config = RunConfig.model_validate(
        {
            "run": {"dir": "runs"},
            "data": {
                "train": ["text/*.jsonl", "someone/dataset", "/elsewhere/b.txt"],
                "heldout": ["text/a.jsonl"],
                "cache_dir": "/cache",
                "tokenizer": "org/tokenizer",
            },
            "teacher": {"model": "models/teacher"},
            "student": {"init": "model", "model": "org/student"},
        }
    )
    found = anchored(config, tmp_path)
    assert found.run.dir == str(tmp_path / "runs")
    assert found.data.train == [str(tmp_path / "text/*.jsonl"), "someone/dataset", "/elsewhere/b.txt"]
    assert found.data.heldout == [str(tmp_path / "text/a.jsonl")]
    assert found.data.cache_dir == "/cache"
    assert found.data.tokenizer == "org/tokenizer"
    assert found.teacher.model == str(tmp_path / "models/teacher")
    assert found.student.model == "org/student"
    assert anchored(found, Path("/other")) == found, "once is enough"


def test_a_recording_that_is_not_made_yet_is_a_path(tmp_path: Path):
    fields = {
        "data": {"train": ["x"]},
        "teacher": {"model": "org/teacher"},
        "student": {"layers": [0]},
        "targets": {"source": "live+record", "recording": "recordings/x"},
    }
    found = anchored(RunConfig.model_validate(fields), tmp_path)
    assert found.targets.recording == str(tmp_path / "recordings/x")
    assert anchored(found, Path("/other")) == found


def test_globs_are_read_as_the_data_reads_them(tmp_path: Path):
    base = tmp_path / "run[1]"
    (base / "corpus").mkdir(parents=True)
    for name in ("a.jsonl", "b[1].jsonl"):
        (base / "corpus" / name).touch()
    patterns = ["corpus/**.jsonl", "**/*.jsonl", "corpus/b[1].jsonl", "corpus/[x].jsonl"]
    fields = {"data": {"train": patterns}, "teacher": {"model": "org/teacher"}, "student": {"layers": [0]}}
    found = anchored(RunConfig.model_validate(fields), base).data.train
    names = [[Path(one.name).name for one in find_sources([pattern])] for pattern in found[:3]]
    assert names == [["a.jsonl", "b[1].jsonl"], ["a.jsonl", "b[1].jsonl"], ["b[1].jsonl"]]
    assert found[3] == patterns[3]
