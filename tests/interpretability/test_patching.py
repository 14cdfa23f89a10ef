"""Sweeps of patches equal one patch at a time, and everything patched is the other run."""

import numpy as np
import pytest
from helpers import tiny_language_model

from gptjax.config.errors import UserError
from gptjax.generation.tracing import patch
from gptjax.interpretability.patching import patch_heads, patch_paths, patch_positions

SOURCE, INTO = [200, 1, 7, 7, 40, 41, 60, 3, 100], [200, 1, 9, 7, 40, 33, 60, 3, 101]
CLOSE = dict(atol=1e-5, rtol=1e-5)


def contrast(lm, prompt, interventions=()):
    logits = lm.trace(prompt, names=["logits"], interventions=interventions)["logits"][-1]
    return logits[5] - logits[77]


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_a_sweep_over_positions_is_each_patch_alone(name):
    lm = tiny_language_model(name, layers=2)
    source = lm.trace(SOURCE)
    for point in ("residual", "mlp_output"):
        sweep = patch_positions(lm, SOURCE, INTO, 5, against=77, name=point)
        assert sweep.values.shape == (2, len(INTO))
        assert sweep.source == pytest.approx(contrast(lm, SOURCE), abs=1e-5)
        assert sweep.into == pytest.approx(contrast(lm, INTO), abs=1e-5)
        for layer, position in ((0, 2), (0, 5), (1, 8), (1, 2)):
            one = contrast(lm, INTO, [patch(source, point, layer, [position])])
            assert sweep.values[layer, position] == pytest.approx(one, abs=1e-5)
    assert abs(sweep.restored).max() > 0.01
    equal = patch_positions(lm, SOURCE, INTO, 5, against=77).values[0, [0, 1, 3, 4]]
    np.testing.assert_allclose(equal, sweep.into, **CLOSE)  # the prompts are equal there


@pytest.mark.slow
def test_a_sweep_over_heads_is_each_patch_alone():
    lm = tiny_language_model("gemma2", layers=2)
    source, into = lm.trace(SOURCE), lm.trace(INTO)
    sweep = patch_heads(lm, SOURCE, INTO, 5, against=77)
    assert sweep.values.shape == (2, 4)
    for layer, head in ((0, 0), (1, 3)):

        def alone(name, value, number, layer=layer, head=head):
            if (name, number) != ("heads", layer):
                return value
            new = source["heads"][layer, :, head]
            return value.at[:, : len(new), head].set(new)

        assert sweep.values[layer, head] == pytest.approx(contrast(lm, INTO, [alone]), abs=1e-5)
    assert not np.allclose(source["heads"], into["heads"])


EVERYTHING = [("embedding",), *[(kind, i, *h) for kind, i, h in (("mlp", 0, ()), ("mlp", 1, ()))]]
EVERYTHING += [("head", layer, head) for layer in (0, 1) for head in range(4)]


@pytest.mark.parametrize("name", ["gpt2", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_all_paths_patched_are_the_other_run(name):
    lm = tiny_language_model(name, layers=2)
    senders = [EVERYTHING, [], EVERYTHING[3:]]
    sweep = patch_paths(lm, SOURCE, INTO, 5, against=77, senders=senders, freeze_mlps=True)
    assert sweep.values[0] == pytest.approx(sweep.source, rel=1e-6)  # batches of 2 rows and of 16
    assert sweep.values[1] == pytest.approx(sweep.into, abs=1e-5)
    direct = {
        name: lm.trace(prompt, names=["head_results", "residual_after"])
        for name, prompt in (("source", SOURCE), ("into", INTO))
    }
    if lm.config.post_norms:
        return
    # the heads alone: their results stand in the last state, and nothing else moves
    moved = [direct[n]["head_results"].sum((0, 2))[-1] for n in ("source", "into")]
    state = direct["into"]["residual_after"][-1].copy()
    state[-1] += moved[0] - moved[1]

    def last(name, value, layer):
        is_last = name == "residual_after" and layer == 1
        return value.at[:, len(INTO) - 1].set(state[-1]) if is_last else value

    assert sweep.values[2] == pytest.approx(contrast(lm, INTO, [last]), abs=1e-4)


@pytest.mark.slow
def test_a_path_to_a_receiver_goes_through_it_alone():
    lm = tiny_language_model("qwen2", layers=2)
    every = dict(against=77, senders=[EVERYTHING, []])
    to_query = patch_paths(lm, SOURCE, INTO, 5, receivers=[("queries", 1, 2)], **every)
    source = lm.trace(SOURCE)

    def alone(name, value, layer):
        if (name, layer) != ("queries", 1):
            return value
        new = source["queries"][1, :, 2]
        return value.at[:, : len(new), 2].set(new)

    assert to_query.values[0] == pytest.approx(contrast(lm, INTO, [alone]), abs=1e-5)
    assert to_query.values[1] == pytest.approx(to_query.into, abs=1e-5)
    by_head = patch_paths(lm, SOURCE, INTO, 5, against=77, receivers=[("keys", 1, 0)])
    assert by_head.values.shape == (2, 4)
    np.testing.assert_allclose(by_head.values[1], by_head.into, **CLOSE)  # they come after it
    assert abs(by_head.values[0] - by_head.into).max() > 1e-4


@pytest.mark.parametrize("freeze_mlps", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_path_to_the_logits_passes_no_other_head(freeze_mlps):
    lm = tiny_language_model("llama", layers=2)
    source, into = lm.trace(SOURCE), lm.trace(INTO)
    sweep = patch_paths(lm, SOURCE, INTO, 5, against=77, freeze_mlps=freeze_mlps)

    def held(name, value, layer):
        if name == "mlp_output" and freeze_mlps:
            return value.at[:, : len(INTO)].set(into[name][layer])
        if name != "heads":
            return value
        heads = into["heads"][layer].copy()
        if layer == 0:
            heads[:, 1] = source["heads"][0, :, 1]
        return value.at[:, : len(INTO)].set(heads)

    assert sweep.values[0, 1] == pytest.approx(contrast(lm, INTO, [held]), abs=1e-5)
    freely = patch_heads(lm, SOURCE, INTO, 5, against=77).values
    if not freeze_mlps:  # from the last layer there is no path through other heads
        np.testing.assert_allclose(sweep.values[1], freely[1], **CLOSE)
    assert abs(sweep.values[0] - freely[0]).max() > 1e-4


def test_what_cannot_be_patched_is_refused():
    lm = tiny_language_model()
    with pytest.raises(UserError, match="9 and 8 tokens: patching needs two of equal length"):
        patch_heads(lm, SOURCE, INTO[1:], 5)
    with pytest.raises(ValueError, match="'pattern' has no layers and positions"):
        patch_positions(lm, SOURCE, INTO, 5, name="pattern")
    with pytest.raises(ValueError, match="a sender 'neuron'"):
        patch_paths(lm, SOURCE, INTO, 5, senders=[[("neuron", 0)]])
