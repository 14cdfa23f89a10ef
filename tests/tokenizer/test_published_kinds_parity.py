"""Folders of published kinds read as transformers reads them."""

import json

import pytest
from published_kinds import NAMES, build, strings

from gptjax.tokenizer.pretrained import PretrainedTokenizer

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")
STRINGS = strings()

# transformers cuts a tokenizer.model by its class and not by the settings inside it
OF_LIBRARY = [name for name in NAMES if not name.startswith("sentencepiece")]


def open_both(files, folder, model_type="gpt2", eos_ids=()):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return PretrainedTokenizer.from_folder(folder, eos_ids), theirs


def check(ours, theirs, texts):
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids.tolist() == plain, repr(text[:100])
        assert ours.decode(plain) == theirs.decode(plain, skip_special_tokens=True)
        complete = theirs(text)["input_ids"]
        assert [*ours.bos_ids, *plain] == complete[: len(ours.bos_ids) + len(plain)]


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_text_of_all_strings_are_the_library_s(name, tmp_path):
    kind = build(name)
    for file, data in kind.files.items():
        (tmp_path / file).write_bytes(data)
    ours = PretrainedTokenizer.from_folder(tmp_path, [])
    for text, ids in zip(STRINGS, ours.encode_batch(STRINGS), strict=True):
        assert ids.tolist() == kind.encode(text), repr(text[:100])
        assert ours.decode(ids.tolist()) == kind.decode(ids.tolist()), repr(text[:100])


@pytest.mark.parametrize("name", OF_LIBRARY)
def test_folders(name, tmp_path):
    ours, theirs = open_both(build(name).files, tmp_path / "folder")
    assert set(ours.control) >= {token for token in theirs.all_special_tokens if token}
    assert ours.vocab_size == len(theirs)
    check(ours, theirs, STRINGS)


@pytest.mark.parametrize("name", ["unigram_t5", "bert_chinese", "gpt2"])
def test_clean_up_of_spaces(name, tmp_path):
    """It is for all models but BPE."""
    files = dict(build(name).files)
    settings = json.loads(files["tokenizer_config.json"])
    settings["clean_up_tokenization_spaces"] = True
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    ours, theirs = open_both(files, tmp_path / "folder")
    texts = [*STRINGS[:300], "he said ' no ' , and they 've n't . ! ?", "a . b , c 's d 'm"]
    check(ours, theirs, texts)


def test_tokens_that_only_the_settings_name(tmp_path):
    """A padding token that is nowhere else, a control token that tokenizer.json holds as text."""
    files = dict(build("gpt2").files)
    settings = {"eos_token": "<|endoftext|>", "pad_token": "[PAD]", "mask_token": "king"}
    files["tokenizer_config.json"] = json.dumps(
        settings | {"additional_special_tokens": ["<a>", "<b>"], "image_token": "<i>"}
    ).encode()
    ours, theirs = open_both(files, tmp_path / "folder")
    assert ours.vocab_size == len(theirs)
    for token in ("[PAD]", "<a>", "<b>", "<i>"):
        assert ours.control[token] == theirs.convert_tokens_to_ids(token), token
        assert ours.encode_template(f"a{token} b") == theirs(f"a{token} b")["input_ids"]
        assert ours.control[token] not in ours.encode(f"a{token} b")


@pytest.mark.parametrize("legacy", [True, False])
def test_templates_of_a_tokenizer_model(legacy, tmp_path):
    """Between control tokens, text has a space before it where it is legacy."""
    files = dict(build("sentencepiece_bpe").files)
    settings = json.loads(files["tokenizer_config.json"]) | {"legacy": legacy}
    settings["add_bos_token"] = True
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    files["added_tokens.json"] = json.dumps({"<|im_start|>": 600, "<|im_end|>": 601}).encode()
    ours, theirs = open_both(files, tmp_path / "folder", "llama")
    template = "<|im_start|>user\nthe king<|im_end|>\n<|im_start|>assistant\n"
    assert ours.encode_template(template) == theirs(template, add_special_tokens=False)["input_ids"]
    text = "the king said"
    assert [*ours.bos_ids, *ours.encode(text)] == theirs(text)["input_ids"]
