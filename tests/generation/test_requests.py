"""Texts as they grow: stop texts, complete characters."""

import pytest
from conftest import byte_level_tokenizer
from helpers import tiny_language_model

from gptjax.generation.requests import SequenceState
from gptjax.tokenizer.trained import ByteTokenizer


@pytest.fixture(scope="module")
def text_lm():
    return tiny_language_model(tokenizer=byte_level_tokenizer())


def test_stop_text_is_found_across_tokens(text_lm):
    free = text_lm.generate("the cat", max_new_tokens=40, temperature=1.5, seed=1)
    data = text_lm.tokenizer.decode_bytes(free.tokens).decode(errors="replace")
    assert free.text == data
    stop = data[9:13]
    cut = text_lm.generate(
        "the cat", max_new_tokens=40, temperature=1.5, seed=1, stop=[stop, "never there"]
    )
    assert (cut.text, cut.finish_reason) == (data[: data.find(stop)], "stop")
    pieces = list(
        text_lm.stream("the cat", max_new_tokens=40, temperature=1.5, seed=1, stop=[stop])
    )
    assert "".join(pieces) == cut.text
    assert (
        "".join(text_lm.stream("the cat", max_new_tokens=40, temperature=1.5, seed=1)) == free.text
    )
    assert len(list(text_lm.stream("the cat", max_new_tokens=40, temperature=1.5, seed=1))) > 3


def test_a_row_never_shows_half_a_character_or_half_a_stop():
    row = SequenceState(ByteTokenizer(), ["END"], [256])
    streamed = ""
    for byte in "é€ EN ENDx".encode():
        row.feed(byte, 0.0)
        streamed += row.text[len(streamed) : row.safe]
        assert "\ufffd" not in streamed and not streamed.endswith(("E", "EN"))
    row.finish("length")
    assert row.text == "é€ EN " and row.reason == "stop"
    assert streamed + row.text[len(streamed) : row.safe] == row.text
