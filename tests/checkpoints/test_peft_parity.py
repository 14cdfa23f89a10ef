"""Classifiers and adapters against transformers and PEFT, in both directions."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import FAMILIES, byte_level_tokenizer, make_config, random_params, tiny_checkpoint
from helpers import adapter_config, adapters_for

import gptjax
from gptjax.checkpoints import formats, peft
from gptjax.model import head, lora, transformer

# warnings of these two libraries are not about this package
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'gptjax[parity]'")
T = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'gptjax[parity]'"
)
peft_library = pytest.importorskip(
    "peft", reason="peft is not installed: pip install 'gptjax[parity]'"
)
TOKENS = np.random.default_rng(0).integers(0, 260, (3, 20))
CLASSES = {"gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "gpt_neox": "GPTNeoX"}


def logits_of(net, tokens=TOKENS):
    with torch.no_grad():
        return net.eval()(torch.tensor(tokens)).logits.numpy()


def our_logits(c, params, tokens=TOKENS):
    return np.asarray(
        head.unembed(c, params, transformer.apply(c, params, jax.numpy.asarray(tokens))[0])
    )


@pytest.mark.parametrize("family", CLASSES)
def test_a_classifier_has_equal_logits_there(tmp_path, family):
    checkpoint = tiny_checkpoint(family, vocab=264, tokenizer=byte_level_tokenizer())
    config = dataclasses.replace(checkpoint.config, labels=("bad", "fine", "good"))
    params = jax.tree.map(np.asarray, random_params(config))
    formats.write_checkpoint(
        tmp_path / "out",
        dataclasses.replace(checkpoint, config=config, params=params, keep={"eos_token_id": 263}),
    )
    net = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(
        net
    ).__name__ == f"{CLASSES[family]}ForSequenceClassification" and net.config.id2label == {
        0: "bad",
        1: "fine",
        2: "good",
    }
    lm = gptjax.load(tmp_path / "out")
    expected = np.exp(logits_of(net))
    np.testing.assert_allclose(
        lm.classify(TOKENS.tolist()), expected / expected.sum(1, keepdims=True), atol=1e-5
    )
    # padded rows: transformers finds each last token by what is no padding, we by lengths
    ragged = np.where(np.arange(20) < np.array([[5], [20], [11]]), TOKENS, net.config.pad_token_id)
    expected = np.exp(logits_of(net, ragged))
    result = lm.classify([row[:n].tolist() for row, n in zip(TOKENS, (5, 20, 11), strict=True)])
    np.testing.assert_allclose(result, expected / expected.sum(1, keepdims=True), atol=1e-5)
    net.save_pretrained(tmp_path / "back")
    np.testing.assert_array_equal(
        gptjax.load(tmp_path / "back").params["score"]["kernel"], params["score"]["kernel"]
    )


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "phi3"])
def test_our_adapters_load_in_peft(tmp_path, family, dora):
    config = adapter_config(family, rank=3, alpha=5.0, dora=dora)
    base = tiny_checkpoint(family, vocab=264)
    trained = adapters_for(config, base.params)
    formats.write_checkpoint(tmp_path / "base", base)
    peft.write_adapter(
        tmp_path / "adapter", config.model, config.lora, trained, str(tmp_path / "base")
    )
    net = peft_library.PeftModel.from_pretrained(
        T.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    expected = our_logits(base.config, lora.apply_adapter(config.lora, base.params, trained))
    np.testing.assert_allclose(logits_of(net), expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected - our_logits(base.config, base.params)).max() > 1e-2


@pytest.mark.parametrize("kind", ["lora", "some targets", "rslora", "dora", "prompt"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_of_peft_load_here(tmp_path, family, kind):
    base = tiny_checkpoint(family, vocab=264)
    formats.write_checkpoint(tmp_path / "base", base)
    every = (
        ["c_attn", "c_proj", "c_fc"]
        if family == "gpt2"
        else ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    some = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    if kind == "prompt":
        settings = peft_library.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    else:
        flags = {
            "use_rslora": kind == "rslora",
            "use_dora": kind == "dora",
            "fan_in_fan_out": family == "gpt2",
            "lora_alpha": 6,
        }
        settings = peft_library.LoraConfig(
            r=2,
            target_modules=some if kind == "some targets" else every,
            task_type="CAUSAL_LM",
            **flags,
        )
    torch.manual_seed(0)
    net = peft_library.get_peft_model(
        T.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings
    )
    for name, p in net.named_parameters():
        if p.requires_grad:
            torch.nn.init.normal_(
                p, std=0.2
            ) if "magnitude" not in name else torch.nn.init.uniform_(p, 0.5, 2.0)
    net.save_pretrained(tmp_path / "adapter")
    lm = gptjax.load(tmp_path / "base").with_adapter(tmp_path / "adapter")
    expected = logits_of(net)
    if kind == "prompt":
        result = lm.logits(np.concatenate([np.zeros((3, 4), int), TOKENS], 1))
        expected = expected[:, -result.shape[1] :]
        result = result[:, -expected.shape[1] :]
    else:
        result = lm.logits(TOKENS)
    np.testing.assert_allclose(result, expected, atol=1e-4 * np.abs(expected).max())


def test_a_tuned_classifier_leaves_as_an_adapter(tmp_path):
    """Head and adapters in one PEFT folder give the probabilities of the merged model here."""
    base = tiny_checkpoint("llama", vocab=264)
    config = make_config(
        model=dict(vocab_size=264, context=64, labels=["a", "b"], **FAMILIES["llama"]),
        lora=dict(rank=2),
        train=dict(init_from="base"),
    )
    trained = {
        **adapters_for(config, base.params),
        "score": {"kernel": np.random.default_rng(3).standard_normal((2, 32)).astype(np.float32)},
    }
    formats.write_checkpoint(
        tmp_path / "base", dataclasses.replace(base, keep={"pad_token_id": 263})
    )
    peft.write_adapter(
        tmp_path / "adapter", config.model, config.lora, trained, str(tmp_path / "base")
    )
    net = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    net.config.pad_token_id = 263
    net = peft_library.PeftModel.from_pretrained(net, tmp_path / "adapter")
    expected = np.exp(logits_of(net))
    result = (
        gptjax.load(tmp_path / "base").with_adapter(tmp_path / "adapter").classify(TOKENS.tolist())
    )
    np.testing.assert_allclose(result, expected / expected.sum(1, keepdims=True), atol=1e-5)
