"""The tokenizer that is trained here: what it sees of the texts, and which vocabularies fit."""

import random
import re

import pytest

from gptjax.config.errors import UserError
from gptjax.tokenizer import training_text
from gptjax.tokenizer.trained import SentencePieceTokenizer

CHINESE = "".join(chr(0x4E00 + i * i % 300) for i in range(4000))
DNA = "".join(random.Random(1).choices("ACGT", k=9000))


def lowest_vocab(texts):
    """What the message says of a vocabulary that is too small."""
    with pytest.raises(UserError, match="too small: the text has") as raised:
        SentencePieceTokenizer.train(texts, 260)
    return int(re.search(r"at least (\d+)", str(raised.value))[1])


@pytest.mark.parametrize(
    "text",
    [
        CHINESE,
        "\n".join(CHINESE[i : i + 40] for i in range(0, 4000, 40)),
        CHINESE * 5 + " " + CHINESE,  # spaces rarer than the coverage of characters
        DNA,
        "สวัสดีชาวโลกวันนี้อากาศดี" * 50,
        "\tif\tx:\n\t\treturn\tx\n" * 40,
        "a" * 9000,
        "😀🎉😀🏽" * 30,
        "a\r\nb\r\n" * 40,
        "\x00\x01\x7fab" * 40,
        "\u2581a\u2581" * 40,
        "▅a\nbcd e\n" * 40,
        "   ",
    ],
    ids=lambda text: repr(text[:6]),
)
def test_text_of_any_kind_gives_a_lossless_tokenizer(text):
    tokenizer = SentencePieceTokenizer.train([text], 800)
    for tried in (text, " a  b\n\nc\r\n\t", "漢 字"):
        assert tokenizer.decode(tokenizer.encode(tried)) == tried


@pytest.mark.parametrize("text", [CHINESE, "abcdefgh ij " * 40, "\tcode\x00⁇ " * 40])
def test_a_vocabulary_below_the_alphabet_is_refused_with_the_lowest(text):
    lowest = lowest_vocab([text])
    assert SentencePieceTokenizer.train([text], lowest).vocab_size == lowest
    with pytest.raises(UserError, match=f"at least {lowest}"):
        SentencePieceTokenizer.train([text], lowest - 1)


def test_a_vocabulary_above_what_the_text_gives_is_said(capsys):
    size = SentencePieceTokenizer.train(["abc abc abd"], 4096).vocab_size
    assert f"gives at most {size} pieces" in capsys.readouterr().err
    SentencePieceTokenizer.train(["abc abc abd"], size)
    assert "at most" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["\n\n\r\n", "\u2581\u2581", "▅▅"])
def test_text_without_anything_to_learn_from_is_one_message(text):
    with pytest.raises(UserError, match=r"nothing that .* learns from .*data.tokenizer = 'bytes'"):
        SentencePieceTokenizer.train([text], 400)


def test_a_sample_is_spread_over_all_texts():
    numbered = [f"<{i}>" + "x" * 20_000 for i in range(50)]
    sample = training_text.sample_texts(numbered, limit=500_000)
    assert 490_000 < sample.characters <= 500_000
    assert (sample.texts, sample.all_texts) == (50, 50)
    assert sample.all_characters == sum(map(len, numbered))
    assert str(sample) == "0.5 M of 1.0 M characters, spread over all 50 texts"
    again = training_text.sample_texts(iter(numbered), limit=500_000)
    assert again == sample
    # no period in the order of the texts is missed
    alternating = ["even", "odd"] * 5000
    pieces = training_text.sample_texts(alternating, limit=5000).pieces
    assert pieces.count("even") == pytest.approx(pieces.count("odd"), rel=0.1)
    some = training_text.sample_texts(alternating, limit=5000)
    assert f"spread over {some.texts:,} of 10,000 texts" in str(some)


def test_texts_within_the_limit_are_taken_whole():
    texts = ["x\u2581y\r\nz" * 3000, "", "short", "l" * 9000]
    sample = training_text.sample_texts(texts, training_text.LIMIT)
    assert sample.pieces == [text for text in texts if text]
    assert sample.lines(without="\u2581")[:2] == ["xy", "zxy"]
    assert [len(line) for line in sample.lines(without="\u2581")[-3:]] == [4096, 4096, 808]
    assert str(sample) == "all 27,005 characters of 3 texts"


def test_the_tokenizer_learns_from_the_last_texts_too(monkeypatch):
    monkeypatch.setattr(training_text, "LIMIT", 100_000)
    generator = random.Random(2)
    words = ["".join(generator.choices("etaoin", k=5)) for _ in range(200)]
    english = [" ".join(generator.choices(words, k=8000)) for _ in range(4)]
    after = " ".join(CHINESE[i : i + 4] for i in range(0, 4000, 4)) * 5
    both = SentencePieceTokenizer.train([*english, after], 1200)
    alone = SentencePieceTokenizer.train([after], 1200)
    assert len(both.encode(after)) < 1.5 * len(alone.encode(after))
