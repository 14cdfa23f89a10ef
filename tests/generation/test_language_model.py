"""The model handle: smaller weights and caches, checkpoints read a layer at a time."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import byte_level_tokenizer, tiny_checkpoint
from helpers import PROMPTS, tiny_language_model

from gptjax.checkpoints import formats, pretrained, safetensors
from gptjax.config.errors import UserError
from gptjax.generation import guided, language_model
from gptjax.generation import loop as decode_loop
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.weights import weight_shapes
from gptjax.model.kv_cache import init_cache
from gptjax.model.quantize import block_of, gates_apart, inference_params


@pytest.fixture(scope="module")
def lm():
    return tiny_language_model()


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_smaller_weights_stay_close(weights, lm):
    small = tiny_language_model(weights=weights)
    tokens = np.random.default_rng(0).integers(0, 264, (2, 30))
    exact = lm.logits(tokens)
    gap = np.abs(small.logits(tokens) - exact).max() / np.abs(exact).max()
    assert 0 < gap < (0.02 if weights == "bfloat16" else 0.05)
    block = block_of(small._weights, 0)
    for layer in (block["mlp"]["up"], block["attn"]["qkv"]):
        assert layer["rows"].dtype == weights
    assert len(small.generate([[1, 2, 3]], max_new_tokens=5)[0].tokens) == 5


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_smaller_caches_stay_close(cache_dtype, lm):
    small = tiny_language_model(cache_dtype=cache_dtype)
    prompt = PROMPTS[3]
    tokens = np.zeros((1, decode_loop.bucket(36, 64, 32)), np.int32)
    tokens[0, :35] = prompt
    hidden = {}
    for model in (lm, small):
        cache = decode_loop.prefill(
            model._inference_config,
            model._weights,
            tokens,
            np.array([35], np.int32),
            cache_dtype=model.cache_dtype,
        )
        x, _ = decode_loop.feed(
            model._inference_config, model._weights, jnp.asarray(tokens), jnp.asarray([35]), cache
        )
        hidden[model.cache_dtype] = np.asarray(x)
        assert cache["k"].dtype == (cache_dtype if model is small else "float32")
    gap = np.abs(hidden[cache_dtype] - hidden[""]).max() / np.abs(hidden[""]).max()
    assert 0 < gap < 0.03


@pytest.fixture
def stored(tmp_path):
    formats.write_checkpoint(
        tmp_path / "hf", tiny_checkpoint("llama", context=256, tokenizer=byte_level_tokenizer())
    )
    return tmp_path / "hf"


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_stored_weights_are_read_a_layer_at_a_time_as_they_are_at_once(stored, weights):
    checkpoint = pretrained.read_checkpoint(stored)
    at_once, by_layer = (
        LanguageModel(checkpoint.config, checkpoint.params, None, weights=weights),
        language_model.load(stored, weights=weights),
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, at_once._weights, by_layer._weights))
    assert jax.tree.map(
        lambda a: (a.shape, a.dtype), weight_shapes(by_layer.config, weights)
    ) == jax.tree.map(lambda a: (a.shape, a.dtype), by_layer._weights)
    assert jax.tree.all(jax.tree.map(np.array_equal, checkpoint.params, by_layer.params))


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.8, top_k=5),
        dict(n=2, repetition_penalty=1.1),
        dict(stop="a", banned=["b"]),
    ],
)
def test_programs_are_compiled_while_weights_are_read(stored, options):
    compiled, listen = (
        [],
        lambda event, seconds, fun_name="", **_: (
            compiled.append(fun_name) if "mlir" in event else None
        ),
    )
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with language_model.load_lazily(stored) as lm:
            lm.compile("the cat", max_new_tokens=20, **options)
        assert {"jit(prefill)", "jit(advance)"} <= set(compiled)
        compiled.clear()
        completions = lm.generate(["the cat"], max_new_tokens=20, **options)
        assert not {"jit(prefill)", "jit(advance)"} & set(compiled)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert completions == language_model.load(stored).generate(
        ["the cat"], max_new_tokens=20, **options
    )


def test_a_look_at_the_parameters_disturbs_no_reading(stored, monkeypatch):
    part = safetensors.LazyParams.part
    monkeypatch.setattr(
        safetensors.LazyParams, "part", lambda self, layer: (time.sleep(0.2), part(self, layer))[1]
    )
    with language_model.load_lazily(stored) as lm:
        looked = lm.params
    assert lm.params is looked and lm.source.params is looked
    assert lm.generate([[5, 9]], max_new_tokens=3) == language_model.load(stored).generate(
        [[5, 9]], max_new_tokens=3
    )


def test_a_fault_ends_the_reading(stored, monkeypatch):
    read = []
    monkeypatch.setattr(
        safetensors.LazyParams,
        "part",
        lambda self, layer, part=safetensors.LazyParams.part: (
            time.sleep(0.2),
            part(self, layer),
            read.append(layer),
        )[1],
    )
    with pytest.raises(UserError, match="context"), language_model.load_lazily(stored) as lm:
        lm.compile("the cat " * 100)
    assert len(read) < 3
    with pytest.raises(UserError, match="ended before all was read"):
        _ = lm.params


def test_a_chat_model_ends_where_its_template_ends_an_answer():
    """Its config names another, as a base model does that was given a template."""
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = byte_level_tokenizer(template)
    base, end = tokenizer.control["<|endoftext|>"], tokenizer.control["<|im_end|>"]
    tokenizer.eos_ids = (base,)
    lm = tiny_language_model(tokenizer=tokenizer)
    assert lm.eos_ids == (base, end)
    options = {"max_new_tokens": 5, "logit_bias": {end: 100.0}}
    assert lm.generate("the", **options).finish_reason == "stop"
    tokenizer.chat_template = ""
    assert lm.eos_ids == (base,) and len(lm.generate("the", **options).tokens) == 5


@pytest.mark.parametrize("form", ["apart", "gates apart"])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_rows_of_a_training_base_are_taken_in_any_form(form, implementation):
    checkpoint = tiny_checkpoint("llama", context=64)
    rows = inference_params(jax.tree.map(jnp.asarray, checkpoint.params), weights="int8")
    if form == "gates apart":
        rows = gates_apart(rows)
    config = dataclasses.replace(checkpoint.config, implementation=implementation)
    tokens = np.arange(20)[None]
    expected = LanguageModel(config, checkpoint.params, None, weights="int8")
    got = LanguageModel(config, rows, None, weights="int8")
    np.testing.assert_allclose(got.logits(tokens), expected.logits(tokens), atol=1e-5)
    prompt = tokens[0].tolist()
    texts = [lm.generate([prompt], max_new_tokens=5)[0].tokens for lm in (got, expected)]
    assert texts[0] == texts[1]


def test_weights_are_copies_on_the_device(lm):
    own = {id(leaf) for leaf in jax.tree.leaves(lm.params)}
    for leaf in jax.tree.leaves(lm._weights):
        assert isinstance(leaf, jax.Array) and id(leaf) not in own


def test_programs_of_a_cpu_do_not_grow_with_the_layers():
    def size(layers):
        model = tiny_language_model("llama", layers=layers)._model
        cache = init_cache(model.config, 2, 64)
        arguments = (np.ones((2, 3), np.int32), cache)
        program = guided.forward.call(model.config, model.params, *arguments).lowered()
        return len(program.compile().as_text())

    assert size(6) < 1.1 * size(2)
