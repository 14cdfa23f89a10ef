"""The preview of examples: what is seen and learned, as text and as a page."""

import numpy as np
from helpers import load_examples

from gptjax.tasks import preview
from gptjax.tasks.base import Example
from gptjax.tokenizer.trained import ByteTokenizer


def test_the_preview_marks_what_is_learned(tmp_path):
    data, _ = load_examples(
        tmp_path, [{"source": "a<b", "target": "cd"}], task=dict(name="translation")
    )
    assert "a<b =[ cd<|endoftext|>]" in preview.to_terminal(
        data.tokenizer, data.train[0], colour=False
    )
    page = preview.to_html(data.tokenizer, data.train)
    assert (
        '<span class="learned">c</span>' in page
        and "&lt;" in page
        and "<b" not in page.replace("<body", "")
    )


def test_the_preview_shows_characters_of_several_tokens(tmp_path):
    data, _ = load_examples(
        tmp_path, [{"source": "一", "target": "二"}], task=dict(name="translation")
    )
    assert "一 =[ 二<|endoftext|>]" in preview.to_terminal(
        data.tokenizer, data.train[0], colour=False
    )
    half = Example(
        "here", np.array([0xE4, 0xB8, 0x41, 0xE4]), np.array([False, False, False, True]), 3
    )
    assert preview.pieces(ByteTokenizer(), half) == [("<E4><B8><41>", "seen"), ("<E4>", "learned")]
