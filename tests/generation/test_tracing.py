"""Values of the forward pass: seen without a trace in the program, and changed on the way."""

import ast
import inspect
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, make_config, on_cpu, random_params
from helpers import adapters_for, tiny_language_model
from mesh_cases import family

from gptjax.config.errors import UserError
from gptjax.generation import tracing
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.tracing import ablate_head, patch
from gptjax.model import head, lora, transformer
from gptjax.model.kv_cache import init_cache
from gptjax.tokenizer.trained import ByteTokenizer

PROMPT, OTHER = [200, 1, 7, 7, 40, 41, 60, 3, 100], [5, 9, 30, 77, 12, 41, 60, 9, 11]
CLOSE = dict(atol=1e-5, rtol=1e-5)


QUICK = ("gpt_neox", "gemma2")


@pytest.mark.parametrize(
    "name", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_the_parts_are_those_that_the_logits_are_made_of(name):
    lm = tiny_language_model(name, layers=2)
    config = lm.config
    trace = lm.trace(PROMPT, names=tracing.DIMS)
    np.testing.assert_allclose(trace["logits"], lm.logits([PROMPT])[0], **CLOSE)
    residual, middle, after = (trace[n] for n in ("residual", "residual_middle", "residual_after"))
    np.testing.assert_allclose(residual[0], trace["embedding"], **CLOSE)
    np.testing.assert_allclose(residual + trace["attention_output"], middle, **CLOSE)
    np.testing.assert_allclose(middle + trace["mlp_output"], after, **CLOSE)
    np.testing.assert_array_equal(residual[1], after[0])
    pattern_LHTS = trace["pattern"]
    np.testing.assert_allclose(pattern_LHTS.sum(-1), 1, **CLOSE)
    assert not np.triu(pattern_LHTS, 1).any()
    if config.sliding_window:
        assert not pattern_LHTS[0, :, 8, : 9 - config.sliding_window].any()
        assert pattern_LHTS[1, :, 8, 0].all() == config.alternate_windows
    values_LTHC = np.repeat(trace["values"], config.heads // config.kv, axis=2)
    heads_LTHC = np.einsum("LHTS,LSHC->LTHC", pattern_LHTS, values_LTHC)
    np.testing.assert_allclose(trace["heads"], heads_LTHC, **CLOSE)
    scores_LHTS = np.einsum(
        "LTHC,LSHC->LHTS",
        trace["queries"],
        np.repeat(trace["keys"], config.heads // config.kv, axis=2),
    ) / np.sqrt(config.query_pre_attn_scalar or config.head_width)
    if cap := config.attention_softcap:
        scores_LHTS = cap * np.tanh(scores_LHTS / cap)
    seen = pattern_LHTS > 0
    np.testing.assert_allclose(trace["scores"][seen], scores_LHTS[seen], **CLOSE)
    if not config.post_norms:
        bias = lm.params["blocks"]["attn"]["out"].get("bias", np.zeros((2, 1)))[:, None]
        attention = trace["head_results"].sum(2) + bias
        np.testing.assert_allclose(trace["attention_output"], attention, **CLOSE)
    shapes = {n: (*v.shape,) for n, v in trace.items()}
    width, t = config.mlp_width, len(PROMPT)
    assert shapes["mlp_before"] == ((2, t, 2, width) if config.gated else (2, t, width))
    assert shapes["mlp_after"] == (2, t, width) and shapes["keys"][2] == config.kv


def test_prompts_of_several_lengths_are_traced_as_each_alone():
    lm = tiny_language_model("llama", layers=2, tokenizer=ByteTokenizer())
    prompts = ["The quick brown fox", "jumps", PROMPT]
    for trace, prompt in zip(lm.trace(prompts), prompts, strict=True):
        alone = lm.trace(prompt)
        assert trace.texts == alone.texts and list(trace.tokens) == lm.encode(prompt)
        assert set(trace) == set(tracing.DEFAULT_NAMES)
        for name in trace:
            np.testing.assert_allclose(trace[name], alone[name], err_msg=name, **CLOSE)
    assert lm.trace("The", names=["pattern"]).texts == ("T", "h", "e")


@pytest.mark.parametrize("name", ["gpt2", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_patching_everything_gives_the_other_run(name):
    lm = tiny_language_model(name, layers=2)
    source, own = lm.trace(OTHER), lm.trace(PROMPT)
    everywhere = [
        [patch(source, "embedding")],
        [patch(source, "residual", 1)],
        [patch(source, "final_norm")],
        [patch(source, "logits")],
        [patch(source, n, i) for n in ("attention_output", "mlp_output") for i in (0, 1)]
        + [patch(source, "embedding")],
    ]
    for interventions in everywhere:
        patched = lm.trace(PROMPT, interventions=interventions)
        if jax.__version_info__ >= (0, 12):
            np.testing.assert_array_equal(patched["logits"], source["logits"])
        else:  # its XLA fuses what is patched otherwise than what is computed
            np.testing.assert_allclose(patched["logits"], source["logits"], rtol=1e-5, atol=1e-5)
    for point in transformer.HOOK_POINTS:  # its own values change nothing
        layer = None if point in tracing.NO_LAYER else 1
        patched = lm.trace(PROMPT, interventions=[patch(own, point, layer)])
        np.testing.assert_allclose(patched["logits"], own["logits"], err_msg=point, **CLOSE)
        patched = lm.trace(PROMPT, interventions=[patch(source, point, layer)])
        assert abs(patched["logits"] - own["logits"]).max() > 1e-3, point


@pytest.mark.slow
def test_a_patch_at_a_position_changes_nothing_before_it():
    lm = tiny_language_model("llama", layers=2)
    source, own = lm.trace(OTHER), lm.trace(PROMPT)
    for point in ("residual", "queries", "pattern", "mlp_after"):
        patched = lm.trace(PROMPT, interventions=[patch(source, point, 1, [4])])
        np.testing.assert_array_equal(patched["logits"][:4], own["logits"][:4])
        assert (patched["logits"][4] != own["logits"][4]).any()
        if point != "residual":  # the last layer: nothing reads from position 4 but itself
            np.testing.assert_array_equal(patched["logits"][5:], own["logits"][5:])


def test_an_ablated_head_gives_zeros_or_its_mean():
    lm = tiny_language_model("qwen2", layers=2)
    own = lm.trace(PROMPT)
    zeroed = lm.trace(PROMPT, interventions=[ablate_head(1, 2)])
    expected = own["heads"].copy()
    expected[1, :, 2] = 0
    np.testing.assert_array_equal(zeroed["heads"], expected)
    meaned = lm.trace(PROMPT, interventions=[ablate_head(1, 2, mean=[own, lm.trace(OTHER)])])
    mean = np.concatenate([own["heads"], lm.trace(OTHER)["heads"]], 1)[1, :, 2].mean(0)
    np.testing.assert_allclose(meaned["heads"][1, :, 2], np.tile(mean, (9, 1)), **CLOSE)

    def same(name, value, layer):  # an intervention may be any pure function
        return value.at[:, :, 2].set(0) if (name, layer) == ("heads", 1) else value

    again = lm.trace(PROMPT, interventions=[same])
    np.testing.assert_array_equal(again["logits"], zeroed["logits"])


def test_other_numbers_compile_nothing():
    lm = tiny_language_model(layers=2)
    source = lm.trace(OTHER, names=["residual"])
    lm.trace(PROMPT, names=["logits"], interventions=[ablate_head(0, 1)])
    lm.trace(PROMPT, names=["logits"], interventions=[patch(source, "residual", 0, [1])])
    count = tracing._captured._cache_size()
    lm.trace(OTHER, names=["logits"], interventions=[ablate_head(1, 3)])
    lm.trace(PROMPT[:5], names=["logits"], interventions=[patch(source, "residual", 1, [2, 3])])
    assert tracing._captured._cache_size() == count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_traces_with_adapters_small_weights_and_on_a_mesh(name):
    shape = dict(vocab_size=265, vocab_multiple=1, context=64, layers=2)
    adapted = dict(lora=dict(rank=2, dora=True), train=dict(init_from="base"))
    config = make_config(model=family(name) | shape, **adapted)
    base = jax.tree.map(np.asarray, random_params(config.model))
    trained = adapters_for(config, base)
    params = lora.apply_adapter(config.lora, base, trained)
    lm = LanguageModel(config.model, params, None)
    merged = LanguageModel(config.model, lora.merge(config.lora, base, trained), None)
    trace = lm.trace(PROMPT, names=tracing.DIMS)
    sharded = LanguageModel(config.model, params, None, mesh="data=2,tensor=4")
    cases = {"merged": merged, "mesh": sharded}
    for case, other in cases.items():
        values = other.trace(PROMPT, names=tracing.DIMS)
        for point in trace:
            message = f"{case}, {point}"
            np.testing.assert_allclose(values[point], trace[point], err_msg=message, **CLOSE)
    int8 = LanguageModel(config.model, base, None, weights="int8")
    np.testing.assert_allclose(int8.trace(PROMPT)["logits"], int8.logits([PROMPT])[0], **CLOSE)


class _WithoutHooks(ast.NodeTransformer):
    """The source with each hook's call replaced by its value, and the branches for hooks gone."""

    def visit_Call(self, node):
        self.generic_visit(node)
        is_hook = isinstance(node.func, ast.Attribute) and node.func.attr.startswith("hooked")
        return node.args[1] if is_hook else node

    def visit_If(self, node):
        self.generic_visit(node)
        return node.orelse or None if "hook is not None" in ast.unparse(node.test) else node


def _lowered(apply, config):
    params, tokens = random_params(config), jnp.zeros((2, 8), jnp.int32)

    def loss(params):
        x, _ = apply(config, params, tokens, dropout_key=jax.random.key(0))
        return head.unembed(config, params, x).sum()

    return jax.jit(jax.value_and_grad(loss)).lower(params).as_text()


@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("cpu", marks=pytest.mark.slow)]
)
def test_the_program_without_a_hook_has_nothing_of_it(implementation, monkeypatch):
    source = ast.parse(inspect.getsource(transformer))
    plain = types.ModuleType("plain")
    monkeypatch.setitem(sys.modules, "plain", plain)
    stripped = ast.unparse(_WithoutHooks().visit(source))
    assert stripped.count("hooked(") == 1  # what is left defines it
    exec(compile(stripped, "plain", "exec"), plain.__dict__)
    for name, scan in (("gpt2", False), ("gemma2", True)):
        config = make_config(model=dict(**FAMILIES[name], scan_layers=scan, dropout=0.1)).model
        config = on_cpu(config, implementation)
        assert _lowered(transformer.apply, config) == _lowered(plain.apply, config)


def test_what_cannot_be_traced_is_refused_by_name():
    lm = tiny_language_model()
    with pytest.raises(UserError, match="no value 'patern'; did you mean 'pattern'"):
        lm.trace(PROMPT, names=["patern"])
    with pytest.raises(UserError, match="65 tokens and the model's context is 64"):
        lm.trace([[1] * 65])
    with pytest.raises(KeyError, match="heads was not kept"):
        lm.trace(PROMPT, names=["pattern"])["heads"]
    trace = lm.trace(PROMPT)
    with pytest.raises(ValueError, match="layer = None must be a layer's number"):
        patch(trace, "residual")
    with pytest.raises(ValueError, match="belongs to no layer"):
        patch(trace, "embedding", 0)
    cache = init_cache(lm.config, 1, 16)
    with pytest.raises(ValueError, match="give no cache"):
        transformer.apply(lm.config, {}, [], cache=cache, hook=lambda name, value, layer: value)
    classifier = tiny_language_model()
    classifier.config = make_config(model=dict(labels=("a", "b"))).model
    with pytest.raises(UserError, match="use classify"):
        classifier.trace(PROMPT)
