"""Exported folders in transformers' own hands: ids, text, generation, pipelines with batches."""

import json

import jax
import numpy as np
import pytest
from conftest import (
    FAMILIES,
    byte_level_tokenizer,
    make_config,
    random_params,
    tiny_checkpoint,
)
from published_kinds import NAMES, build, strings

import gptjax
from gptjax.checkpoints import formats, pretrained

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'gptjax[parity]'")
T = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'gptjax[parity]'"
)
STRINGS = strings()


def source_of(kind, folder):
    """A tiny Llama with the tokenizer of a published kind."""
    formats.write_checkpoint(folder, tiny_checkpoint("llama", vocab=kind.size, keep={}))
    for name, data in kind.files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", [name for name in NAMES if "tokenizer.json" in build(name).files])
def test_transformers_reads_ids_and_text_of_an_export(name, tmp_path):
    """As the kind's own files say: a class that transformers derives of them may say otherwise."""
    kind = build(name)
    done = formats.convert(source_of(kind, tmp_path / "source"), tmp_path / "copy", form="hf")
    assert done["texts cut alike"] == 1000
    reference = T.PreTrainedTokenizerFast.from_pretrained(tmp_path / "copy")
    rows = reference(STRINGS, add_special_tokens=False).input_ids
    ours = pretrained.open_checkpoint(tmp_path / "copy").tokenizer
    controls = [text for text in kind.control if text]
    for text, row, own in zip(STRINGS, rows, ours.encode_batch(STRINGS), strict=True):
        if not any(control in text for control in controls):
            assert row == kind.encode(text) == own.tolist(), repr(text[:200])
    for text in STRINGS[:200]:
        ids = kind.encode(text)
        decoded = reference.decode(ids, skip_special_tokens=True)
        if not reference.clean_up_tokenization_spaces:
            assert decoded == kind.decode(ids), repr(text[:200])


@pytest.mark.parametrize("name", ["llama3", "smollm", "sentencepiece_bpe"])
def test_what_came_from_gguf_generates_in_transformers(name, tmp_path):
    """A Hugging Face folder to GGUF, and back: the same ids and the same text."""
    kind = build(name)
    source = source_of(kind, tmp_path / "source")
    formats.convert(source, tmp_path / "m.gguf", form="gguf")
    formats.convert(tmp_path / "m.gguf", tmp_path / "back", form="hf")
    tokenizer = T.AutoTokenizer.from_pretrained(tmp_path / "back")
    net = T.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert net.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(kind.end)
    for prompt in ("the king said", "Grüße 2024"):
        ids = tokenizer(prompt).input_ids
        assert ids == [*kind.prefix, *kind.encode(prompt)]
        with torch.no_grad():
            out = net.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        made = out[0, len(ids) :].tolist()
        for place in (source, tmp_path / "m.gguf"):
            lm = gptjax.load(place)
            completion = lm.generate(prompt, max_new_tokens=12, temperature=0)
            assert lm.tokenizer.decode(made) == completion.text
        # by the decoder of the file, which decides what bytes that are not UTF-8 become
        text = tokenizer.decode(made, skip_special_tokens=True)
        assert text == lm.tokenizer.decode_by_file(made)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_classifier_works_in_transformers_pipeline_in_batches(family, tmp_path):
    settings = dict(vocab_size=264, context=64, layers=2, labels=("low", "middle", "high"))
    config = make_config(model=settings | FAMILIES[family]).model
    params = jax.tree.map(np.asarray, random_params(config))
    checkpoint = pretrained.Pretrained(
        config, params, byte_level_tokenizer(), keep={"eos_token_id": 263}
    )
    formats.write_checkpoint(tmp_path / "out", checkpoint)
    classify = T.pipeline("text-classification", model=str(tmp_path / "out"), top_k=None)
    texts = ["the cat", "in", "a long text in the garden of the king", "the " * 300]
    batched = classify(texts, batch_size=4, truncation=True)
    for text, row in zip(texts, batched, strict=True):
        scores = {entry["label"]: entry["score"] for entry in row}
        assert set(scores) == {"low", "middle", "high"}
        (alone,) = classify([text], batch_size=1, truncation=True)
        assert scores == pytest.approx({e["label"]: e["score"] for e in alone}, abs=1e-5)
    again = pretrained.read_checkpoint(tmp_path / "out")
    assert again.config.labels == ("low", "middle", "high")


def test_named_templates_and_generation_config_are_transformers_too(tmp_path):
    tokenizer = byte_level_tokenizer()
    content = dict(tokenizer.files())
    settings = json.loads(content["tokenizer_config.json"])
    settings["chat_template"] = [
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "tool_use", "template": "tools"},
    ]
    content["tokenizer_config.json"] = json.dumps(settings).encode()
    checkpoint = tiny_checkpoint("llama", tokenizer=type(tokenizer)(content, [263]))
    checkpoint.generation = {"temperature": 0.5, "do_sample": True, "top_k": 7}
    for name, form in (("m.gguf", "gguf"), ("hf", "hf")):
        formats.write_checkpoint(tmp_path / name, checkpoint, form=form)
    formats.convert(tmp_path / "m.gguf", tmp_path / "back", form="hf")
    for name in ("hf", "back"):
        reference = T.AutoTokenizer.from_pretrained(tmp_path / name)
        assert reference.chat_template["tool_use"] == "tools"
        assert reference.chat_template["default"] == "{{ messages[0].content }}"
        generation = T.GenerationConfig.from_pretrained(tmp_path / name)
        assert (generation.temperature, generation.top_k) == (pytest.approx(0.5), 7)
    assert np.isfinite(formats.probe_logits(pretrained.read_checkpoint(tmp_path / "back"))).all()
