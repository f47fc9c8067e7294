"""Hugging Face configs: width fields are found, heads shrink before their size, nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_nets import NUM_CLASSES, NUM_POSITIONS, VOCABULARY, study_of

import hydro_trials as hydro
from hydro_slurm.errors import SurrogateError
from hydro_trials.surrogate import make_surrogate, study_surrogate
from hydro_trials.surrogate.hugging_face import HuggingFaceFactory
from hydro_trials.surrogate.scale import check_scale

transformers = pytest.importorskip("transformers")

SIZES = {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": NUM_POSITIONS}
GATED = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 16, "num_key_value_heads": 8, **SIZES}
BLOCKS = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def call_t5(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=inputs, decoder_input_ids=inputs).logits
    return logits


def family(name: str) -> hydro.HuggingFace:
    """A small target of each family."""
    t: Any = transformers
    causal = t.AutoModelForCausalLM
    if name == "gpt2":
        sizes = {"n_embd": 128, "n_head": 16, "n_layer": 2, "n_positions": NUM_POSITIONS, "vocab_size": VOCABULARY}
        off = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 0}
        return hydro.HuggingFace(t.GPT2Config(**sizes, **off), causal)
    if name == "llama":
        return hydro.HuggingFace(t.LlamaConfig(**GATED), causal)
    if name == "qwen2":
        return hydro.HuggingFace(t.Qwen2Config(**GATED), causal)
    if name == "qwen3":
        return hydro.HuggingFace(t.Qwen3Config(head_dim=16, **GATED), causal)
    if name == "bert":
        return hydro.HuggingFace(t.BertConfig(**{**BLOCKS, **SIZES}), t.BertForMaskedLM)
    if name == "vit":
        config = t.ViTConfig(image_size=8, patch_size=2, num_labels=NUM_CLASSES, **BLOCKS)
        return hydro.HuggingFace(config, t.ViTForImageClassification)
    sizes = {"d_model": 128, "d_kv": 8, "d_ff": 256, "num_heads": 16, "num_layers": 2, "vocab_size": VOCABULARY}
    return hydro.HuggingFace(t.T5Config(**sizes, dropout_rate=0.0), t.T5ForConditionalGeneration, call_t5)


FAMILIES = {
    "gpt2": ({"n_embd"}, {"n_head"}, set()),
    "llama": ({"hidden_size", "intermediate_size"}, {"num_attention_heads", "num_key_value_heads"}, {"head_dim"}),
    "qwen2": ({"hidden_size", "intermediate_size"}, {"num_attention_heads", "num_key_value_heads"}, set()),
    "qwen3": ({"hidden_size", "intermediate_size"}, {"num_attention_heads", "num_key_value_heads"}, {"head_dim"}),
    "bert": ({"hidden_size", "intermediate_size"}, {"num_attention_heads"}, set()),
    "vit": ({"hidden_size", "intermediate_size"}, {"num_attention_heads"}, set()),
    "t5": ({"d_model", "d_ff"}, {"num_heads"}, {"d_kv"}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_width_fields_are_found_and_nothing_else_changes(name: str) -> None:
    factory = HuggingFaceFactory(family(name))
    assert (set(factory.widths), set(factory.heads), set(factory.head_sizes)) == FAMILIES[name]
    surrogate = make_surrogate(family(name), 8, "adamw")
    inputs = torch.zeros(2, NUM_POSITIONS, dtype=torch.long) if name != "vit" else torch.zeros(2, 3, 8, 8)
    outputs = NUM_CLASSES if name == "vit" else VOCABULARY
    assert surrogate.make(0)(inputs).shape[-1] == outputs
    assert surrogate.classification.heads == {}, "the size of the heads stays"
    assert len(surrogate.classification.readouts) == 1


def test_what_is_left_over_after_the_heads_shrinks_their_size_and_scales_their_scores() -> None:
    surrogate = make_surrogate(family("llama"), 16, "adamw")  # 8 key-value heads: 8 times fewer, half as large
    head = surrogate.classification.heads["model.model.layers.0.self_attn"]
    assert head.factor == pytest.approx(2**0.5)
    attention = surrogate.make(0).get_submodule("model.model.layers.0.self_attn")
    assert attention.head_dim == 4
    assert attention.scaling == pytest.approx(8**0.5 / 4), "sqrt(d_target) / d"


def test_heads_that_offer_no_way_to_scale_their_scores_are_refused_by_name() -> None:
    with pytest.raises(SurrogateError, match=r"module .*SelfAttention .*its head size shrinks from 8 to 4"):
        make_surrogate(family("t5"), 32, "adamw")


def test_a_scale_that_does_not_divide_names_the_nearest_that_does() -> None:
    with pytest.raises(SurrogateError, match=r"width_scale 5 does not divide hidden_size = 128; the nearest .* is 4"):
        make_surrogate(family("llama"), 5, "adamw")


def test_rotary_positions_need_even_heads() -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 8, "num_key_value_heads": 4, **SIZES}
    description = hydro.HuggingFace(transformers.LlamaConfig(**sizes), transformers.AutoModelForCausalLM)
    complaint = r"width_scale 16 does not divide the head size .*= 12 into an even one .*; the nearest .* is 12"
    with pytest.raises(SurrogateError, match=complaint):
        make_surrogate(description, 16, "adamw")


def test_the_user_s_config_is_left_alone() -> None:
    description = family("qwen3")
    before = description.config.to_dict()
    make_surrogate(description, 8, "adamw").make(0)
    assert description.config.to_dict() == before


def test_a_config_that_builds_no_model_says_so() -> None:
    config = transformers.BertConfig(hidden_size=30, num_attention_heads=4)
    with pytest.raises(SurrogateError, match=r"BertForMaskedLM cannot be built from this config: .*30"):
        HuggingFaceFactory(hydro.HuggingFace(config, transformers.BertForMaskedLM))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["gpt2", "llama", pytest.param("vit", marks=pytest.mark.slow)])
def test_the_coordinate_check_passes(name: str, optimizer: str) -> None:
    study = study_of(family(name), optimizer, tokens=name != "vit")
    data = study.data()
    assert check_scale(study, data, study_surrogate(study, 16 if name == "gpt2" else 8, data)).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["qwen3", "bert", "t5"])
def test_the_coordinate_check_passes_for_the_other_families(name: str, optimizer: str) -> None:
    study = study_of(family(name), optimizer, tokens=True)
    data = study.data()
    assert check_scale(study, data, study_surrogate(study, 8, data)).problems == []
