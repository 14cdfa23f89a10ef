"""A conversation in the terminal: commands, answers, what is dropped when the context is full."""

import io
import json

import pytest
from conftest import byte_level_tokenizer
from helpers import tiny_language_model

from gptjax.config.errors import UserError
from gptjax.core import cli
from gptjax.generation.conversation import converse
from gptjax.generation.flags import read_options

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


def said(lm, monkeypatch, tmp_path, *lines, **flags):
    """The messages that are there after the lines."""
    path = tmp_path / "said.json"
    talk(lm, monkeypatch, *lines, f"/save {path}", **flags)
    return json.loads(path.read_text())


def test_a_message_that_does_not_fit_is_refused_and_nothing_is_forgotten(
    lm, monkeypatch, capsys, tmp_path
):
    messages = said(lm, monkeypatch, tmp_path, "hi", "x" * 40, "yes")
    assert [m["content"] for m in messages[::2]] == ["hi", "yes"]
    output = capsys.readouterr()
    assert "shorten it or lower --max_new_tokens. The conversation goes on" in output.err
    assert output.out.count("\n") == 2 and "forgotten" not in output.err


def test_without_a_limit_the_answer_takes_what_the_context_has(lm, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    converse(lm, cli.Args({"temperature": "0"}))
    ids = lm.tokenizer.encode("uhi;a")
    expected = lm.generate([ids], max_new_tokens=lm.config.context + 1 - len(ids))[0].text
    assert capsys.readouterr().out == expected + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 33 + "\n"))
    with pytest.raises(UserError, match="none of the messages on stdin could be answered"):
        converse(lm, cli.Args({"temperature": "0"}))
    assert "needs 36 tokens and 10 for the answer" in capsys.readouterr().err


def test_wrong_lines_and_commands_are_messages(lm, monkeypatch, capsys, tmp_path):
    lines = ["hi", "caf\udce9", "a\ud83d", "/sytem x", "/save", "/system b\udcff", " /path"]
    lines += [f"/save {tmp_path}/no/such\0name", "/save /", "/help"]
    messages = said(lm, monkeypatch, tmp_path, *lines)
    assert [m["content"] for m in messages[::2]] == ["hi", " /path"]
    errors = capsys.readouterr().err
    for part in (
        "(this line holds the byte 0xe9 (after 'caf'), which is no UTF-8",
        "half of a UTF-16 pair",
        "no command '/sytem'; did you mean '/system'?",
        "/save needs more",
        "not saved: '/': ",
    ):
        assert part in errors


def test_bytes_of_another_encoding_on_stdin(lm, monkeypatch, capsys):
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhi\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    converse(lm, cli.Args({"max_new_tokens": "4", "temperature": "0"}))
    output = capsys.readouterr()
    assert "holds the byte 0xe9" in output.err and output.out.count("\n") == 1


def test_ctrl_c_ends_the_answer_alone(lm, monkeypatch, capsys, tmp_path):
    stream = type(lm).stream

    def interrupted(self, prompt, options=None, **keywords):
        pieces = stream(self, prompt, options, **keywords)
        text = lm.tokenizer.decode(prompt)
        if "unow;" in text:
            raise KeyboardInterrupt
        if "uwait;" in text:
            yield next(pieces)
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(type(lm), "stream", interrupted)
    messages = said(lm, monkeypatch, tmp_path, "wait", "now", "/reset", "wait")
    assert [m["content"] for m in messages[::2]] == ["wait"] and messages[1]["content"]
    errors = capsys.readouterr().err
    assert "what was answered so far is kept" in errors and "the message is taken back" in errors


def test_a_template_that_refuses_the_system_prompt(lm, monkeypatch, capsys, tmp_path):
    tokenizer = byte_level_tokenizer(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + TEMPLATE
    )
    strict = tiny_language_model(tokenizer=tokenizer, context=40)
    with pytest.raises(UserError, match="refuses this conversation: no system"):
        talk(strict, monkeypatch, "hi", system="be kind")
    messages = said(strict, monkeypatch, tmp_path, "hi", "/system be kind", "yes")
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert "refuses this conversation: no system" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["prompt", "system", "stop", "banned"])
def test_bytes_of_another_encoding_on_the_command_line(flag):
    with pytest.raises(UserError, match=f"--{flag} holds the byte 0xe9 .after 'caf'."):
        read_options(cli.Args({flag: "caf\udce9"}))


def test_what_does_not_stream_is_refused(lm, monkeypatch):
    for flags in ({"num_beams": "2"}, {"context_shift": "true"}):
        with pytest.raises(UserError, match="leave out --num_beams and --context_shift"):
            talk(lm, monkeypatch, "hi", **flags)
