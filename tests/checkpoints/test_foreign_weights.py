"""Weights and folders of other kinds: each is refused as what it is, with a way out."""

import json

import numpy as np
import pytest
from conftest import tiny_checkpoint
from safetensors.numpy import load_file, save_file

import gptjax
from gptjax.checkpoints import formats
from gptjax.config.errors import UserError

ONE = np.ones(1, np.float32)
DOWN = "model.layers.0.mlp.down_proj."

# {name: (quantization_config or none, tensors in place of a matrix or beside it, the format)}
QUANTISED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, {"qweight": np.ones((4, 4), np.int32)}, "GPTQ"),
    "gptq without its config": (None, {"qzeros": np.ones((4, 4), np.int32)}, "GPTQ or AWQ"),
    "awq": ({"quant_method": "awq"}, {"qweight": np.ones((4, 4), np.int32)}, "AWQ"),
    "bnb nf4": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"},
        {"weight": np.ones((32, 1), np.uint8), "weight.quant_map": ONE},
        "bitsandbytes nf4",
    ),
    "bnb nf4 by tensors": (
        None,
        {"weight.quant_state.bitsandbytes__nf4": ONE},
        "bitsandbytes in 4 bits",
    ),
    "bnb int8": (None, {"weight": np.ones((32, 64), np.int8), "SCB": ONE}, "bitsandbytes int8"),
    "fp8": ({"quant_method": "fp8"}, {"weight_scale_inv": ONE}, "fp8"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors"},
        {"weight": np.ones((32, 64), np.int8), "weight_scale": ONE},
        "compressed-tensors",
    ),
    "packed": (None, {"weight_packed": np.ones((4, 4), np.int32)}, "compressed-tensors"),
    "hqq": (None, {"W_q": np.ones((4, 4), np.uint8)}, "HQQ"),
    "int8 alone": (None, {"weight": np.ones((32, 64), np.int8)}, "int8"),
    "mlx": (None, {"weight": np.ones((32, 8), np.uint32), "scales": ONE, "biases": ONE}, "MLX"),
}


def llama(path):
    formats.write_checkpoint(path, tiny_checkpoint("llama"))
    return path


def edit(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_checkpoints_are_said_to_be(name, tmp_path):
    config, tensors, expected = QUANTISED[name]
    folder = llama(tmp_path / "m")
    if config:
        edit(folder / "config.json", quantization_config=config)
    file = folder / "model.safetensors"
    save_file({**load_file(file), **{DOWN + key: t for key, t in tensors.items()}}, file)
    with pytest.raises(UserError) as error:
        gptjax.load(folder)
    text = str(error.value)
    assert f"this checkpoint is quantised with {expected}" in text
    assert "use the unquantised checkpoint that it was made of, or a GGUF of it" in text
    assert str(folder) in text
    assert len(text.splitlines()) <= 3


def test_a_config_that_asks_for_quantisation_of_plain_weights(tmp_path):
    folder = llama(tmp_path / "m")
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(folder / "config.json", quantization_config=config)
    with pytest.raises(UserError, match=r"remove quantization_config from config.json"):
        gptjax.load(folder)
    edit(folder / "config.json", quantization_config=None)
    gptjax.load(folder)


def write(folder, **contents):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_text(content)


ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
# {what the folder is: (how it is made, what is said)}
FOLDERS = {
    "empty": (lambda d: d.mkdir(), "is an empty folder"),
    "an adapter": (
        lambda d: write(d, adapter_config__json=ADAPTER, adapter_model__safetensors=""),
        "is a PEFT adapter.*\n.*--checkpoint=org/base --adapter=",
    ),
    "an adapter with its base's config": (
        lambda d: write(
            d,
            config__json='{"model_type": "llama"}',
            adapter_config__json=ADAPTER,
            adapter_model__safetensors="",
        ),
        "is a PEFT adapter",
    ),
    "a tokenizer": (lambda d: write(d, tokenizer__json="{}"), "holds a tokenizer and no model"),
    "nanoGPT's": (lambda d: write(d, ckpt__pt="x"), "ckpt.pt, a pickle.*\n.*save_pretrained"),
    "Meta's": (lambda d: write(d, params__json="{}", consolidated__pth="x"), "authors' own format"),
    "a GGUF in a folder": (lambda d: write(d, m__gguf="GGUF"), "Name the file itself: .*m.gguf"),
    "no config": (lambda d: write(d, model__safetensors="x"), "and no config.json"),
    "diffusers": (lambda d: write(d, model_index__json="{}"), "diffusers"),
    "something else": (lambda d: write(d, notes__txt="x"), "no workdir of gptjax.train"),
    "no model_type": (
        lambda d: write(d, config__json='{"architectures": ["LlamaForCausalLM"]}'),
        'add "model_type": "llama"',
    ),
    "no model_type, unknown": (lambda d: write(d, config__json='{"a": 1}'), "known: gpt2"),
    "bert": (lambda d: write(d, config__json='{"model_type": "bert"}'), "'bert'.*\n?.*gpt_neox"),
    "pickle": (
        lambda d: write(d, config__json='{"model_type": "llama"}', pytorch_model__bin="x"),
        "is a pickle.*\n.*safetensors",
    ),
    "a part without its index": (
        lambda d: (
            llama(d),
            (d / "model.safetensors").rename(d / "model-00001-of-00002.safetensors"),
        ),
        "parts need the index",
    ),
    "an index of absent parts": (
        lambda d: (
            llama(d),
            (d / "model.safetensors").unlink(),
            write(d, model__safetensors__index__json='{"weight_map": {"a": "x.safetensors"}}'),
        ),
        "1 of the 1 files that .* names are missing, x.safetensors",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_other_kinds_are_named(name, tmp_path):
    make, expected = FOLDERS[name]
    folder = tmp_path / "m"
    make(folder)
    with pytest.raises(UserError, match=expected) as error:
        gptjax.load(folder)
    assert str(folder) in str(error.value)
    assert len(str(error.value).splitlines()) <= 4


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    folder = llama(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "b.safetensors")
    parts = {"weight_map": dict.fromkeys(tensors, "a.safetensors") | {"x": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(parts))
    with pytest.raises(UserError, match=r"model.norm.weight is in a.safetensors and in b"):
        gptjax.load(folder)
