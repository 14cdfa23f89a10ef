"""The page: one file, nothing from elsewhere, and no text of a model can leave its place."""

import html.parser
import json
import re

import pytest
from conftest import byte_level_tokenizer

from gptjax.interpretability import page, words
from gptjax.tokenizer.trained import ByteTokenizer

NASTY = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>",
    "\u2028",
    "&lt;",
    "'\"\\",
    "日",
]


def findings(**changes):
    """The least that a page needs."""
    empty = dict(title="T", text="t", rows=["layer 0"], columns=["head 0"], values=[[0.5]])
    return {
        "model": "toy",
        "facts": "1 layer",
        "words": NASTY,
        "tokens": [0, 1],
        "layers": 1,
        "heads": 1,
        "chosen_head": [0, 0],
        "target": {"token": 9, "word": 2, "p": 0.25, "rank": 3},
        "lens_rows": ["embedding", "layer 0"],
        "lenses": {"logit lens": {"top": [[[[3, 0.5]]] * 2] * 2, "agreement": [-1.0, -0.5]}},
        "logit": {"total": 1.0, "rest": [["embedding", 0.5]], "attention": [0.5], "mlp": [0.0]},
        "importance": [],
        "attention": "AAAA",
        "head_maps": [empty],
        "patching": None,
        "difference": None,
        **changes,
    }


class Reader(html.parser.HTMLParser):
    """Tags, and the text in each <script>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def test_texts_of_a_model_stay_texts():
    text = page.to_html(findings(model=NASTY[0]))
    reader = Reader(text)
    assert len(reader.scripts) == 2 and text.count("</script>") == 2
    assert json.loads(reader.scripts[0]) == findings(model=NASTY[0])
    assert "<script>alert" not in text


def test_the_page_fetches_nothing():
    text = page.to_html(findings())
    assert not re.search(r"https?:|//[\w.]+/|@import|url\(|\bfetch\(|XMLHttpRequest", text)
    loads = {"src", "href", "srcset", "data", "action", "poster"}
    assert not [(tag, a) for tag, a in Reader(text).tags if loads & set(a)]
    assert "innerHTML" not in text and "eval(" not in text


def test_a_number_that_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        page.to_html(findings(attention=float("nan")))


def test_words_show_what_a_token_is():
    tokenizer = byte_level_tokenizer()
    encode = lambda text: tokenizer.encode(text)[0]
    assert words.word(tokenizer, encode(" the")) == "·the"
    assert words.word(tokenizer, encode("\n")) == "↵"
    assert words.word(tokenizer, encode("日")) == "\\xe6"
    assert words.word(tokenizer, tokenizer.control["<|im_end|>"]) == "<|im_end|>"
    assert words.word(None, 7) == words.word(ByteTokenizer(), 7000)[:1] + "7"
    assert words.word(ByteTokenizer(), 0) == "\\x00"
    assert words.word(ByteTokenizer(), ByteTokenizer().eot) == "<|endoftext|>"
    table = words.Words(tokenizer)
    assert table.numbers([5, 9, 5]) == [0, 1, 0] and len(table.texts) == 2
