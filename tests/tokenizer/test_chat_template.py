"""Conversations through chat templates: their ends, their turns, what would be lost."""

import pytest
from chat_templates import CHATML, CHATML_TOOLS, GEMMA, PHI3, STRIPPING, TEMPLATES, THINKING
from conftest import byte_level_tokenizer

from gptjax.config.errors import UserError
from gptjax.tokenizer import chat_template, template_files

CALL = {"function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
TOOLS = [{"type": "function", "function": {"name": "clock"}}]


def say(role, content, **keys):
    return {"role": role, "content": content, **keys}


def tokenizer_with(template, eos="<|endoftext|>"):
    """Whose config names an end of its own, as base models that were given a template do."""
    tokenizer = byte_level_tokenizer(template)
    tokenizer.eos_ids = (tokenizer.control[eos],)
    return tokenizer


def written(tokenizer, messages, **variables):
    """[(prompt, [what is learned])] of each text, control tokens by name."""
    names = {i: name for name, i in tokenizer.control.items()}

    def text(ids):
        return "".join(names.get(i) or tokenizer.decode([i]) for i in ids)

    texts = []
    for spans, _ in chat_template.split_texts(tokenizer, messages, **variables):
        last = max(k for k, span in enumerate(spans) if span.learned)
        prompt = text([i for span in spans[:last] for i in span.ids])
        texts.append((prompt, [text(span.ids) for span in spans if span.learned]))
    return texts


TALK = [
    say("user", "a"),
    say("assistant", "<think>\nt1\n</think>\n\nb"),
    say("user", "c"),
    say("assistant", "<think>\nt2\n</think>\n\nd"),
]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("parts", "llama 3")])
def test_an_answer_ends_where_the_template_ends_it(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    end = tokenizer.control["<|im_end|>"]
    assert chat_template.answer_end(tokenizer) == end
    assert chat_template.end_ids(tokenizer) == (tokenizer.control["<|endoftext|>"], end)
    talk = [say("user", "in"), say("assistant", "the")]
    (text,) = chat_template.split_texts(tokenizer, talk)
    (learned,) = [span.ids for span in text.spans if span.learned]
    assert learned[-1] == end and learned.count(end) == 1


def test_ends_of_a_checkpoint_without_a_template_or_with_a_strict_one():
    plain = tokenizer_with("")
    assert chat_template.end_ids(plain) == plain.eos_ids
    unnamed = tokenizer_with(CHATML)
    unnamed.special = {}  # the template alone says it
    assert chat_template.end_ids(unnamed) == tuple(
        unnamed.control[name] for name in ("<|endoftext|>", "<|im_end|>")
    )
    strict = tokenizer_with("{{ raise_exception('never') }}")
    # the tokenizer's own end of text is what is left
    assert chat_template.end_ids(strict)[1:] == (strict.control["<|im_end|>"],)
    without = tokenizer_with("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert chat_template.answer_end(without) == without.eos_ids[0]


def test_a_template_that_leaves_earlier_reasoning_out_gives_a_text_for_each_answer():
    first, second = written(tokenizer_with(THINKING), TALK)
    question = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    more = "b<|im_end|>\n" + question.replace("\na<", "\nc<")
    assert first == (question, ["<think>\nt1\n</think>\n\nb<|im_end|>"])
    assert second == (question + more, ["<think>\nt2\n</think>\n\nd<|im_end|>"])
    tokenizer = tokenizer_with(THINKING)
    for text, number in zip(chat_template.split_texts(tokenizer, TALK), (1, 3), strict=True):
        prompt = chat_template.encode(tokenizer, TALK[:number])
        ids = [i for span in text.spans for i in span.ids]
        assert ids[: len(prompt)] == prompt and text.answers == [number]


def test_steps_of_one_turn_stay_in_one_text():
    """Between two questions the template rewrites nothing."""
    talk = [say("user", "a"), say("assistant", "b"), say("tool", "c"), say("assistant", "d")]
    ((_, learned),) = written(tokenizer_with(THINKING), talk)
    assert learned == [f"<think>\n\n</think>\n\n{text}<|im_end|>" for text in "bd"]
    assert len(written(tokenizer_with(THINKING), [*talk, *TALK])) == 3


def test_a_template_whose_prompt_opens_the_reasoning():
    texts = written(tokenizer_with(STRIPPING), TALK)
    assert [learned for _, learned in texts] == [
        ["t1\n</think>\n\nb<|im_end|>"],
        ["t2\n</think>\n\nd<|im_end|>"],
    ]
    assert texts[1][0].endswith("c<|answer|><think>\n") and "t1" not in texts[1][0]
    bare = [say("user", "a"), say("assistant", "b")]
    assert written(tokenizer_with(STRIPPING), bare)[0][1] == ["\n</think>\n\nb<|im_end|>"]
    bare[1]["reasoning_content"] = "why"
    assert written(tokenizer_with(STRIPPING), bare)[0][1] == ["why\n</think>\n\nb<|im_end|>"]


def test_a_message_of_weight_0_is_read_and_not_learned():
    talk = [say("user", "a"), say("assistant", "no", weight=0), say("user", "b")]
    talk += [say("assistant", "yes", weight=1)]
    ((prompt, learned),) = written(tokenizer_with(CHATML), talk)
    assert learned == ["yes<|im_end|>"] and "no<|im_end|>" in prompt
    assert written(tokenizer_with(THINKING), talk)[0][1] == ["<think>\n\n</think>\n\nyes<|im_end|>"]
    with pytest.raises(UserError, match=r"message 1 has the weight 0\.5: 1 = learned, 0 = not"):
        written(tokenizer_with(CHATML), [talk[0], {**talk[1], "weight": 0.5}])


def test_calls_and_tools_reach_the_template():
    talk = [say("user", "time?"), say("assistant", None, tool_calls=[CALL])]
    talk += [say("tool", "noon", tool_call_id="1", name="clock"), say("assistant", "noon")]
    ((prompt, learned),) = written(tokenizer_with(CHATML_TOOLS), talk, tools=TOOLS)
    assert '{"type": "function", "function": {"name": "clock"}}' in prompt
    assert learned[0].count('"arguments": {"zone": "UTC"}') == 1  # an object, no text in quotes
    assert learned[1] == "noon<|im_end|>"
    objects = [{"function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
    assert written(
        tokenizer_with(CHATML_TOOLS), [talk[0], say("assistant", None, tool_calls=objects)]
    )[0][1] == [learned[0]]


def test_other_forms_of_messages_are_the_same_messages():
    tokenizer = tokenizer_with(CHATML)
    expected = chat_template.encode(tokenizer, [say("system", "s"), say("user", "a\nb")])
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for talk in (
        [say("developer", "s"), say("user", parts)],
        [{"from": "system", "value": "s"}, {"from": "human", "value": "a\nb"}],
        [say("system", "s", name=None, tool_calls=None), say("user", "a\nb", id=7)],
        [say("system", "s", annotations=[]), say("user", "a\nb", country="US", toxic=False)],
    ):
        assert chat_template.encode(tokenizer, talk) == expected


LOST = {
    "an unknown key": (say("user", "a", mood="glad"), "message 0: the key 'mood' .*not known here"),
    "a name": (say("user", "a", name="Ann"), "does not read names"),
    "calls": (say("assistant", None, tool_calls=[CALL]), "does not read tool calls"),
    "reasoning": (say("assistant", "a", reasoning_content="r"), "write it in the content"),
    "another library's mask": (say("assistant", "a", train=False), 'give it "weight": 0'),
    "null": (say("assistant", None), "message 0 of the assistant has the content null"),
    "a picture": (say("user", [{"type": "image_url"}]), "a part of type 'image_url'"),
    "no content": ({"role": "user"}, "message 0 has no content"),
    "an unknown speaker": ({"from": "narrator", "value": "a"}, "message 0 is from 'narrator'"),
    "a number": (say("user", 5), "its content is a int instead of a text"),
    "half a pair": (say("user", "a\ud83d"), "message 0 holds '.ud83d' .after 'a'., half of a"),
    "a byte": (say("user", "caf\udce9"), "holds the byte 0xe9 .after 'caf'., which is no UTF-8"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_would_be_lost_is_refused_by_name(name):
    message, words = LOST[name]
    with pytest.raises(UserError, match=words):
        chat_template.encode(tokenizer_with(CHATML), [message])


@pytest.mark.parametrize(
    ("template", "talk", "variables", "words"),
    [
        (CHATML, [say("user", "a")], {"tools": TOOLS}, "does not read 'tools'"),
        (CHATML, [say("user", "a")], {"enable_thinking": False}, "not read 'enable_thinking'"),
        (CHATML_TOOLS, [say("user", "a")], {"tools": "[{"}, "tools are no JSON"),
        (PHI3, [say("user", "a"), say("tool", "b")], {}, "leaves out message 1 .of role 'tool'"),
        (GEMMA, [say("system", "a")], {}, "refuses this conversation: System role not"),
        ("{% for %}", [say("user", "a")], {}, "is no Jinja template: line 1"),
        ("{{ messages[0]['content'] + 1 }}", [say("user", "a")], {}, "does not run: TypeError"),
        (
            CHATML_TOOLS,
            [say("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])],
            {},
            "the arguments of f are no JSON",
        ),
    ],
)
def test_templates_that_cannot_hold_a_conversation_say_so(template, talk, variables, words):
    with pytest.raises(UserError, match=words):
        chat_template.encode(tokenizer_with(template), talk, **variables)


def test_templates_by_name(tmp_path):
    named = {"tool_use": CHATML_TOOLS, "rag": CHATML}
    assert template_files.read_templates({}, {"chat_template": named}) == named
    entries = [{"name": name, "template": template} for name, template in named.items()]
    assert template_files.read_templates({}, {"chat_template": entries}) == named
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text(CHATML)
    content = template_files.additional_files(tmp_path)
    content["chat_template.jinja"] = CHATML_TOOLS.encode()
    assert template_files.read_templates(content, {"chat_template": entries}) == {
        "default": CHATML_TOOLS,
        "rag": CHATML,
    }
    tokenizer = tokenizer_with("")
    tokenizer.templates = named
    with pytest.raises(UserError, match="named tool_use, rag, and none is named 'default': choose"):
        chat_template.encode(tokenizer, [say("user", "a")])
    with pytest.raises(UserError, match="no chat template 'rug'; did you mean 'rag'"):
        chat_template.choose(tokenizer, "rug")
    chat_template.choose(tokenizer, "rag")
    assert tokenizer.chat_template == CHATML
    with pytest.raises(UserError, match="does not read 'tools'"):  # the chosen one, not another
        chat_template.encode(tokenizer, [say("user", "a")], tools=TOOLS)
    with pytest.raises(UserError, match="no chat template 'rag'; there are: default"):
        chat_template.choose(tokenizer_with(CHATML), "rag")
    with pytest.raises(UserError, match="the checkpoint brings none"):
        chat_template.choose(tokenizer_with(""), "rag")
    for wrong in ([{"name": "default"}], [5], {"default": 5}, 7):
        with pytest.raises(UserError, match=r"tokenizer_config.json: .*chat.template"):
            template_files.read_templates({}, {"chat_template": wrong})
