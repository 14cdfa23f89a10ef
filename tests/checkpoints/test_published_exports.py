"""Tokenizers of published kinds go through GGUF and Hugging Face, or are refused by name."""

import unicodedata
from pathlib import Path

import pytest
from published_kinds import NAMES, build, strings

from gptjax.checkpoints import formats, gguf_vocabulary, gguf_write_vocabulary
from gptjax.config.errors import UserError
from gptjax.tokenizer.pretrained import PretrainedTokenizer

STRINGS = strings()

# Kinds that a GGUF file holds: {name: what is said with it}.
HELD = {
    "gpt2": "",
    "llama3": "",
    "smollm": "",
    "sentencepiece_bpe": "",
    "sentencepiece_bpe_without_prefix": "",
    "qwen2": "normalises text to NFC",
    "neox": "normalises text to NFC",
    "o200k": "knows no combining marks",
    "gpt2_older_files": "",
    "qwen2_older_files": "normalises text to NFC",
    "neox_older_files": "normalises text to NFC",
}

# The others, and what they have that it cannot hold.
REFUSED = {
    "gpt2_with_prefix_space": "add_prefix_space, a space before the first word",
    "nfkc_lowercase": "the normalisation NFKC, Lowercase, StripAccents",
    "added_tokens": "single_word = true of the token 'king'; lstrip = true of the token 'people'",
    # these were trained by the library tokenizers, which keeps one way to make each piece
    "llama_legacy": "merges that scores of pieces cannot say",
    "llama_with_bos_and_eos": "merges that scores of pieces cannot say",
    "gemma": "merges that scores of pieces cannot say",
    "llama": "the normalisation Metaspace",
    "metaspace_bpe": "the pre-tokenizer Metaspace",
    "gpt1": "the pre-tokenizer BertPreTokenizer",
    "clip": "the pre-tokenizer Split",
    "unigram_t5": "a Unigram vocabulary",
    "unigram_without_metaspace": "a Unigram vocabulary",
    "bert_chinese": "a WordPiece vocabulary",
    "bert_older_files": "a WordPiece vocabulary",
    "word_level": "a WordLevel vocabulary",
    "word_level_by_spaces": "a WordLevel vocabulary",
    "sentencepiece_user_defined": "user-defined symbols that no space is written after",
    "sentencepiece_unigram": "a Unigram vocabulary",
    "sentencepiece_defaults": "a Unigram vocabulary",
    "sentencepiece_characters": "a vocabulary of characters",
    "sentencepiece_words": "a vocabulary of words",
}


def opened(kind, folder):
    folder.mkdir()
    for name, data in kind.files.items():
        (folder / name).write_bytes(data)
    return PretrainedTokenizer.from_folder(folder, [])


def exported(tokenizer, folder):
    """The tokenizer of a Hugging Face folder that was written from this one."""
    folder.mkdir()
    formats._write_tokenizer(folder, tokenizer, 64, None)
    return PretrainedTokenizer.from_folder(folder, tokenizer.eos_ids)


def check(kind, tokenizer, texts):
    """The library's own ids and text, on every string."""
    assert tokenizer.vocab_size == kind.size and list(tokenizer.bos_ids) == kind.prefix
    assert tokenizer.eos_ids == (tokenizer.control[kind.end],)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.tolist() == kind.encode(text), repr(text[:200])
    for text in texts[:200]:
        assert tokenizer.decode(kind.encode(text)) == kind.decode(kind.encode(text)), repr(text)


def test_every_kind_is_in_one_of_the_lists():
    assert sorted(NAMES) == sorted([*HELD, *REFUSED])


@pytest.mark.parametrize("name", NAMES)
def test_through_a_hugging_face_folder(name, tmp_path):
    kind = build(name)
    again = exported(opened(kind, tmp_path / "source"), tmp_path / "copy")
    check(kind, again, STRINGS[:300])


@pytest.mark.parametrize("name", HELD)
def test_through_gguf_and_back_to_hugging_face(name, tmp_path, capsys):
    kind = build(name)
    source = opened(kind, tmp_path / "source")
    capsys.readouterr()
    fields = gguf_write_vocabulary.vocabulary_fields(source, kind.size + 5, "m")
    said = capsys.readouterr().err
    assert HELD[name] in said and bool(said) == bool(HELD[name])
    tokenizer = gguf_vocabulary.read_tokenizer(fields, Path("m.gguf"))
    composes = "NFC" in HELD[name]
    texts = [unicodedata.normalize("NFC", text) for text in STRINGS] if composes else STRINGS
    check(kind, tokenizer, texts)
    check(kind, exported(tokenizer, tmp_path / "back"), texts[:300])
    # and once more: what a GGUF file gave can be written into one
    again = gguf_write_vocabulary.vocabulary_fields(tokenizer, kind.size + 5, "m")
    check(kind, gguf_vocabulary.read_tokenizer(again, Path("m.gguf")), texts[:300])


@pytest.mark.parametrize("name", REFUSED)
def test_what_gguf_cannot_hold_is_refused_by_name(name, tmp_path):
    kind = build(name)
    with pytest.raises(UserError) as refusal:
        gguf_write_vocabulary.vocabulary_fields(opened(kind, tmp_path / "f"), kind.size, "m")
    assert REFUSED[name] in str(refusal.value)
    assert str(refusal.value).endswith("use --format=hf")
