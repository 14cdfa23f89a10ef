"""A conversation in the terminal: commands, answers, what is dropped when the context is full."""

import io
import json

import pytest
from conftest import byte_level_tokenizer
from helpers import tiny_language_model

from gptjax.config.errors import UserError
from gptjax.core import cli
from gptjax.generation.conversation import converse

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}a"


@pytest.fixture(scope="module")
def lm():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tiny_language_model(tokenizer=tokenizer, context=40)


def talk(lm, monkeypatch, *lines, **flags):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    converse(lm, cli.Args({"max_new_tokens": "4", "temperature": "0", **flags}))


def test_answers_are_what_the_template_makes_the_model_say(lm, monkeypatch, capsys):
    talk(lm, monkeypatch, "hi", "", "/exit", "never read", system="be kind")
    prompt = lm.tokenizer.encode("sbe kind;uhi;a")
    assert capsys.readouterr().out == lm.generate([prompt], max_new_tokens=4)[0].text + "\n"


def test_commands(lm, monkeypatch, capsys, tmp_path):
    path = tmp_path / "said.json"
    talk(lm, monkeypatch, "hi", "/reset", "/system short", "yes", f"/save {path}", "/nonsense")
    output = capsys.readouterr()
    messages = json.loads(path.read_text())
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert messages[0]["content"] == "short" and messages[1]["content"] == "yes"
    assert f"saved 2 messages to {path}" in output.err and "/reset forgets" in output.err


def test_old_turns_are_dropped_and_that_is_said(lm, monkeypatch, capsys):
    talk(lm, monkeypatch, "a long message", "a long message", "a long message")
    assert "(the context is full: the 2 oldest messages are forgotten)" in capsys.readouterr().err
    with pytest.raises(UserError, match="shorten it or lower --max_new_tokens"):
        talk(lm, monkeypatch, "x" * 40)


def test_what_does_not_stream_is_refused(lm, monkeypatch):
    for flags in ({"num_beams": "2"}, {"context_shift": "true"}):
        with pytest.raises(UserError, match="leave out --num_beams and --context_shift"):
            talk(lm, monkeypatch, "hi", **flags)
