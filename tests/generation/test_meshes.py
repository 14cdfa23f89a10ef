"""A request's text, and every score, on a mesh are those of one device."""

import re

import jax
import numpy as np
import pytest
from conftest import byte_level_tokenizer, make_config, random_params
from helpers import PROMPTS, adapters_for
from mesh_cases import family

from gptjax.config.errors import UserError
from gptjax.core import tree
from gptjax.evaluation.held_out import text_scores
from gptjax.generation import engine, meshes, requests
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.loop import InferenceModel
from gptjax.generation.options import GenerationOptions
from gptjax.generation.weights import inference_config, weight_shapes
from gptjax.model import lora
from gptjax.runtime import sharding
from gptjax.runtime.mesh import make_mesh

SAMPLED = dict(max_new_tokens=10, temperature=1.0, top_p=0.95, seed=5, n=3)


def config_of(name, **sections):
    # a vocabulary that 8 devices do not divide
    shape = dict(vocab_size=265, vocab_multiple=1, context=64, layers=1)
    model = family(name) | shape | sections.pop("model", {})
    return make_config(model=model, **sections)


def model_of(config, mesh="", **options):
    params = jax.tree.map(np.asarray, random_params(config.model))
    if config.lora.on:
        params = lora.apply_adapter(config.lora, params, adapters_for(config, params))
    tokenizer = byte_level_tokenizer()
    tokenizer = None if config.model.labels else tokenizer
    return LanguageModel(config.model, params, tokenizer, mesh=mesh, **options)


def assert_same(completions, expected):
    assert [c.tokens for c in completions] == [c.tokens for c in expected]
    assert [c.text for c in completions] == [c.text for c in expected]
    for completion, other in zip(completions, expected, strict=True):
        np.testing.assert_allclose(completion.logprobs, other.logprobs, atol=1e-4)


ADAPTED = dict(lora=dict(rank=2, dora=True), train=dict(init_from="base"))
CASES = {
    "gpt2": (config_of("gpt2"), {}),
    "llama, DoRA": (config_of("llama", **ADAPTED), {}),
    "qwen2, int8": (config_of("qwen2"), dict(weights="int8", cache_dtype="int8")),
}


def test_sampled_texts_are_those_of_one_device():
    config, options = CASES["qwen2, int8"]
    completions, expected = (
        model_of(config, mesh, **options).generate(PROMPTS[:3], **SAMPLED)
        for mesh in ("data=2,tensor=4", "")
    )
    assert_same(completions, expected)


def test_guided_texts_are_those_of_one_device():
    guided = SAMPLED | dict(n=1, regex="(a long beginning|b), [a-z]{3,8}!", max_new_tokens=40)
    alone, together = (model_of(CASES["gpt2"][0], mesh) for mesh in ("", "data=2,tensor=4"))
    together.compile(PROMPTS[0], regex="xyzxyz[ab]", max_new_tokens=9)
    assert_same(together.generate(PROMPTS[:3], **guided), alone.generate(PROMPTS[:3], **guided))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mesh", ["data=8", "tensor=-1", "data=2,tensor=4", "data=3,tensor=2"])
def test_texts_and_scores_are_those_of_one_device(name, mesh):
    config, options = CASES[name]
    alone, together = model_of(config, **options), model_of(config, mesh, **options)
    assert_same(together.generate(PROMPTS[:3], **SAMPLED), alone.generate(PROMPTS[:3], **SAMPLED))
    greedy = dict(max_new_tokens=10, prompt_logprobs=True)
    (expected,) = alone.generate(PROMPTS[:1], **greedy)
    (completion,) = together.generate(PROMPTS[:1], **greedy)
    assert_same([completion], [expected])
    np.testing.assert_allclose(completion.prompt_logprobs, expected.prompt_logprobs, atol=1e-4)
    assert "".join(together.stream(PROMPTS[0], max_new_tokens=10)) == expected.text
    documents = ["the fox and the dog", "a cat"]
    for score, metric in text_scores(alone, iter(documents)).items():
        value = text_scores(together, iter(documents))[score].value
        assert value == pytest.approx(metric.value, rel=1e-5)


