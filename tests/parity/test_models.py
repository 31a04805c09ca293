"""Our way through a model against plain transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, HyperCLOVAXConfig, HyperCLOVAXForCausalLM

from kdscale.batch import TokenBatch
from kdscale.config.sections import StudentSection
from kdscale.data.loader import Loader
from kdscale.engine.cuttable import require_pipeline_family
from kdscale.engine.directories import model_digest, resolve_model
from kdscale.engine.families import in_sequence
from kdscale.engine.models import (
    base_hidden,
    build_student,
    from_teacher_layers,
    head_of,
    load_causal_lm,
    require_known_head,
)
from kdscale.engine.settings import teacher_settings
from kdscale.engine.sharding import InferenceModel
from kdscale.errors import ModelError
from kdscale.head import head_logits
from tests.conftest import FAMILIES, PADDED_VOCAB, make_model
from tests.properties.test_packing_properties import Documents


def hidden_logits(model, batch: TokenBatch) -> torch.Tensor:
    """Logits at every position through ``base_hidden`` and the detached head, [R, L, V]."""
    weight, bias, spec = head_of(model, PADDED_VOCAB)
    positions = torch.from_numpy(batch.positions_RL).long()
    hidden = base_hidden(model, torch.from_numpy(batch.ids_RL).long(), positions)
    return head_logits(hidden.flatten(0, 1), weight, bias, spec).view(*batch.ids_RL.shape, -1)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_unpacked(family: str):
    """Each document of a packed row gets the logits it gets alone in a plain forward."""
    model = make_model(family)
    loader = Loader(Documents([9, 5, 14, 3, 7, 11]), "isolated", 24, 2, seed=0)
    assert loader.num_rows < 6
    seen = 0
    for number in range(loader.num_rows):
        batch = loader.batch(number)
        batch.ids_RL[:] %= PADDED_VOCAB
        packed = hidden_logits(model, batch)
        for row in range(batch.num_rows):
            for segment in range(1, batch.segments_RL[row].max() + 1):
                here = batch.segments_RL[row] == segment
                alone = model(input_ids=torch.from_numpy(batch.ids_RL[row][here]).long()[None], use_cache=False).logits[
                    0
                ]
                torch.testing.assert_close(packed[row][torch.from_numpy(here)], alone.float(), rtol=1e-4, atol=1e-4)
                seen += 1
    assert seen >= 6


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_modules_in_sequence_are_the_base_model(family: str):
    """What a pipeline is cut from, applied one after the other on packed rows."""
    model = make_model(family)
    batch = Loader(Documents([9, 5, 14, 3, 7, 11]), "isolated", 24, 2, seed=0).batch(0)
    ids, positions = (torch.from_numpy(one).long() for one in (batch.ids_RL % PADDED_VOCAB, batch.positions_RL))
    modules = in_sequence(model)
    assert len(modules) == model.config.num_hidden_layers + 2
    activations = ids, positions
    for module in modules:
        activations = module(activations)
    assert torch.equal(activations[0], base_hidden(model, ids, positions))


def test_families_that_cannot_be_cut_are_refused(tmp_path: Path):
    section = StudentSection(init="config", config={"model_type": "bloom"})
    with pytest.raises(
        ModelError, match=r"type bloom cannot be cut into stages; supported are llama, mistral, .* gpt_neox"
    ):
        require_pipeline_family(section, tmp_path)
    make_model("llama").save_pretrained(tmp_path)
    require_pipeline_family(StudentSection(layers=[0]), tmp_path)
    require_pipeline_family(StudentSection(init="model", model=str(tmp_path)), Path())


@torch.no_grad()
def test_joined_documents_do_see_each_other():
    """The control of the test above: without isolation the second document's logits are others."""
    model = make_model("llama")
    split = Documents([9, 9])
    isolated, joined = (Loader(split, packing, 18, 1, seed=0).batch(0) for packing in ("isolated", "joined"))
    for batch in (isolated, joined):
        batch.ids_RL[:] %= PADDED_VOCAB
    difference = (hidden_logits(model, isolated) - hidden_logits(model, joined)).abs().amax(-1)[0]
    assert difference[:9].max() < 1e-4
    assert difference[9:].min() > 1e-2


def test_student_of_teacher_layers_is_the_sliced_model(teacher_dir: Path):
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    student = from_teacher_layers(teacher_dir, [0, 2, 3], torch.float32)
    teacher.model.layers = torch.nn.ModuleList([teacher.model.layers[index] for index in (0, 2, 3)])
    for index, layer in enumerate(teacher.model.layers):
        layer.self_attn.layer_idx = index
    ids = torch.arange(12)[None] * 7 % 200
    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=ids).logits, teacher(input_ids=ids, use_cache=False).logits)
    assert student.config.num_hidden_layers == 3
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2", "mixtral", "qwen3_moe"])
def test_layers_of_other_families(family: str, tmp_path: Path):
    make_model(family).save_pretrained(tmp_path)
    student = from_teacher_layers(tmp_path, [1], torch.float32)
    assert student.config.num_hidden_layers == 1
    require_known_head(student)


