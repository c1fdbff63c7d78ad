"""What is no EAGLE-3 drafter that can run here is refused in one line that names it: otherwise it would only be accepted less."""

from __future__ import annotations

import pytest
import torch

import tiny
from eagle3.checkpoints import TAPS, convert, drafter, edit, store, target, tensors, written
from understudy.core.errors import UserError
from understudy.drafters.eagle3.files import read_drafter


def refused(folder, match):
    with pytest.raises(UserError, match=match) as error:
        read_drafter(folder, target())
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"d2t": None}, "40 draft tokens without d2t"),
        ({"d2t": torch.zeros(40, dtype=torch.int64)}, "t2d and d2t name different tokens"),
        ({"d2t": torch.zeros(40, dtype=torch.int64), "t2d": None}, "d2t is all zeros, and no t2d bears it out"),
        ({"d2t": torch.arange(40), "t2d": None}, "ids and not offsets"),
        ({"d2t": torch.arange(57, 97), "t2d": None}, "d2t is no map of offsets into 97 tokens"),
        ({"d2t": torch.zeros(40, dtype=torch.int64) - 1}, "d2t is no map of offsets"),
        ({"d2t": torch.arange(40).flip(0)}, "d2t is no map of offsets"),
        ({"d2t": torch.zeros(39, dtype=torch.int64)}, r"d2t is \[39\] of int64, expected \[40\]"),
        ({"d2t": torch.zeros(40)}, r"d2t is \[40\] of float32"),
        ({"t2d": torch.zeros(40, dtype=torch.bool)}, r"t2d is \[40\] of bool, expected \[97\]"),
        ({"t2d": torch.ones(97, dtype=torch.bool)}, "t2d and d2t name different tokens"),
        ({"lm_head.weight": None}, "lacks lm_head.weight"),
        ({"lm_head.weight": torch.zeros(97, 32)}, r"lm_head.weight is \[97, 32\], expected \[40, 32\]"),
        ({"fc.weight": torch.zeros(32, 64)}, r"fc.weight is \[32, 64\], expected \[32, 96\] of 3 taps"),
        ({"fc.bias": torch.zeros(32)}, "fc.bias is no weight of an EAGLE-3 drafter with these flags"),
        ({"input_norm.weight": torch.zeros(96)}, "input_norm.weight is no weight"),
        ({"norm.weight": torch.full((32,), torch.nan)}, "norm.weight has values that are not finite"),
        ({"model.norm.weight": torch.zeros(32)}, r"two of its tensors are norm\.weight"),
        ({"mask_hidden": torch.zeros(1, 1, 96)}, "a P-EAGLE drafter"),
        ({"layers.1.mlp.up_proj.weight": torch.zeros(48, 32)}, "a drafter of several layers"),
        ({"midlayer.self_attn.q_norm.weight": torch.zeros(8)}, "whose layer is Qwen3's"),
        ({"midlayer.self_attn.kv_b_proj.weight": torch.zeros(8)}, "latent attention"),
        ({"midlayer.mlp.experts.0.up_proj.weight": torch.zeros(8)}, "mixture of experts"),
        ({"midlayer.mlp.up_proj.weight_scale": torch.zeros(8)}, "a quantised drafter"),
        ({"medusa_head.0.0.linear.weight": torch.zeros(8)}, "a Medusa drafter"),
        ({"fc.weight": None}, "no EAGLE-3 drafter: it has no fc.weight"),
    ],
)
def test_tensors_that_cannot_be_meant(tmp_path, change, match):
    weights = tensors(written(drafter(), tmp_path)) | change
    store(tmp_path, {name: x for name, x in weights.items() if x is not None})
    refused(tmp_path, match)


