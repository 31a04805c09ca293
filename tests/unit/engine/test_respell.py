from pathlib import Path

import torch

from kdscale.config.sections import StudentSection
from kdscale.engine.models import build_student, load_causal_lm
from tests.conftest import make_model, make_tokenizer
from tests.pairs import make_pair, make_vocabulary


def test_rows_are_those_of_the_same_tokens_or_means_of_their_pieces(text_dir: Path, tmp_path: Path):
    teacher_dir = make_tokenizer(tmp_path / "teacher", every_byte=True)
    make_model("qwen2").save_pretrained(teacher_dir)
    pair = make_pair(make_vocabulary(text_dir, tmp_path / "own.model"), teacher_dir)
    teacher = load_causal_lm(teacher_dir, torch.float32)
    student = build_student(StudentSection(layers=[0]), teacher_dir, torch.float32, "language-modelling", pair)
    assert student.config.vocab_size == pair.vocab_size == len(student.get_output_embeddings().weight)
    for of in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(model, of)().weight.detach() for model in (teacher, student))
        assert torch.equal(new[pair.matches.student_M], old[pair.matches.teacher_M])
        alone = next(
            n
            for n, spelled in enumerate(pair.spellings[0])
            if spelled and n not in pair.matches.student_M and len(pair.teacher.encode(spelled.decode())) > 1
        )
        pieces = pair.teacher.encode(pair.spellings[0][alone].decode())
        torch.testing.assert_close(new[alone], old[pieces].mean(0))
        torch.testing.assert_close(new[0], old[: pair.teacher.vocab_size].mean(0))  # <unk>
    ids = torch.tensor([pair.student.encode("The loop variable")])
    assert student(input_ids=ids).logits.shape[-1] == pair.vocab_size


def test_a_tied_head_stays_tied(text_dir: Path, tmp_path: Path, teacher_dir: Path):
    pair = make_pair(make_vocabulary(text_dir, tmp_path / "own.model"), teacher_dir)
    student = build_student(StudentSection(layers=[0, 3]), teacher_dir, torch.bfloat16, "language-modelling", pair)
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight
    assert student.get_input_embeddings().weight.dtype == torch.bfloat16