def test_layers_of_a_gpt2_as_the_hub_has_it(tmp_path: Path):
    """Without the model's prefix, and with buffers that are no weights."""
    teacher = make_model("gpt2")
    teacher.save_pretrained(tmp_path)
    state = {
        name.removeprefix("transformer."): one.contiguous()
        for name, one in teacher.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(state | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "model.safetensors", {"format": "pt"})
    layers = [*range(teacher.config.num_hidden_layers)]
    student = from_teacher_layers(tmp_path, layers, torch.float32)
    for (name, ours), theirs in zip(student.named_parameters(), teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_frozen_parameters(teacher_dir: Path):
    section = StudentSection(init="teacher_layers", layers=[0, 1], freeze=["embed_tokens"])
    student = build_student(section, teacher_dir, torch.float32)
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}


def test_fresh_student():
    fields = {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    }
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    first = build_student(StudentSection(init="config", config=fields), Path(), torch.float32)
    torch.manual_seed(0)
    again = build_student(StudentSection(init="config", config=fields), Path(), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"init": "teacher_layers", "layers": [0, 9]}, "names layer 9; .* has layers 0 to 3"),
        ({"init": "model", "model": "/nowhere"}, "/nowhere is not a directory"),
        ({"init": "config", "config": {"hidden_size": 3}}, "no model_type"),
        ({"init": "config", "config": {"model_type": "vit"}}, "not a causal language model's"),
        ({"init": "teacher_layers", "layers": [0], "freeze": ["nothing"]}, "'nothing' finds no parameter"),
        ({"init": "teacher_layers", "layers": [0], "freeze": ["."]}, "leaves nothing to train"),
    ],
)
def test_impossible_students_are_refused(section: dict, message: str, teacher_dir: Path):
    with pytest.raises(ModelError, match=message):
        build_student(StudentSection(**section), teacher_dir, torch.float32)


def test_damaged_model_directories_are_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678 not safetensors")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_causal_lm(tmp_path, torch.float32)
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        from_teacher_layers(tmp_path, [0], torch.float32)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="convert its weights to safetensors"):
        from_teacher_layers(tmp_path, [0], torch.float32)


def test_digest_tells_fine_tuned_models_apart(tmp_path: Path):
    model = make_model("llama")
    digests = []
    for name, change in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += change
        model.save_pretrained(tmp_path / name)
        digests.append(model_digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]


def test_head_with_fewer_rows_than_the_vocabulary_is_refused():
    with pytest.raises(ModelError, match=f"{PADDED_VOCAB + 1} ids"):
        head_of(make_model("llama"), PADDED_VOCAB + 1)


@torch.no_grad()
def test_unknown_head_arithmetic_is_refused():
    model = make_model("llama")

    class Doubling(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden)

    doubling = Doubling(32, PADDED_VOCAB, bias=False)
    doubling.weight = model.lm_head.weight
    model.lm_head = doubling
    with pytest.raises(ModelError, match="in a way kdscale does not know"):
        require_known_head(model)


def test_a_teacher_of_unknown_head_arithmetic_is_refused(tmp_path: Path):
    """HyperCLOVA X multiplies its logits by what Granite divides them by, under the same name."""
    config = HyperCLOVAXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=4.0,
    )  # fmt: skip
    HyperCLOVAXForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match="HyperCLOVAXForCausalLM turns hidden states into logits in a way kdscale does not"
    ):
        InferenceModel(str(tmp_path), teacher_settings(1, "float32"), torch.float32, torch.device("cpu"))


def test_tokens_of_padding_change_nothing():
    """What stands in padding columns is seen by nobody."""
    model = make_model("llama")
    batch = Loader(Documents([9, 5]), "isolated", 20, 1, seed=0).batch(0)
    other = np.where(batch.segments_RL == 0, 77, batch.ids_RL).astype(np.int32) % PADDED_VOCAB
    with torch.no_grad():
        first = hidden_logits(model, batch_with(batch, batch.ids_RL % PADDED_VOCAB))
        second = hidden_logits(model, batch_with(batch, other))
    real = torch.from_numpy(batch.segments_RL != 0)
    torch.testing.assert_close(first[real], second[real])


def batch_with(batch: TokenBatch, ids: np.ndarray) -> TokenBatch:
    return TokenBatch(0, ids.astype(np.int32), batch.segments_RL, batch.positions_RL, batch.predicts_RL)
