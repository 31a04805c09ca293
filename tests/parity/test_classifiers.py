"""Every supported family of classifiers: taken apart into base and head, and put together again, it is transformers' own."""

from pathlib import Path

import pytest
import torch

from kdscale.config.sections import StudentSection
from kdscale.engine.classifiers import PassThrough, example_tensors
from kdscale.engine.described import CLASS_HEADS, classifier_config
from kdscale.engine.models import build_student, head_of, hidden_states, load_model, set_head
from kdscale.errors import IdentityError, ModelError
from kdscale.head import head_logits
from tests.classes import CLASSIFIERS, PIXELS, example_batch, make_classifier, save_classifier, task_of

CPU = torch.device("cpu")


def alone(model, batch, family: str) -> torch.Tensor:
    """Logits [R, V] of each example by itself, without padding, by transformers."""
    rows = []
    for row in range(batch.num_rows):
        inputs = torch.from_numpy(batch.inputs_RL[row, : batch.lengths_R[row]])[None]
        if task_of(family) == "image-classification":
            rows.append(model(pixel_values=(inputs.view(1, 1, 8, 8).float() / 255 - 0.5) / 0.5).logits)
        else:
            rows.append(model(input_ids=inputs.long()).logits)
    return torch.cat(rows)


def test_every_supported_family_is_compared():
    assert {name for heads in CLASS_HEADS.values() for name in heads} == set(CLASSIFIERS)


@pytest.mark.parametrize("family", CLASSIFIERS)
@torch.no_grad()
def test_head_of_base_is_the_model(family: str):
    model, batch = make_classifier(family), example_batch(family)
    expected = alone(model, batch, family)
    weight, bias, spec = head_of(model, expected.shape[1])
    set_head(model, PassThrough(weight, bias))
    pixels = PIXELS if task_of(family) == "image-classification" else None
    hidden = hidden_states(model, *example_tensors(batch, CPU), pixels)
    torch.testing.assert_close(head_logits(hidden, weight, bias, spec), expected, rtol=1e-4, atol=1e-4)
    assert expected.std(0).min() > 1e-3, "classes must differ, or this compares nothing"


@pytest.mark.parametrize("family", ["vit", "bert", "llama"])
@torch.no_grad()
def test_student_of_all_layers_is_its_teacher(family: str, tmp_path: Path):
    directory, task, batch = save_classifier(tmp_path, family), task_of(family), example_batch(family)
    layers = list(range(4))
    student = build_student(StudentSection(layers=layers), directory, torch.float32, task).eval()
    expected = alone(load_model(directory, torch.float32, task).eval(), batch, family)
    assert torch.equal(alone(student, batch, family), expected)
    fewer = build_student(StudentSection(layers=[3]), directory, torch.float32, task).eval()
    assert fewer.config.num_hidden_layers == 1
    assert not torch.allclose(alone(fewer, batch, family), expected)


@pytest.mark.parametrize(
    ("family", "section", "error", "message"),
    [
        (
            "vit",
            {"config": {"model_type": "vit", "num_labels": 7}},
            ModelError,
            "num_labels = 7, and the teacher has 10",
        ),
        (
            "vit",
            {"config": {"model_type": "vit", "image_size": 16}},
            ModelError,
            "image_size = .16, 16., the teacher .8, 8.",
        ),
        (
            "vit",
            {"config": {"model_type": "swin"}},
            ModelError,
            "type swin is not supported for task image-class.*are vit",
        ),
        ("bert", {"config": {"model_type": "roberta"}}, ModelError, "type roberta is not supported.*bert, distilbert"),
        ("bert", {"config": {"model_type": "llama", "pad_token_id": None}}, ModelError, "no pad_token_id"),
        ("bert", {"config": {"hidden_size": 32}}, ModelError, "no model_type"),
        ("bert", {"config": {"model_type": "bert", "hidden_size": "wide"}}, ModelError, "student.config is not usable"),
    ],
)
def test_students_that_do_not_fit_are_refused(family, section, error, message, tmp_path: Path):
    directory = save_classifier(tmp_path, family)
    with pytest.raises(error, match=message):
        classifier_config(StudentSection(init="config", **section), directory, task_of(family))


def test_a_model_of_other_classes_is_refused(tmp_path: Path):
    teacher = save_classifier(
        tmp_path / "teacher", "bert", id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}
    )
    more = save_classifier(tmp_path / "more", "bert", num_labels=4)
    with pytest.raises(ModelError, match="tells 4 classes apart, the teacher 3"):
        build_student(StudentSection(init="model", model=str(more)), teacher, torch.float32, "sequence-classification")
    turned = save_classifier(
        tmp_path / "turned", "bert", id2label={0: "b", 1: "a", 2: "c"}, label2id={"b": 0, "a": 1, "c": 2}
    )
    with pytest.raises(IdentityError, match="class 0 is 'a' to the teacher and 'b' to the student"):
        build_student(
            StudentSection(init="model", model=str(turned)), teacher, torch.float32, "sequence-classification"
        )


def test_a_directory_without_classifier_is_refused(tmp_path: Path):
    make_classifier("llama").model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"holds no classifier: .'score.weight'. are missing"):
        load_model(tmp_path, torch.float32, "sequence-classification")


def test_a_classifier_is_no_language_model(tmp_path: Path):
    """Its head is another one; where the embedding is the language model's head, that is all there."""
    save_classifier(tmp_path / "untied", "qwen2")
    with pytest.raises(ModelError, match=r"holds no language model: .'lm_head.weight'. are missing; name one"):
        load_model(tmp_path / "untied", torch.float32, "language-modelling")
    save_classifier(tmp_path / "tied", "llama")
    load_model(tmp_path / "tied", torch.float32, "language-modelling")


def test_config_students_take_the_teachers_inputs_and_classes(tmp_path: Path):
    directory = save_classifier(tmp_path, "vit")
    fields = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
    section = StudentSection(init="config", config=fields)
    student = build_student(section, directory, torch.float32, "image-classification")
    assert (student.config.image_size, student.config.num_channels, student.config.num_labels) == (8, 1, 10)
    assert student.classifier.weight.shape == (10, 16)
