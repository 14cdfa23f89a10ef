"""Damaged, foreign and mistaken PEFT folders: each is refused in the words of its fault."""

import json

import numpy as np
import pytest
from conftest import random_params
from helpers import adapter_config, adapters_for
from safetensors.numpy import load_file, save_file

from gptjax.checkpoints import peft
from gptjax.checkpoints.peft_config import LoraFile, Module
from gptjax.config.errors import UserError
from gptjax.config.schema import LoraConfig
from gptjax.generation.language_model import LanguageModel


@pytest.fixture(scope="module")
def llama():
    config = adapter_config("llama", rank=2)
    base = random_params(config.model)
    return config, base, adapters_for(config, base)


def read(folder, llama):
    return peft.read_adapter(folder, llama[0].model, lambda: llama[1])


def write(folder, llama, *, drop=(), tensors=None, **keys):
    """Our adapter as a PEFT folder with other keys and tensors."""
    config, _, trained = llama
    peft.write_adapter(folder, config.model, config.lora, trained, "some/base")
    raw = json.loads((folder / peft.CONFIG).read_text()) | keys
    (folder / peft.CONFIG).write_text(json.dumps(raw))
    found = {k: v for k, v in load_file(folder / peft.WEIGHTS).items() if k not in drop}
    save_file(found | (tensors or {}), folder / peft.WEIGHTS)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
ROWS = np.ones((3, 32), np.float32)

