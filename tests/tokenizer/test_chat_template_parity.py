"""Filled chat templates are those of transformers, text for text and id for id."""

import itertools
import json

import jinja2
import pytest
from chat_templates import TEMPLATES
from conftest import byte_level_tokenizer
from tokenizers import Tokenizer

from gptjax.config.errors import UserError
from gptjax.tokenizer import chat_template

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


def say(role, content, **keys):
    return {"role": role, "content": content, **keys}


CALL = {
    "type": "function",
    "id": "call_0001",
    "function": {"name": "clock", "arguments": {"zone": "Zürich", "n": [1, 2.5, None]}},
}
TALKS = {
    "a question": [say("user", "hi")],
    "with a system message": [say("system", "Be  brief.\n"), say("user", " hi ")],
    "two turns": [say("user", "hi"), say("assistant", " Hello! "), say("user", "漢字 {{ x }}")],
    "answered": [
        say("user", "hi"),
        say("assistant", "one"),
        say("user", "?"),
        say("assistant", "2"),
    ],
    "thought": [
        say("user", "hi"),
        say("assistant", "<think>\nwell\n</think>\n\nHello"),
        say("user", "more"),
    ],
    "reasoned": [say("user", "hi"), say("assistant", "Hello", reasoning_content="well")],
    "a call": [
        say("user", "time?"),
        say("assistant", None, tool_calls=[CALL]),
        say("tool", "noon", tool_call_id="call_0001", name="clock"),
    ],
    "parts": [say("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "The time <now> & 'then'",
            "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
        },
    }
]


@pytest.fixture(scope="module")
def peer():
    tokenizer = byte_level_tokenizer()
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer.described())), **tokenizer.special
    )
    return tokenizer, peer


def encode_or_refuse(tokenizer, talk, **keys):
    try:
        return chat_template.encode(tokenizer, talk, **keys), ""
    except UserError as error:
        return [], str(error)


@pytest.mark.parametrize("name", TEMPLATES)
def test_filled_as_transformers_does(peer, name):
    """What is refused here is what transformers refuses too, or what the template cannot read."""
    tokenizer, reference = peer
    tokenizer.chat_template = reference.chat_template = TEMPLATES[name]
    equal, words = 0, chat_template.words_of(TEMPLATES[name])
    for talk, tools, flag in itertools.product(TALKS, (None, TOOLS), (True, False)):
        keys = {"add_generation_prompt": flag, "tools": tools}
        ids, refusal = encode_or_refuse(tokenizer, TALKS[talk], **keys)
        if "not read" in refusal or "leaves out" in refusal:
            continue
        if refusal:
            with pytest.raises((jinja2.TemplateError, TypeError)):
                reference.apply_chat_template(TALKS[talk], tokenize=False, **keys)
            continue
        if talk == "parts" and not {"type", "text"} <= words.names:
            continue  # the parts are joined for a template that would print the list
        expected = reference.apply_chat_template(TALKS[talk], tokenize=False, **keys)
        assert ids == reference(expected, add_special_tokens=False).input_ids, (talk, expected)
        equal += 1
    assert equal >= 5


def test_templates_are_chosen_alike(peer):
    tokenizer, reference = peer
    named = {"default": TEMPLATES["chatml"], "tool_use": TEMPLATES["chatml with tools"]}
    reference.chat_template = named
    tokenizer.chat_template, tokenizer.templates = named["default"], named
    try:
        for tools in (None, TOOLS):
            expected = reference.apply_chat_template(
                TALKS["two turns"], tokenize=False, tools=tools
            )
            ids = chat_template.encode(
                tokenizer, TALKS["two turns"], tools=tools, add_generation_prompt=False
            )
            assert ids == reference(expected, add_special_tokens=False).input_ids
    finally:
        tokenizer.templates = {}
