"""What is no DFlash drafter that can run here is refused in one line that names it: otherwise it would only be accepted less."""

from __future__ import annotations

import shutil

import pytest
import torch

import tiny
from dflash.checkpoints import MASK, convert, drafter, edit, store, target, tensors, values, written
from understudy.core.errors import UserError
from understudy.drafters.dflash.files import read_drafter
from understudy.drafters.dflash.layout import FULL, SLIDING
from understudy.target.target import Target

IDS = ("target_layer_ids",)


def refused(folder, match):
    with pytest.raises(UserError, match=match) as error:
        read_drafter(folder, target())
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Folders that read well, by name; made once."""
    root = tmp_path_factory.mktemp("originals")
    made = {
        "plain": drafter(),
        "sliding": drafter(sliding_window=4),
        "spark": drafter(markov_rank=3, confidence_head=True),
        "own mask": drafter(own_mask=True),
        "speculators": drafter(),
        "speculators sliding": drafter(sliding_window=4),
    }
    for name, model in made.items():
        written(model, root / name)
        if name.startswith("speculators"):
            convert("speculators", root / name)
        read_drafter(root / name, target())
    return root


@pytest.fixture
def copy(originals, tmp_path):
    return lambda name: shutil.copytree(originals / name, tmp_path / "copy")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fc.weight": None}, "no DFlash drafter: it has no fc.weight"),
        ({"hidden_norm.weight": None}, "no DFlash drafter: it has no hidden_norm.weight"),
        ({"norm.weight": None}, r"lacks norm\.weight"),
        ({"layers.1.self_attn.q_norm.weight": None}, r"lacks layers\.1\.self_attn\.q_norm\.weight"),
        ({"layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}, r"layers\.2\.mlp\.up_proj\.weight is no weight of a DFlash drafter"),
        ({"layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "q_proj.bias is no weight of a DFlash drafter with these flags"),
        ({"fc.bias": torch.zeros(32)}, "fc.bias is no weight"),
        ({"mask_embedding": torch.zeros(32)}, "mask_embedding lies among the weights"),
        ({"fc.weight": torch.zeros(32, 64)}, r"fc\.weight is \[32, 64\], expected \[32, 96\] of 3 taps"),
        ({"layers.0.self_attn.k_norm.weight": torch.zeros(32)}, r"k_norm\.weight is \[32\], expected \[8\]"),
        ({"norm.weight": torch.full((32,), torch.nan)}, "norm.weight has values that are not finite"),
        ({"norm.weight": torch.ones(32, dtype=torch.int8)}, "norm.weight is of int8: a quantised drafter"),
        ({"model.norm.weight": torch.zeros(32)}, r"two of its tensors are norm\.weight"),
        ({"lm_head.weight": torch.zeros(97, 32)}, r"a head of its own \(lm_head.weight\): only the head of eight"),
        ({"lm_head.weight": torch.zeros(40, 32)}, r"a head of its own \(lm_head.weight\)"),
        ({"embed_tokens.weight": torch.zeros(40, 32)}, r"embed_tokens\.weight is \[40, 32\], expected \[97, 32\]"),
        ({"d2t": torch.arange(97)}, "d2t moves tokens: a reduced draft vocabulary"),
        ({"mask_hidden": torch.zeros(1, 1, 96)}, "a P-EAGLE drafter"),
        ({"prefix_gru.weight_ih_l0": torch.zeros(3, 32)}, "a Domino drafter"),
        ({"embed_proj.0.weight": torch.zeros(3, 32)}, "a Domino drafter"),
        ({"layers.0.conv.weight": torch.zeros(3, 32)}, "a DFlash-2 drafter"),
        ({"selector.weight": torch.zeros(3, 32)}, "a DFlash-2 drafter"),
        ({"layers.0.self_attn.attention_sink_bias": torch.zeros(4)}, "attention sinks"),
        ({"markov_head.gate_proj.weight": torch.zeros(3, 35)}, "gated or recurrent"),
        ({"markov_head.joint_proj.weight": torch.zeros(9, 38)}, "gated or recurrent"),
        ({"markov_head.markov_w1.weight": torch.zeros(97, 3)}, "markov_w1.weight is no weight of a DFlash drafter with these flags"),
        ({"layers.0.mlp.experts.0.up_proj.weight": torch.zeros(8)}, "mixture of experts"),
        ({"layers.0.mlp.up_proj.weight_scale": torch.zeros(8)}, "a quantised drafter"),
    ],
)  # fmt: skip
def test_tensors_that_cannot_be_meant(copy, change, match):
    folder = copy("plain")
    store(folder, tensors(folder) | change)
    refused(folder, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architectures": ["DFlash2DraftModel"]}, "a DFlash-2 drafter"),
        ({"architectures": ["LiLiCorrDraftModel"]}, "a LiLiCorr drafter"),
        ({"architectures": ["DFlashQwen3XPressModel"]}, "an XPress drafter"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "an EAGLE drafter"),
        ({"model_type": "eagle"}, "an EAGLE drafter"),
        ({"architectures": ["MiMoMTPModel"]}, "a multi-token-prediction head"),
        ({"architectures": ["Gemma4DSparkModel"]}, "Gemma4DSparkModel is no DFlash drafter"),
        ({"architectures": "Qwen3ForCausalLM"}, "Qwen3ForCausalLM is no DFlash drafter"),
        ({"projector_type": "domino"}, "a Domino drafter"),
        ({"projector_type": "mlp"}, "projector_type mlp"),
        ({"conv_kernel_size": 3, "conv_group_size": 4}, r"a DFlash-2 drafter \(conv_kernel_size 3\)"),
        ({"selector_rank": 8}, r"a DFlash-2 drafter \(selector_rank 8\)"),
        ({"attention_sink_bias": True}, "attention_sink_bias True"),
        ({"attention_value_scale": 0.7}, "attention_value_scale 0.7: only 1"),
        ({"logit_scale": 0.5}, "logit_scale 0.5"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0: only 0"),
        ({"output_multiplier": 2.0}, "output_multiplier 2.0"),
        ({"is_neox_style": False}, "is_neox_style False"),
        ({"use_aux_hidden_state": False}, "use_aux_hidden_state False"),
        ({"markov_head_type": "gated"}, "markov_head_type gated: only vanilla"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"draft_vocab_size": 40}, "a draft vocabulary of 40 tokens: only the whole one, 97"),
        ({"enable_confidence_head": True}, "a confidence head without a Markov head"),
        ({"is_causal": True}, "is_causal True and causal False contradict each other"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_keys_that_cannot_run_are_refused_wherever_they_stand(copy, change, match, nested):
    if nested and change.keys() & {"architectures", "model_type"}:
        return
    folder = copy("plain")
    edit(folder, **({"nested": change} if nested else change))
    refused(folder, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mask_token_id": 97}, "its mask token 97 is no row of an embedding of 97"),
        ({"mask_token_id": "90"}, "mask_token_id is '90', no whole number from 0 on"),
        ({"block_size": 1}, "block_size is 1, no whole number from 2 on"),
        ({"causal": "yes"}, "causal is neither true nor false"),
        ({"target_layer_ids": "1,3,5"}, "is no list of layers"),
    ],
)
def test_values_that_cannot_be_meant(copy, change, match):
    folder = copy("plain")
    edit(folder, drop=tuple(change), nested=change)
    refused(folder, match)


@pytest.mark.parametrize("key", ["mask_token_id", "block_size", "sample_from_anchor", "target_layer_ids"])
def test_what_stands_twice_has_to_be_the_same(copy, key):
    folder = copy("plain")
    edit(folder, nested={key: {"target_layer_ids": [1, 3, 4], "sample_from_anchor": True}.get(key, 7)})
    refused(folder, f"{key} stands twice, .* in dflash_config and .* at the top: make them one")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"drop": ("block_size",)}, "it has no block_size, and engines would guess"),
        ({"drop": ("mask_token_id",), "nested": {"mask_token_id": None}}, "it has no mask_token_id, and engines would guess"),
        ({"drop": IDS, "nested": {"target_layer_ids": None}}, "it has no target_layer_ids, and engines would guess"),
        ({"target_layer_ids": [1, 3, 4]}, r"target_layer_ids stands twice, \[1, 3, 5\] in dflash_config and \[1, 3, 4\] at the top"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}, r"names the layers \[1, 3, 5\] and eagle_aux_hidden_state_layer_ids \[0, 2, 4\]"),
        ({"drop": IDS, "nested": {"target_layer_ids": [5, 1, 3]}}, r"\[5, 1, 3\]: engines read every layer once, and in order"),
        ({"drop": IDS, "nested": {"target_layer_ids": [1, 3, 3]}}, "every layer once"),
        ({"drop": IDS, "nested": {"target_layer_ids": []}}, "is no list of layers"),
        ({"drop": IDS, "nested": {"target_layer_ids": [1, 3, 7]}}, "reads layer 7, counted from 0; those of eight .* 0 to 6"),
        ({"drop": IDS, "nested": {"target_layer_ids": [-1, 3, 5]}}, "reads layer -1"),
        ({"drop": IDS, "nested": {"target_layer_ids": [1, 3]}}, r"fc\.weight is \[32, 96\], expected \[32, 64\] of 2 taps"),
        ({"num_target_layers": 36}, "made for a target of 36 layers, eight has 8"),
        ({"vocab_size": 98}, "made for a vocabulary of 98 tokens, eight has 97"),
        ({"target_hidden_size": 64}, "made for states of width 64, eight has 32"),
        ({"hidden_size": 64, "target_hidden_size": 32}, "made for embeddings of width 64, eight has 32"),
        ({"drop": ("rope_theta", "rope_parameters", "rope_scaling")}, "no rope_theta, and engines differ"),
        ({"rope_theta": 5e5}, "contradict each other"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1]}}, "of type mrope"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "of type dynamic"),
        ({"partial_rotary_factor": 0.25}, "on a part of each head"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "on a part of each head"),
        ({"layer_types": [FULL]}, "expected 2 times full_attention or sliding_attention"),
        ({"layer_types": [FULL, "linear_attention"]}, "expected 2 times"),
        ({"layer_types": [SLIDING, FULL], "nested": {"causal": None}}, "sliding layers without a sliding_window"),
        ({"layer_types": [SLIDING, FULL], "sliding_window": 4}, "sliding layers that see both ways"),
        ({"drop": ("layer_types",), "use_sliding_window": True, "sliding_window": 4}, "use_sliding_window without layer_types"),
        ({"nested": {"use_swa": True, "swa_window_size": 4, "causal": None}}, "sliding layers that see both ways"),
        ({"nested": {"use_swa": True, "swa_window_size": 4}}, "sliding layers that see both ways"),
        ({"nested": {"use_swa": True, "swa_window_size": 4, "causal": True}, "sliding_window": 5}, "size 4 and sliding_window 5"),
        ({"hidden_act": "nix"}, "activation nix"),
        ({"hidden_size": "32"}, "hidden_size is '32', no positive whole number"),
        ({"drop": ("head_dim",)}, "it has no head_dim"),
        ({"num_key_value_heads": 3}, "do not fit together"),
        ({"rms_norm_eps": "small"}, r"config\.json is refused"),
        ({"dflash_config": 3}, "dflash_config is no object"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_run_are_refused_by_name(copy, change, match):
    folder = copy("plain")
    edit(folder, **change)
    refused(folder, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"nested": {"causal": False}}, "sliding layers that see both ways"),
        ({"is_causal": False, "nested": {"causal": None}}, "sliding layers that see both ways"),
        ({"sliding_window": None}, "sliding layers without a sliding_window"),
        ({"sliding_window": 1}, "sliding_window is 1, no whole number from 2 on"),
    ],
)
def test_windows_that_cannot_run(copy, change, match):
    folder = copy("sliding")
    edit(folder, **change)
    refused(folder, match)


def test_a_window_for_all_layers(copy):
    folder = copy("sliding")
    edit(folder, layer_types=[FULL, FULL], use_sliding_window=False, sliding_window=None,
         nested={"use_swa": True, "swa_window_size": 4, "causal": True})  # fmt: skip
    assert [(a.window, a.causal) for a in read_drafter(folder, target()).attentions] == [(4, True)] * 2


@pytest.mark.parametrize(
    ("config", "weights", "match"),
    [
        ({"markov_head_type": "rnn"}, {}, "markov_head_type rnn"),
        ({"markov_rank": 4}, {}, r"markov_w1\.weight is \[97, 3\], expected \[97, 4\]|confidence_head"),
        ({"confidence_head_with_markov": False}, {}, r"confidence_head\.proj\.weight is \[1, 35\], expected \[1, 32\]"),
        ({"enable_confidence_head": False}, {}, "confidence_head.proj.bias is no weight"),
        ({"dspark_bonus_anchor": True}, {}, "sample_from_anchor True and dspark_bonus_anchor True contradict"),
        ({}, {"confidence_head.proj.bias": None}, "lacks confidence_head.proj.bias"),
        ({}, {"markov_head.markov_w2.weight": None}, "lacks markov_head.markov_w2.weight"),
    ],
)
def test_markov_heads_that_cannot_run(copy, config, weights, match):
    folder = copy("spark")
    edit(folder, **config)
    store(folder, tensors(folder) | weights)
    refused(folder, match)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("speculators", {"speculators_model_type": "dflash2"}, "a DFlash-2 drafter"),
        ("speculators", {"speculators_model_type": "eagle3"}, "an EAGLE drafter"),
        ("speculators", {"speculators_model_type": "mlp"}, "of type mlp: dflash and dspark"),
        ("speculators", {"transformer_layer_config": 3}, "transformer_layer_config is no object"),
        ("speculators", {"drop": ("aux_hidden_state_layer_ids",)}, "no aux_hidden_state_layer_ids, and engines would guess"),
        ("speculators", {"aux_hidden_state_layer_ids": [0, 4, 6]}, "reads layer -1"),
        ("speculators", {"draft_vocab_size": 40}, "a draft vocabulary of 40"),
        ("speculators sliding", {"sliding_window_non_causal": True}, "sliding layers that see both ways"),
        ("speculators sliding", {"drop": ("sliding_window_non_causal",)}, "sliding layers that see both ways"),
    ],
)  # fmt: skip
def test_speculators_variants_are_refused_by_name(copy, name, change, match):
    folder = copy(name)
    edit(folder, **change)
    refused(folder, match)


def test_masks_of_their_own_that_cannot_be_meant(copy):
    folder = copy("own mask")
    path, token = folder / "mask_embedding.pt", values(folder)["mask_token_id"]
    for stored, match in (
        ({"embedding": torch.zeros(32), "mask_token_id": MASK}, f"for mask token {MASK}, and config.json says {token}"),
        ({"mask_token_id": token}, "holds no embedding"),
        ({"embedding": torch.zeros(31), "mask_token_id": token}, r"mask_embedding is \[31\], expected \[32\]"),
        (torch.full((32,), torch.inf), "mask_embedding has values that are not finite"),
        (tiny.Target, "is damaged, or more than plain tensors"),
    ):
        torch.save(stored, path)
        refused(folder, match)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(folder, "is a pointer of Git LFS")


def test_damaged_files_and_other_targets(copy):
    folder = copy("plain")
    weights = (folder / "model.safetensors").read_bytes()
    for content, match in (
        (weights[: len(weights) // 2], "cannot read the weights"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    ):
        (folder / "model.safetensors").write_bytes(content)
        refused(folder, match)
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no weights")
    (folder / "config.json").write_text("{")
    refused(folder, "is not JSON")
    written(drafter(), folder)
    four = Target(tiny.fresh_model("llama"), name="four")
    with pytest.raises(UserError, match="made for a target of 8 layers, four has 4"):
        read_drafter(folder, four)