def test_eagle_1_is_named(tmp_path):
    written(drafter(draft_vocab_size=97), tmp_path)
    edit(tmp_path, architectures=["LlamaForCausalLM"], drop=(TAPS, "eagle_config", "num_aux_hidden_states"))
    weights = {name.replace("midlayer.", "layers.0."): x for name, x in tensors(tmp_path).items()}
    weights = {
        name: x for name, x in weights.items() if not name.endswith(("hidden_norm.weight", "input_layernorm.weight"))
    }
    store(tmp_path, weights | {"fc.weight": torch.zeros(32, 64)})
    refused(tmp_path, "an EAGLE-1 or EAGLE-2 drafter")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, "latent attention"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"architectures": ["Eagle3Qwen3ForCausalLM"]}, "whose layer is Qwen3's"),
        ({"architectures": ["PEagleDraftModel"]}, "P-EAGLE"),
        ({"parallel_drafting": True}, "P-EAGLE"),
        ({"architectures": ["EagleLlamaForCausalLM"]}, "EAGLE-1 or EAGLE-2"),
        ({"model_type": "eagle"}, "EAGLE-1 or EAGLE-2"),
        ({"medusa_num_heads": 5, "architectures": None}, "Medusa"),
        ({"architectures": ["DFlashDraftModel"]}, "DFlash"),
        ({"architectures": ["DeepSeekMTPModel"]}, "multi-token-prediction"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM is no EAGLE-3 drafter"),
        ({"architectures": "KangarooAdapter"}, "KangarooAdapter is no EAGLE-3 drafter"),
        ({"num_hidden_layers": 4}, "4 layers"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is not supported"),
        ({"layer_types": ["sliding_attention"]}, "sliding window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"logit_scale": 0.5}, "logit_scale 0.5"),
        ({"hidden_act": "nix"}, "activation nix"),
        ({"fc_norm": True, "norm_before_fc": True, "eagle_config": None}, "both fc_norm and norm_before_fc"),
        ({"norm_before_fc": True}, "norm_before_fc stands twice"),
        ({"norm_output": "yes"}, "norm_output is neither true nor false"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state False"),
        ({"eagle_config": {"use_last_layernorm": False}}, "use_last_layernorm False"),
        ({"eagle_config": {"parallel_draft_step": 2}}, "parallel_draft_step 2"),
        ({"eagle_config": {TAPS: [2, 4, 5]}}, r"vLLM would read taps \[2, 4, 5\] and SGLang \[3, 5, 6\]"),
        ({TAPS: [5, 2, 4], "eagle_config": None}, "in the order of the layers"),
        ({TAPS: [2, 2, 4], "eagle_config": None}, "every tap once"),
        ({TAPS: [2, 4], "eagle_config": None}, "num_aux_hidden_states is 3, and 2 taps"),
        ({TAPS: [2, 4, 8], "eagle_config": None}, "reads tap 8; those of eight are 0"),
        ({TAPS: [2, 4, "5"]}, "no list of layers"),
        ({TAPS: None, "eagle_config": {TAPS: [-2, 3, 4]}}, "reads tap -1"),
        ({"rope_theta": 5e5}, "contradict each other"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "contradict each other"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "of type dynamic"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1]}}, "of type mrope"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "on a part of each head"),
        ({"partial_rotary_factor": 0.5}, "on a part of each head"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention of its rotary positions is no number"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"config\.json is refused"),
        ({"rope_parameters": [1]}, "is no object"),
        ({"hidden_size": "32"}, "hidden_size is '32', no positive whole number"),
        ({"hidden_size": None}, "it has no hidden_size"),
        ({"vocab_size": 98}, "made for a vocabulary of 98 tokens, eight has 97"),
        ({"target_hidden_size": 64}, "made for states of width 64, eight has 32"),
        ({"hidden_size": 16}, "width 16 without embeddings of its own"),
        ({"num_key_value_heads": 3}, "do not fit together"),
        ({"rms_norm_eps": "small"}, r"config\.json is refused"),
        ({"eagle_config": 3}, "eagle_config is no object"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_run_are_refused_by_name(tmp_path, change, match):
    written(drafter(), tmp_path)
    edit(tmp_path, **change)
    refused(tmp_path, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"speculators_model_type": "peagle"}, "P-EAGLE"),
        ({"speculators_model_type": "eagle"}, "EAGLE-1 or EAGLE-2"),
        ({"speculators_model_type": "mlp"}, "of type mlp: eagle3 is supported"),
        ({"transformer_layer_config": {"model_type": "qwen3"}}, "a draft layer of type qwen3"),
        ({"transformer_layer_config": 3}, "transformer_layer_config is no object"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_speculators_variants_are_refused_by_name(tmp_path, change, match):
    convert("speculators", written(drafter(), tmp_path))
    edit(tmp_path, **change)
    refused(tmp_path, match)


def test_a_target_without_default_taps(tmp_path):
    convert("safeailab", written(drafter(), tmp_path))
    with pytest.raises(UserError, match="names no taps, and a target of 4 layers has no default ones"):
        read_drafter(tmp_path, tiny.target("llama"))
