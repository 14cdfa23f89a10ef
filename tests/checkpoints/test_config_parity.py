"""config.json key by key: what each key, and its absence, means to transformers it means here."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gptjax.checkpoints import formats, huggingface, pretrained
from gptjax.checkpoints.families.common import ACTIVATIONS
from gptjax.checkpoints.generation_config import is_generation_key
from gptjax.model import head, transformer

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'gptjax[parity]'")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'gptjax[parity]'"
)

SIZES = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
)
GPT2_SIZES = dict(vocab_size=48, n_embd=32, n_layer=2, n_head=4)
IDS = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
TOKENS = np.random.default_rng(0).integers(1, 48, (1, 24))
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)

# {model type: [the keys to add to a config.json that has the sizes alone, ...]}
VARIANTS = {
    "gpt2": [
        {},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
        {"n_inner": 24},
        {"layer_norm_epsilon": 0.1},
        {"tie_word_embeddings": False},
        {"n_positions": 32, "n_ctx": 99},
        {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
        *({"activation_function": name} for name in ACTIVATIONS),
    ],
    "gpt_neox": [
        {},
        {"attention_bias": False},
        {"attention_bias": False, "use_parallel_residual": False},
        {"rotary_pct": 1.0, "rotary_emb_base": 500},
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        {"hidden_act": "relu", "layer_norm_eps": 0.1, "max_position_embeddings": 32},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"tie_word_embeddings": True},
    ],
    "llama": [
        {},
        {"num_key_value_heads": None},
        {"num_key_value_heads": 2, "head_dim": 12},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 0.1},
        {"rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": YARN},
        {"rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}},
        {"rope_scaling": {**YARN, "mscale": 2.0}},
        {"rope_scaling": {**YARN, "attention_factor": 0.7, "beta_fast": 8, "beta_slow": 2}},
        {"rope_scaling": {**YARN, "factor": None}, "max_position_embeddings": 64},
        {"original_max_position_embeddings": 8, "rope_scaling": YARN},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ],
    "mistral": [{}, {"sliding_window": 5}, {"sliding_window": None}, {"head_dim": 12}],
    "qwen2": [
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 2, "head_dim": 12, "attention_bias": False},
        {"num_key_value_heads": 2, "sliding_window": 5},
        {
            "num_key_value_heads": 2,
            "sliding_window": 5,
            "use_sliding_window": True,
            "max_window_layers": 0,
        },
        {"num_key_value_heads": None, "layer_types": ["full_attention"] * 2},
    ],
    "qwen3": [
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 2, "head_dim": 12, "attention_bias": True},
        {
            "num_key_value_heads": 2,
            "sliding_window": 5,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention"] * 2,
        },
    ],
    "phi3": [
        {},
        {"num_key_value_heads": 2, "head_dim": 12},
        {"partial_rotary_factor": 0.5, "sliding_window": 5},
        {"hidden_act": "gelu_new", "rms_norm_eps": 0.1},
    ],
    "gemma2": [
        {"head_dim": 8},
        {"attention_bias": True, "hidden_act": "silu"},
        {"hidden_activation": "silu", "query_pre_attn_scalar": 24, "rms_norm_eps": 0.1},
        {"sliding_window": 5, "num_key_value_heads": 2, "tie_word_embeddings": False},
        {"attn_logit_softcapping": 3.0, "final_logit_softcapping": None},
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 5},
    ],
}


def our_logits(checkpoint):
    """Op by op: compiling a program for each of so many models would take minutes."""
    config, params = checkpoint.config, jax.tree.map(jax.numpy.asarray, checkpoint.params)
    with jax.disable_jit():
        hidden, _ = transformer.apply(config, params, TOKENS.astype(np.int32))
        return np.asarray(head.unembed(config, params, hidden))


def their_logits(net):
    with torch.no_grad():
        return net(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("model_type", VARIANTS)
def test_each_key_means_what_it_means_to_transformers(model_type, tmp_path):
    for number, changes in enumerate(VARIANTS[model_type]):
        folder = tmp_path / str(number)
        folder.mkdir()
        sizes = GPT2_SIZES if model_type == "gpt2" else SIZES
        if model_type == "mistral":  # whose own default are 8 heads
            sizes = {**sizes, "num_attention_heads": 8, "hidden_size": 64}
        raw = {"model_type": model_type, **sizes, **IDS, **changes}
        (folder / "config.json").write_text(json.dumps(raw))
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(folder)
        net = transformers.AutoModelForCausalLM.from_config(config).eval()
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.4)
        net.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(raw))
        expected = their_logits(net)
        checkpoint = pretrained.read_checkpoint(folder)
        atol = 2e-4 * np.abs(expected).max()
        np.testing.assert_allclose(
            our_logits(checkpoint), expected, atol=atol, err_msg=str(changes)
        )
        formats.write_checkpoint(folder / "again", checkpoint)
        again = transformers.AutoModelForCausalLM.from_pretrained(folder / "again")
        np.testing.assert_allclose(their_logits(again), expected, atol=atol, err_msg=str(changes))


def config_class(model_type):
    return type(transformers.AutoConfig.for_model(model_type))


@pytest.mark.parametrize("model_type", huggingface.FAMILIES)
def test_absent_keys_mean_what_transformers_takes(model_type):
    family = huggingface.FAMILIES[model_type]
    theirs = {field.name: field.default for field in dataclasses.fields(config_class(model_type))}
    for key, value in family.defaults.items():
        if key == "head_dim" and key not in theirs:  # looked for by Phi-3 and Qwen2 nevertheless
            assert value is None
        else:
            assert theirs[key] == value, key


@pytest.mark.parametrize("model_type", huggingface.FAMILIES)
def test_all_keys_that_transformers_writes_are_known(model_type):
    config = config_class(model_type)(architectures=None)
    huggingface.read_config({**config.to_dict(), "model_type": model_type})
    for field in dataclasses.fields(config):
        known = huggingface.FAMILIES[model_type].keys.knows(field.name)
        assert known or is_generation_key(field.name), field.name