@pytest.mark.slow
def test_beams_guesses_and_slides_are_those_of_one_device():
    config = config_of("gpt2", model=dict(context=32))
    alone, together = model_of(config), model_of(config, "data=2,tensor=4")
    for options in (
        dict(num_beams=3, n=2, max_new_tokens=8),
        dict(num_speculative_tokens=2, max_new_tokens=12),
        dict(overflow="slide", max_new_tokens=50, temperature=1.0),
    ):
        prompts = [prompt[:20] for prompt in PROMPTS[:3]]
        assert_same(together.generate(prompts, **options), alone.generate(prompts, **options))
    guess = dict(max_new_tokens=12)
    assert_same(
        together.generate(PROMPTS[:1], draft=together, **guess),
        alone.generate(PROMPTS[:1], draft=alone, **guess),
    )
    with pytest.raises(UserError, match="give it the mesh of the model"):
        together.generate(PROMPTS[:1], draft=alone, **guess)


def test_classes_are_those_of_one_device():
    config = config_of("qwen2", model=dict(labels=tuple("abc")))
    probabilities = [model_of(config, mesh).classify(PROMPTS) for mesh in ("", "data=4,tensor=2")]
    np.testing.assert_allclose(*probabilities, atol=1e-5)


@pytest.mark.slow
def test_the_parameters_of_a_run_move_to_the_devices_of_its_texts():
    """fsdp and context become as much tensor as the heads allow."""
    config = config_of("llama", model=dict(vocab_multiple=64, kv_heads=4), mesh=dict(fsdp=8))
    mesh = make_mesh(config)
    params = random_params(config.model)
    placed = jax.device_put(params, sharding.shardings(mesh, params))
    with jax.set_mesh(mesh):
        lm = LanguageModel(config.model, placed, None, mesh=mesh)
        completions = lm.generate(PROMPTS[:2], max_new_tokens=8)
    assert lm.mesh.shape["tensor"] == 4 and lm.mesh.shape["data"] == 2
    alone = model_of(config)
    assert [c.tokens for c in completions] == [
        c.tokens for c in alone.generate(PROMPTS[:2], max_new_tokens=8)
    ]
    share = max(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(lm._weights))
    assert share == lm._weights["embed"]["rows"].nbytes // 4
    assert tree.bytes_on_device(lm._weights, jax.devices()[0]) < tree.nbytes(lm._weights) / 3.9


def test_the_loop_updates_caches_in_place_and_gathers_logits_alone():
    config = config_of("llama").model
    mesh = meshes.make(dict(data=2, tensor=4), jax.devices())
    model = InferenceModel(
        inference_config(config, "float32", mesh), weight_shapes(config, "float32", mesh), "", mesh
    )
    request = requests.build_request(
        PROMPTS,
        GenerationOptions(max_new_tokens=8),
        tokenizer=None,
        context=64,
        eos_ids=[1],
        banned=[],
    )
    advance, _ = engine.first_calls(model, request)
    program = advance.lowered().compile()
    text = program.as_text()
    gathered = re.findall(r"= f32\[(\S+?)\]\S* all-gather\(", text)
    assert gathered == ["2,268"], gathered  # two rows a device; 265 tokens and 3 that fill up
    cache = 2 * 2 * 2 * 96 * 4 * 4  # keys and values of 2 rows and 2 heads, 96 slots, width 4
    assert program.memory_analysis().alias_size_in_bytes >= cache


@pytest.mark.parametrize(
    ("mesh", "part"),
    [
        ("tensor=3", "tensor=3 does not divide the model's 8 key/value heads"),
        ("fsdp=2", "generation has no axis fsdp"),
        ("heads=2", "axis of the mesh"),
        ("data=16", "needs 16 devices and there are 8"),
        ("data", "must be a number"),
        ("data=0", "must be a number"),
    ],
)
def test_meshes_that_do_not_fit_are_refused_by_name(mesh, part):
    with pytest.raises(UserError, match=re.escape(part)):
        model_of(config_of("gpt2"), mesh)
