"""Rows of conversations: what is learned of them, how many examples they are, what is refused."""

import json

import pytest
from conftest import byte_level_tokenizer
from helpers import CHATML, load_examples, task_config

from gptjax.config.errors import UserError
from gptjax.tasks import loading

THINKING = (  # an empty thought in the last answer alone, as Qwen3's template has it
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML


def talk(*texts, **keys):
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": said, **keys}


def render(tmp_path, rows, template=CHATML, **sections):
    tokenizer = byte_level_tokenizer(template)
    task = {"name": "chat", **sections.pop("task", {})}
    sections = {"model": dict(context=128), **sections}
    data, _ = load_examples(tmp_path, rows, tokenizer, task=task, **sections)
    return data.train


def learned(example):
    tokenizer = byte_level_tokenizer()
    return tokenizer.decode(example.ids[example.learned].tolist())


def test_a_template_that_rewrites_gives_an_example_for_each_answer(tmp_path, capsys):
    rows = [talk("a", "b", "c", "d"), talk("e", "f")]
    examples = render(tmp_path, rows, THINKING)
    assert [learned(e) for e in examples] == [f"<think>\n\n</think>\n\n{x}" for x in "bdf"]
    assert [e.references for e in examples] == [
        (f"<think>\n\n</think>\n\n{answer}",) for answer in "bdf"
    ]
    assert [e.source for e in examples] == ["a", "c", "e"]
    assert "1 conversations are several examples each" in capsys.readouterr().err
    # an ordinary template: one each, and nothing is said
    assert [learned(e) for e in render(tmp_path, rows)] == ["bd", "f"]
    assert "several" not in capsys.readouterr().err


def test_each_of_them_is_cut_to_a_row_by_itself(tmp_path):
    rows = [talk("a" * 20, "b", "c", "d")]
    task = {"truncation": "cut_start"}
    first, second = render(tmp_path, rows, THINKING, task=task, data={"length": 70})
    assert (first.cut, second.cut) == (False, True)
    assert learned(second).endswith("d") and len(second.ids) <= 71
    with pytest.raises(UserError, match=r"rows.jsonl:1 needs \d+ tokens"):
        render(tmp_path, rows, THINKING, data={"length": 60})
    dropped = render(tmp_path, rows, THINKING, task={"truncation": "drop"}, data={"length": 70})
    assert [learned(e)[-1] for e in dropped] == ["b"]


def test_weights_tools_and_variables_of_a_row(tmp_path):
    row = talk("a", "bad", "b", "good")
    row["messages"][1]["weight"] = 0
    (example,) = render(tmp_path, [row])
    assert learned(example) == "good" and example.references == ("good",)
    row["messages"][1]["weight"], row["messages"][3]["weight"] = 1, 0
    (example,) = render(tmp_path, [row])
    assert learned(example) == "bad" and example.references == ("bad",)
    tools = [{"type": "function", "function": {"name": "clock"}}]
    for given in (
        {"tools": tools},
        {"tools": json.dumps(tools)},
        {"chat_template_kwargs": {"tools": tools}},
    ):
        (example,) = render(tmp_path, [talk("a", "b", **given)], TOOLS)
        text = byte_level_tokenizer().decode(example.ids.tolist())
        assert text.startswith('[{"type": "function", "function": {"name": "clock"}}]\n')


def test_other_forms_are_read_or_named_with_a_way_out(tmp_path):
    share_gpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (example,) = render(
        tmp_path, [{"conversations": share_gpt}], task={"messages": "conversations"}
    )
    assert learned(example) == "b"
    assert example.ids.tolist() == render(tmp_path, [talk("a", "b")])[0].ids.tolist()


def weighted(*weights):
    row = talk(*"abcdefgh"[: 2 * len(weights)])
    for message, weight in zip(row["messages"][1::2], weights, strict=True):
        message["weight"] = weight
    return row


WRONG = {
    "tools": (talk("a", "b", tools=[{"a": 1}]), CHATML, "the chat template does not read 'tools'"),
    "nothing to learn": (weighted(0, 0), CHATML, "every answer has weight 0"),
    "weights": (weighted(1, 2), CHATML, "message 3 has the weight 2"),
    "system": (talk("a", "b", system="be kind"), CHATML, "its field 'system' is not read"),
    "empty": (talk("a", " "), CHATML, "message 1 of the assistant is empty"),
    "refusing": (talk("a", "b"), "{{ raise_exception('no') }}", "refuses this conversation: no"),
    "no Jinja": (talk("a", "b"), "{% if %}", "is no Jinja template"),
    "no end": (talk("a", "b"), "{{ messages | length }}", "leaves out message 0"),
    "key": ({"messages": [{"role": "user", "content": "a", "x": 1}]}, CHATML, "the last message"),
    "roles": ({"messages": [{"role": "model", "content": "a"}]}, CHATML, "role 'model' first"),
    "ShareGPT": ({"conversations": [{"from": "gpt"}]}, CHATML, "--config.task.messages=conversa"),
    "Alpaca": ({"instruction": "a", "output": "b"}, CHATML, "--config.task.prompt='{instruction}'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_faults_name_file_and_row(tmp_path, name):
    row, template, words = WRONG[name]
    with pytest.raises(UserError) as error:
        render(tmp_path, [row], template)
    assert "rows.jsonl:1" in str(error.value) and words in str(error.value)
    assert len(str(error.value).splitlines()) <= 4


def test_half_a_character_names_file_and_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(talk("a", "b")) + "\n" + json.dumps(talk("a\ud83d", "b")) + "\n")
    config = task_config(path, task=dict(name="chat"), model=dict(context=128))
    with pytest.raises(UserError, match=r"rows.jsonl:2: message 0 holds .*half of a UTF-16 pair"):
        loading.load_examples(config, byte_level_tokenizer(CHATML))


def test_a_prompt_that_the_template_refuses_names_the_row_and_ends_as_the_template_does(tmp_path):
    task = dict(name="text", prompt="{q}", completion="{a}", template="chat", system="Be kind.")
    row = {"q": "what", "a": "this"}
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(UserError, match=r"rows.jsonl:1: the chat template refuses .* no system"):
        render(tmp_path, [row], strict + CHATML, task=task)
    tokenizer = byte_level_tokenizer(CHATML)
    tokenizer.eos_ids = (tokenizer.control["<|endoftext|>"],)  # another than the template writes
    data, _ = load_examples(tmp_path, [row], tokenizer, task=task, model=dict(context=128))
    assert data.train[0].ids[-1] == tokenizer.control["<|im_end|>"]


def test_a_template_by_name(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.templates = {"tool_use": TOOLS, "rag": CHATML}
    task = dict(name="chat")
    with pytest.raises(UserError, match=r"task.chat_template in a config"):
        load_examples(tmp_path, [talk("a", "b")], tokenizer, task=task, model=dict(context=128))
    task["chat_template"] = "rag"
    data, _ = load_examples(
        tmp_path, [talk("a", "b")], tokenizer, task=task, model=dict(context=128)
    )
    assert data.tokenizer.chat_template == CHATML and learned(data.train[0]) == "b"