# {what is wrong: (changes of the folder, the message)}
FAULTS = {
    "an unknown key": ({"lora_gamma": 2}, "the key 'lora_gamma' (= 2) is not known here"),
    "an unknown initialisation": (
        {"init_lora_weights": "zeros"},
        'init_lora_weights = "zeros" is not known here',
    ),
    "a quantised base": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        'init_lora_weights = "loftq" is not supported: the base that it was trained on was quanti',
    ),
    "no number": ({"r": "two"}, 'r = "two" is no number'),
    "no patterns": ({"rank_pattern": ["q_proj"]}, "rank_pattern = "),
    "a broken pattern": ({"alpha_pattern": {"(": 2}}, "holds no regular expression"),
    "a rank of another file": (
        {"rank_pattern": {"q_proj": 3}},
        "adapter_config.json says rank 3 and adapter_model.safetensors has 2",
    ),
    "a target less": ({"target_modules": ["q_proj"]}, "does not target it, so PEFT would leave"),
    "a tensor less": (
        {"drop": [f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"]},
        "layers.0.self_attn.q_proj: adapter_config.json targets it and adapter_model.safetensors",
    ),
    "half of an adapter": ({"drop": [f"{Q}.lora_A.weight"]}, "q_proj.lora_B.weight [32, 2]"),
    "a module that was to be saved": (
        {"modules_to_save": ["embed_tokens"]},
        "model.embed_tokens.weight: modules_to_save names it",
    ),
    "a larger vocabulary": (
        {"tensors": {"base_model.model.model.embed_tokens.weight": np.ones((300, 32), np.float32)}},
        "[300, 32] and the base's is [264, 32];\nthe adapter was trained on some/base",
    ),
    "a bias that the base does not have": (
        {"lora_bias": True, "tensors": {f"{Q}.lora_B.bias": ROWS[0]}},
        "1 tensors fit no layer of this llama model",
    ),
    "magnitudes without DoRA": (
        {"tensors": {f"{Q}.lora_magnitude_vector": ROWS[0]}},
        "use_dora = false and adapter_model.safetensors has a lora_magnitude_vector",
    ),
    "tokens that are not there": (
        {
            "trainable_token_indices": [1, 2, 999],
            "tensors": {
                "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": ROWS
            },
        },
        "trainable_token_indices [1, 2, 999] are not all of 264 tokens",
    ),
    "a classifier without its head": ({"task_type": "SEQ_CLS"}, "has no base_model.model.score"),
    "numbers that are not finite": (
        {"tensors": {f"{Q}.lora_A.weight": np.full((2, 32), np.nan, np.float32)}},
        "q_proj.lora_A.weight holds numbers that are not finite",
    ),
    "a method that is not read": (
        {"peft_type": "IA3"},
        'peft_type = "IA3" is not supported: LORA, PROMPT_TUNING and P_TUNING are; in PEFT, model.',
    ),
    "a method that cannot be merged": (
        {"peft_type": "PREFIX_TUNING"},
        "no complete checkpoint can hold this one: generate with PEFT",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_folder_is_named(tmp_path, llama, fault):
    changes, message = FAULTS[fault]
    write(tmp_path / "a", llama, **changes)
    with pytest.raises(UserError) as error:
        read(tmp_path / "a", llama)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_what_has_no_effect_is_listed_at_debug_only(tmp_path, llama, caplog):
    keys = {"peft_version": "9.9", "lora_dropout": 0.5, "inference_mode": False}
    write(tmp_path / "a", llama, **keys, use_qalora=False, layer_replication=None, future_key=None)
    with caplog.at_level("DEBUG", "gptjax"):
        read(tmp_path / "a", llama)
    text = caplog.text
    assert "lora_dropout has no effect: nothing is dropped at inference" in text
    assert "use_qalora = false asks for nothing" in text and "future_key" not in text


def test_a_pickle_file_is_not_opened(tmp_path, llama):
    write(tmp_path / "a", llama)
    (tmp_path / "a" / peft.WEIGHTS).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(UserError, match="a pickle file can run code"):
        read(tmp_path / "a", llama)


def test_a_folder_of_adapters_names_them(tmp_path, llama):
    for name in ("german", "french"):
        write(tmp_path / "a" / name, llama)
    lm = LanguageModel(llama[0].model, llama[1], None)
    with pytest.raises(UserError, match="several adapters: name one of its folders french, german"):
        lm.with_adapter(tmp_path / "a")


def test_a_second_adapter_is_refused(tmp_path, llama):
    write(tmp_path / "a", llama)
    lm = LanguageModel(llama[0].model, llama[1], None).with_adapter(tmp_path / "a")
    with pytest.raises(UserError, match=r"the adapter .*a is there already: load the base again"):
        lm.with_adapter(tmp_path / "a")


def test_targets_are_those_of_peft(tmp_path):
    """Names, patterns, layers and exclusions, by PEFT's documentation."""

    def targets(module, **keys):
        return LoraFile({"peft_type": "LORA", **keys}, tmp_path).targets(module)

    q = Module("model.layers.3.self_attn.q_proj")
    head = Module("lm_head", is_output=True)
    table = Module("model.embed_tokens", is_linear=False, is_input=True)
    assert targets(q, target_modules=["q_proj"]) and targets(q, target_modules=["self_attn.q_proj"])
    assert not targets(q, target_modules=["proj"]) and not targets(q, target_modules=[])
    assert targets(q, target_modules="all-linear") and targets(q)
    assert not targets(head, target_modules="all-linear")
    assert not targets(table, target_modules="All-Linear")
    assert targets(q, target_modules=r".*layers\.(3|4)\..*q_proj")
    assert not targets(q, target_modules=r"layers\.3\..*")  # all of the name
    assert targets(q, target_modules=["q_proj"], layers_to_transform=3)
    assert targets(
        q, target_modules=["q_proj"], layers_to_transform=[1, 3], layers_pattern="layers"
    )
    assert not targets(q, target_modules=["q_proj"], layers_to_transform=[2])
    assert not targets(q, target_modules=["q_proj"], layers_to_transform=3, layers_pattern="h")
    assert not targets(q, target_modules=["q_proj"], exclude_modules=["layers.3.self_attn.q_proj"])
    assert not targets(q, target_modules=["q_proj"], modules_to_save=["self_attn"])


def test_prompt_vectors_are_not_lost_in_an_export(tmp_path, llama):
    config, base, _ = llama
    prompts = {"embed": {"prompt": np.ones((3, 32), np.float32)}}
    settings = LoraConfig(prompt_tokens=3)
    peft.write_adapter(tmp_path / "p", config.model, settings, prompts, "some/base")
    lm = LanguageModel(config.model, base, None).with_adapter(tmp_path / "p")
    for form in ("hf", "gguf"):
        with pytest.raises(UserError, match="3 learned prompt tokens stand before every text"):
            lm.save(tmp_path / form, form=form)
