"""config.json and generation_config.json of others: published ones load, keys are never ignored."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import byte_level_tokenizer, random_params, tiny_checkpoint
from safetensors.numpy import load_file, save_file

import gptjax
from gptjax.checkpoints import formats, generation_config, huggingface, pretrained
from gptjax.checkpoints.families import common
from gptjax.checkpoints.foreign_files import KEY_TABLES
from gptjax.config.errors import UserError
from gptjax.core import tree

TORCH = {"torch_dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": True}

# What stands in published files beside the sizes, as their authors and trainers wrote it.
PUBLISHED = {
    "openai-community/gpt2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "n_ctx": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_type": "cls_index",
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "an old GPT-2": {
        "model_type": "gpt2",
        "do_sample": False,
        "finetuning_task": None,
        "id2label": {"0": "LABEL_0"},
        "is_decoder": False,
        "label2id": {"LABEL_0": 0},
        "length_penalty": 1.0,
        "max_length": 20,
        "num_beams": 1,
        "num_labels": 1,
        "output_attentions": False,
        "output_past": True,
        "pruned_heads": {},
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "torchscript": False,
        "use_bfloat16": False,
    },
    "EleutherAI/pythia": {
        "model_type": "gpt_neox",
        **TORCH,
        "hidden_act": "gelu",
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    },
    "EleutherAI/gpt-neox-20b": {
        "model_type": "gpt_neox",
        **TORCH,
        "attention_probs_dropout_prob": 0,
        "hidden_act": "gelu_fast",
        "hidden_dropout_prob": 0,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
    },
    "EleutherAI/polyglot-ko": {"model_type": "gpt_neox", **TORCH, "num_steps": "step320000"},
    "HuggingFaceTB/SmolLM2": {
        "model_type": "llama",
        **TORCH,
        "is_llama_config": True,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "unsloth/Llama-3.2": {
        "model_type": "llama",
        **TORCH,
        "_name_or_path": "unsloth/Llama-3.2-1B",
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "unsloth_fixed": True,
        "unsloth_version": "2024.9",
    },
    "mistralai/Mistral": {"model_type": "mistral", **TORCH, "sliding_window": None},
    "Qwen/Qwen2.5": {
        "model_type": "qwen2",
        **TORCH,
        "max_window_layers": 28,
        "sliding_window": 32768,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "Qwen/Qwen2.5-1M": {
        "model_type": "qwen2",
        **TORCH,
        "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192},
    },
    "Qwen/Qwen3": {"model_type": "qwen3", **TORCH, "attention_bias": False, "head_dim": 8},
    "microsoft/Phi-3": {
        "model_type": "phi3",
        **TORCH,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "original_max_position_embeddings": 4096,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "sliding_window": 2047,
    },
    "google/gemma-2": {
        "model_type": "gemma2",
        **TORCH,
        "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4096,
        "sliding_window_size": 4096,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_load(name):
    huggingface.read_config(PUBLISHED[name])


class Spy(dict):
    """A dict that notes which keys are looked up."""

    def __init__(self, values):
        super().__init__(values)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)


@pytest.mark.parametrize("model_type", huggingface.FAMILIES)
def test_the_table_says_used_of_what_is_read(model_type):
    """A key that a table calls used and nobody reads would be ignored in silence."""
    family = huggingface.FAMILIES[model_type]
    raw = Spy({"model_type": model_type, **family.defaults, "use_sliding_window": True})
    if model_type.startswith("qwen"):
        raw |= {"num_hidden_layers": 40, "max_window_layers": 0}
    family.read_config(raw)
    elsewhere = {"vocab_size", "initializer_range", "tie_word_embeddings", "model_type"}
    heads = {"architectures", "id2label", "num_labels", "problem_type"}
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}
    with_a_scaling = {"original_max_position_embeddings"}
    assert not family.keys.used - raw.read - elsewhere - heads - ids - with_a_scaling
    assert all(family.keys.knows(key) for key in raw.read)


@pytest.mark.parametrize("model_type", huggingface.FAMILIES)
def test_what_is_written_is_known(model_type):
    config = tiny_checkpoint(model_type).config
    raw = huggingface.write_config(config, "float32", {"eos_token_id": 3})
    again = huggingface.read_config(json.loads(json.dumps(raw)))
    assert common.has_gemma_settings(again) == common.has_gemma_settings(config)


REFUSED = {
    "another architecture": ("mixtral", {}, "no architecture 'mixtral'.*there are: gpt2, gpt_neox"),
    "an unknown key": ("llama", {"attn_sinks": 4}, "the key 'attn_sinks' .= 4. is not known"),
    "cross attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention = true"),
    "an encoder": ("llama", {"is_encoder_decoder": True}, "only decoders"),
    "pruned heads": ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    "both directions": ("gemma2", {"use_bidirectional_attention": True}, "before it only"),
    "a Llama with a window": ("llama", {"sliding_window": 4096}, "Mistral has"),
    "a Mistral with biases": ("mistral", {"attention_bias": True}, "none there"),
    "a Qwen2 with biases of the MLP": ("qwen2", {"mlp_bias": True}, "none there"),
    "a part of a head turned": ("llama", {"partial_rotary_factor": 0.5}, "turns all of a head"),
    "interleaved RoPE": ("llama", {"rope_interleaved": True}, "two halves"),
    "an activation": ("gpt2", {"activation_function": "mish"}, "known: gelu_new"),
    "RoPE by layer": (
        "gemma2",
        {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
        "share one RoPE",
    ),
    "alpha of a scaling": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}},
        "alpha = 1000.0 is not supported",
    ),
    "YaRN without rounding": (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
        "truncate = false",
    ),
    "a key in a scaling": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0, "wavelength": 3}},
        "RoPE: the key 'wavelength'",
    ),
    "layers of their own": ("llama", {"per_layer_config": {"0": {"head_dim": 4}}}, "alike"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(name):
    model_type, keys, message = REFUSED[name]
    with pytest.raises(UserError, match=rf"^config.json: .*{message}") as error:
        huggingface.read_config({"model_type": model_type, **keys})
    assert str(error.value).count("config.json:") == 1


# what a tokenizer.json goes without has no effect beside it, whatever its name
CLOSED = [table for table in KEY_TABLES if "*" not in table.no_effect]


@pytest.mark.parametrize("table", CLOSED, ids=lambda table: table.file)
def test_an_unknown_key_of_each_type_of_file_is_refused(table):
    table.check({"key_of_tomorrow": None}, "FILE")
    with pytest.raises(UserError, match=r"^FILE: the key 'key_of_tomorrow' .= 3. is not known"):
        table.check({"key_of_tomorrow": 3}, "FILE")


def hf_folder(path, family="gpt2"):
    formats.write_checkpoint(path, tiny_checkpoint(family, tokenizer=byte_level_tokenizer()))
    return path


def edit(folder, name, **changes):
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_suggestions_of_generation_config_are_said_and_not_taken_over(tmp_path, capsys):
    folder = hf_folder(tmp_path / "model")
    text = gptjax.load(folder).generate("ab", max_new_tokens=4).text
    assert "suggests" not in capsys.readouterr().err
    edit(
        folder,
        "generation_config.json",
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        top_k=50,
        repetition_penalty=1.1,
        suppress_tokens=[5, 6],
        max_length=4096,
    )
    lm = gptjax.load(folder)
    said = capsys.readouterr().err
    assert "temperature = 0.6, top_p = 0.9, repetition_penalty = 1.1, banned = [[5], [6]]" in said
    assert "top_k" not in said  # the format's own default
    assert lm.generate("ab", max_new_tokens=4).text == text
    assert pretrained.open_checkpoint(folder).generation["top_p"] == 0.9
    assert capsys.readouterr().err == ""  # training and conversion generate nothing


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, []),  # without do_sample they change no text
        ({"do_sample": True}, ["temperature = 1.0"]),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20}, ["temperature = 0.7", "top_k = 20"]),
        ({"no_repeat_ngram_size": 3, "num_beams": 4}, ["no_repeat_ngram = 3", "num_beams = 4"]),
        ({"bad_words_ids": [[7, 8]]}, ["banned = [[7, 8]]"]),
    ],
)
def test_suggestions(values, expected):
    assert generation_config.suggestions(values) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"forced_bos_token_id": 3}, "forced_bos_token_id = 3 is not supported"),
        ({"begin_suppress_tokens": [220]}, "begin_suppress_tokens"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"min_length": 10}, "--min_new_tokens"),
        ({"temprature": 0.5}, "the key 'temprature'"),
    ],
)
def test_keys_of_generation_config_that_nothing_does_are_refused(values, message, tmp_path):
    folder = hf_folder(tmp_path / "model")
    edit(folder, "generation_config.json", **values)
    with pytest.raises(UserError, match=rf"generation_config.json: .*{message}"):
        pretrained.open_checkpoint(folder)


def test_generation_keys_in_config_json_count_without_the_other_file(tmp_path):
    folder = hf_folder(tmp_path / "model")
    edit(folder, "config.json", repetition_penalty=1.3)
    assert "repetition_penalty" not in pretrained.open_checkpoint(folder).generation
    (folder / "generation_config.json").unlink()
    assert pretrained.open_checkpoint(folder).generation == {"repetition_penalty": 1.3}
    edit(folder, "config.json", forced_eos_token_id=1)
    with pytest.raises(UserError, match=r"config.json: forced_eos_token_id"):
        pretrained.open_checkpoint(folder)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_head_of_its_own_in_a_tied_file(family, tmp_path, capsys):
    folder = hf_folder(tmp_path / "model", family)
    edit(folder, "config.json", tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    table = next(name for name in tensors if name.endswith(("wte.weight", "embed_tokens.weight")))
    prefix = table.split(".")[0] + "."
    own = np.random.default_rng(0).normal(size=tensors[table].shape).astype(np.float32)

    def opened(changed):
        save_file(changed, file)
        return pretrained.read_checkpoint(folder)

    both = opened({**tensors, "lm_head.weight": own})
    assert "lm_head.weight and" in (said := capsys.readouterr().err)
    assert "the head in the file is used" in said
    assert not both.config.tie_embeddings
    np.testing.assert_array_equal(both.params["head"]["kernel"][: len(own)], own)
    same = opened({**tensors, "lm_head.weight": tensors[table]})
    assert same.config.tie_embeddings
    assert "head" not in same.params
    without = {name: t for name, t in tensors.items() if name not in (table, "lm_head.weight")}
    only_head = opened({**without, "lm_head.weight": own})
    assert only_head.config.tie_embeddings
    np.testing.assert_array_equal(only_head.params["embed"]["tokens"][: len(own)], own)
    bare = {name.removeprefix(prefix): t for name, t in tensors.items() if "lm_head" not in name}
    assert not opened({**bare, "lm_head.weight": own}).config.tie_embeddings
    assert "note" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"lm_head.weight is \[3, 32\] instead of"):
        opened({**tensors, "lm_head.weight": own[:3]})
    edit(folder, "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"missing lm_head.weight\n.*tie_word_embeddings = true"):
        opened({**without, table: own})


def test_buffers_of_old_files_are_passed_over_and_other_tensors_named(tmp_path):
    folder = hf_folder(tmp_path / "model", "llama")
    file = folder / "model.safetensors"
    tensors, buffer = load_file(file), np.ones(4, np.float32)
    names = ("rotary_emb.inv_freq", "layers.0.self_attn.rotary_emb.cos_cached")
    save_file({**tensors, **{f"model.{name}": buffer for name in names}}, file)
    pretrained.open_checkpoint(folder)
    save_file({**tensors, "v_head.summary.weight": buffer}, file)
    with pytest.raises(UserError, match=r"extra v_head\.summary\.weight"):
        pretrained.open_checkpoint(folder)


VARIANTS = {
    "gpt2": [
        {"mlp": "quick_gelu", "scale_scores_by_layer": True},
        {"mlp": "relu", "query_pre_attn_scalar": 1},
        {"mlp": "silu"},
    ],
    "gpt_neox": [{"bias": "mlp", "mlp": "relu"}],
    "llama": [{"bias": "mlp"}, {"bias": "all", "mlp": "geglu"}],
    "gemma2": [{"bias": "attention", "mlp": "swiglu"}],
    "phi3": [{"head_dim": 12, "mlp": "geglu"}],
    "qwen2": [{"head_dim": 12}],
}


def variant(family, changes):
    """A tiny checkpoint of a family with other settings, its weights random."""
    config = dataclasses.replace(tiny_checkpoint(family).config, **changes)
    params = jax.tree.map(np.asarray, random_params(config))
    return pretrained.Pretrained(config, params, None)


@pytest.mark.parametrize("family", VARIANTS)
def test_variants_survive_a_round_trip(family, tmp_path):
    for number, changes in enumerate(VARIANTS[family]):
        checkpoint = variant(family, changes)
        formats.write_checkpoint(tmp_path / str(number), checkpoint)
        again = pretrained.read_checkpoint(tmp_path / str(number))
        written = dataclasses.asdict(again.config)
        assert {key: written[key] for key in changes} == changes
        before, after = tree.flatten(checkpoint.params), tree.flatten(again.params)
        assert before.keys() == after.keys()
        for path in before:
            if path.startswith("blocks/"):
                np.testing.assert_array_equal(before[path], after[path])


def test_variants_generate_with_a_cache_as_they_compute(tmp_path):
    """From int8 weights too: each next token is that of the full forward pass."""
    changes = {"scale_scores_by_layer": True, "query_pre_attn_scalar": 1, "mlp": "quick_gelu"}
    formats.write_checkpoint(tmp_path / "m", variant("gpt2", changes))
    lm = gptjax.load(tmp_path / "m", weights="int8")
    prompt = [3, 1, 4, 1, 5]
    tokens = prompt + lm.generate([prompt], max_new_tokens=6)[0].tokens
    best = lm.logits([tokens])[0].argmax(-1)
    assert list(best[len(prompt) - 1 : -1]) == tokens[len(prompt) :]


def test_what_gguf_cannot_hold_of_the_variants_is_refused(tmp_path):
    pytest.importorskip("gguf")
    for family in ("gpt2", "llama"):
        for changes in [c for c in VARIANTS[family] if "mlp" in c]:
            with pytest.raises(UserError, match="GGUF file does not carry mlp = "):
                formats.write_checkpoint(tmp_path / "m.gguf", variant(family, changes), form="gguf")
    biased = variant("llama", {"bias": "mlp"})
    formats.write_checkpoint(tmp_path / "m.gguf", biased, form="gguf")
    assert pretrained.open_checkpoint(tmp_path / "m.gguf").config.bias == "mlp"
