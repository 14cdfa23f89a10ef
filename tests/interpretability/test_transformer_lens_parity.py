"""Values of a trace and direct logit attribution against transformer-lens, with the same weights.

Skipped with a reason where it is not installed.
"""

import warnings

import numpy as np
import pytest
from conftest import byte_level_tokenizer
from helpers import tiny_language_model

from gptjax.generation import tracing
from gptjax.interpretability.attribution import direct_logits

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'gptjax[parity]'")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'gptjax[parity]'"
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own dependencies
    lens = pytest.importorskip(
        "transformer_lens",
        reason="transformer-lens is not installed: pip install 'gptjax[parity]'",
    )

PROMPT = [200, 1, 7, 7, 40, 41, 60, 3, 100]
NAMES = {  # ours: theirs, in a block
    "residual": "hook_resid_pre",
    "attention_input": "ln1.hook_out",
    "queries": "attn.hook_q",
    "keys": "attn.hook_k",
    "values": "attn.hook_v",
    "scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "heads": "attn.hook_z",
    "head_results": "attn.hook_result",
    "attention_output": "hook_attn_out",
    "residual_middle": "hook_resid_mid",
    "mlp_input": "ln2.hook_out",
    "mlp_before": "mlp.hook_pre",
    "mlp_after": "mlp.hook_post",
    "mlp_output": "hook_mlp_out",
    "residual_after": "hook_resid_post",
}
OF_FAMILY = {  # where a family's values have other names
    "gpt2": {},
    "llama": dict(queries="attn.hook_rot_q", keys="attn.hook_rot_k"),
    "qwen2": dict(queries="attn.hook_rot_q", keys="attn.hook_rot_k"),
}


@pytest.fixture(params=OF_FAMILY)
def both(request, tmp_path):
    """(our model, theirs, the names of their values)"""
    lm = tiny_language_model(request.param, layers=2, tokenizer=byte_level_tokenizer())
    lm.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="eager"
        )
        theirs = lens.TransformerBridge.boot_transformers(
            str(tmp_path), hf_model=net.eval(), device="cpu"
        )
        theirs.enable_compatibility_mode(disable_warnings=True, no_processing=True)
        theirs.set_use_attn_result(True)
    return lm, theirs, NAMES | OF_FAMILY[request.param]


def run(theirs):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return theirs.run_with_cache(torch.tensor([PROMPT]))


def test_every_value_that_both_have_is_the_same(both):
    lm, theirs, names = both
    trace = lm.trace(PROMPT, names=tracing.DIMS)
    logits, cache = run(theirs)
    for ours, name in names.items():
        for layer in range(2):
            value = cache[f"blocks.{layer}.{name}"][0].numpy()
            own = trace[ours][layer]
            if ours == "mlp_before" and lm.config.gated:
                up = cache[f"blocks.{layer}.mlp.hook_pre_linear"][0].numpy()
                value = np.stack([value, up], 1)
            if ours == "scores":
                seen = trace["pattern"][layer] > 0
                value, own = value[seen], own[seen]
            np.testing.assert_allclose(own, value, atol=1e-4, err_msg=f"{ours}, layer {layer}")
    embedding = cache["hook_embed"][0].numpy()
    if lm.config.positions == "learned":
        embedding = embedding + cache["hook_pos_embed"][0].numpy()
    np.testing.assert_allclose(trace["embedding"], embedding, atol=1e-4)
    np.testing.assert_allclose(trace["final_norm"], cache["ln_final.hook_out"][0], atol=1e-4)
    np.testing.assert_allclose(trace["logits"], logits[0], atol=1e-4)


def test_direct_logit_attribution_is_the_same(both):
    """Theirs folds the final norm's scale into the unembedding, and leaves biases out."""
    lm, theirs, _ = both
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.enable_compatibility_mode(
            disable_warnings=True,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
    _, cache = run(theirs)
    direct = direct_logits(lm, lm.trace(PROMPT), 5, against=77)
    tokens = dict(tokens=torch.tensor([5]), incorrect_tokens=torch.tensor([77]))
    heads = cache.stack_head_results(layer=-1, pos_slice=-1)
    attributed = cache.logit_attrs(heads, pos_slice=-1, **tokens)
    np.testing.assert_allclose(direct.heads.ravel(), attributed[:, 0].detach(), atol=1e-4)
    parts, labels = cache.decompose_resid(layer=-1, mode="mlp", pos_slice=-1, return_labels=True)
    attributed = cache.logit_attrs(parts, pos_slice=-1, **tokens)[:, 0].detach().numpy()
    theirs_by_name = dict(zip(labels, attributed, strict=True))
    for layer in range(2):
        assert direct.mlp[layer] == pytest.approx(theirs_by_name[f"{layer}_mlp_out"], abs=1e-4)
    embedding = theirs_by_name["embed"] + theirs_by_name.get("pos_embed", 0)
    assert direct.embedding == pytest.approx(embedding, abs=1e-4)
