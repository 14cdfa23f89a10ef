"""Each route and field of the API, over an engine whose texts are known."""

import base64
import json

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from helpers import tiny_language_model
from known_engine import KnownEngine, Server

from gptjax.model import transformer
from gptjax.serving import tool_calls
from gptjax.tokenizer.trained import ByteTokenizer

SCRIPT = "and so on. The end"


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


def error_of(response, status, code=None, param=None):
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param) or code is None
    return error["message"]


def test_models(server):
    rows = server.get("/v1/models").json()["data"]
    assert [(row["id"], row["parent"], row["chat"]) for row in rows] == [
        ("toy", None, True),
        ("fox", "toy", True),
    ]
    assert server.get("/v1/models/fox").json() == rows[1]
    error_of(server.get("/v1/models/none"), 404, "model_not_found", "model")


def test_a_chat(server):
    body = server.chat(model="fox", max_completion_tokens=40, logprobs=True, top_logprobs=2).json()
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": SCRIPT, "refusal": None}
    assert choice["finish_reason"] == "stop" and body["model"] == "fox"
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["bytes"], first["logprob"]) == ("a", [97], -0.25)
    assert [top["token"] for top in first["top_logprobs"]] == ["B", "C"]
    prompt = len("user: hi\n")
    usage = {"prompt_tokens": prompt, "completion_tokens": 18, "total_tokens": prompt + 18}
    assert body["usage"] == usage
    assert server.engine.entered[-1].adapter == "fox"


def test_parts_roles_and_nulls(server):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": None},
        {"role": "assistant", "content": "yes", "refusal": None},
        {"role": "user", "content": "go on"},
    ]
    done = server.post("/v1/chat/completions", messages=messages, stop=None, seed=None, n=None)
    assert done.status_code == 200, done.text
    prompt = bytes(server.engine.entered[-1].prompt).decode()
    assert prompt == "system: be brief\nuser: hi\nassistant: yes\nuser: go on\n"
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    wrong = server.post("/v1/chat/completions", messages=[{"role": "user", "content": picture}])
    assert "read text alone" in error_of(wrong, 400)


def test_a_streamed_chat(server):
    chunks = server.stream(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hi"}],
        n=2,
        logprobs=True,
        stream_options={"include_usage": True},
    )
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [c["choices"][0]["delta"]["role"] for c in chunks[:2]] == ["assistant"] * 2
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 36
    for index in range(2):
        mine = [c["choices"][0] for c in chunks[2:-1] if c["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in mine) == SCRIPT
        assert [c["finish_reason"] for c in mine][-2:] == [None, "stop"]
        tokens = [t["token"] for c in mine if c["logprobs"] for t in c["logprobs"]["content"]]
        assert "".join(tokens) == SCRIPT


def test_completions_of_every_kind_of_prompt(server):
    ids = list(b"hi")
    for prompt, count in (("hi", 1), (["hi", "you"], 2), (ids, 1), ([ids, ids, ids], 3)):
        choices = server.complete(prompt, n=2, max_tokens=4).json()["choices"]
        assert [c["index"] for c in choices] == list(range(2 * count))
        assert {(c["text"], c["finish_reason"]) for c in choices} == {("and ", "length")}
    assert len(server.complete("hi").json()["choices"][0]["text"]) == 16  # the default
    for wrong in ([], [[]], [1, "a"], {"a": 1}, 3):
        error_of(server.complete(wrong), 400)
    error_of(server.complete([999999]), 400)


def test_echo_and_logprobs(server):
    for stream in (False, True):
        asked = dict(prompt="hi", max_tokens=2, echo=True, logprobs=1)
        if stream:
            (chunk, *others) = server.stream("/v1/completions", **asked)
            assert not others
            (choice,) = chunk["choices"]
        else:
            (choice,) = server.complete(**asked).json()["choices"]
        assert choice["text"] == "hian"
        assert choice["logprobs"] == {
            "tokens": ["h", "i", "a", "n"],
            "token_logprobs": [None, -1.0, -0.25, -0.25],
            "top_logprobs": [None, {"A": -0.5}, {"B": -0.5}, {"B": -0.5}],
            "text_offset": [0, 1, 2, 3],
        }
    (choice,) = server.complete("hi", max_tokens=0, echo=True, logprobs=0).json()["choices"]
    assert choice["text"] == "hi" and len(choice["logprobs"]["tokens"]) == 2


def test_a_stop_text_takes_its_tokens_with_it(server):
    asked = dict(prompt="hi", stop=[". ", "never"], logprobs=0, max_tokens=40)
    (choice,) = server.complete(**asked).json()["choices"]
    assert choice["text"] == "and so on" and choice["finish_reason"] == "stop"
    assert "".join(choice["logprobs"]["tokens"]) == "and so on"
    chunks = [chunk["choices"][0] for chunk in server.stream("/v1/completions", **asked)]
    assert "".join(c["text"] for c in chunks) == "and so on"
    assert "".join(t for c in chunks for t in c["logprobs"]["tokens"]) == "and so on"


def test_settings_reach_the_job(server):
    server.complete(
        "hi",
        **dict(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=-1, min_tokens=2),
        **dict(presence_penalty=1, frequency_penalty=0.5, repetition_penalty=1.1, n=2),
        **dict(logit_bias={"65": -100}, stop_token_ids=[66], ignore_eos=True, no_repeat_ngram=3),
        **dict(typical_p=0.9, user="me", max_tokens=3),
    )
    options = [job.options for job in server.engine.entered[-2:]]
    assert [o.seed for o in options] == [2**32 - 1, 0]
    o = options[0]
    assert (o.temperature, o.top_p, o.top_k, o.min_p, o.typical_p) == (0.5, 0.9, 7, 0.1, 0.9)
    assert (o.presence_penalty, o.frequency_penalty, o.repetition_penalty) == (1, 0.5, 1.1)
    assert (o.logit_bias, list(o.stop_tokens), o.ignore_end) == ({65: -100.0}, [66], True)
    assert (o.min_new_tokens, o.no_repeat_ngram, o.max_new_tokens) == (2, 3, 3)


def test_best_of(server):
    server.engine.likes = {7: -3.0, 8: -1.0, 9: -2.0}
    best = server.complete("hi", best_of=3, n=2, seed=7, logprobs=0, max_tokens=1).json()["choices"]
    assert [choice["logprobs"]["token_logprobs"] for choice in best] == [[-1.0], [-2.0]]
    assert [choice["index"] for choice in best] == [0, 1]
    server.engine.likes = {}
    body = server.complete("hi", best_of=3, n=2, max_tokens=4).json()
    assert len(body["choices"]) == 2 and body["usage"]["completion_tokens"] == 12
    error_of(server.complete("hi", best_of=1, n=2), 400, "invalid_value", "best_of")
    error_of(server.complete("hi", best_of=2, stream=True), 400, "invalid_value", "best_of")


@pytest.mark.parametrize(
    ("field", "code"),
    [
        ({"suffix": "x"}, "unsupported_field"),
        ({"temperatur": 1}, "unknown_field"),
        ({"temperature": -1}, "invalid_value"),
        ({"temperature": "warm"}, "invalid_value"),
        ({"temperature": True}, "invalid_value"),
        ({"max_tokens": 10**30}, "invalid_value"),
        ({"max_tokens": 2.5}, "invalid_value"),
        ({"max_tokens": 1000}, "context_length_exceeded"),
        ({"logprobs": 6}, "invalid_value"),
        ({"n": 0}, "invalid_value"),
        ({"stop": ["a"] * 5}, "invalid_value"),
        ({"stop": ""}, "invalid_value"),
        ({"logit_bias": {"x": 1}}, "invalid_value"),
        ({"logit_bias": {"9" * 5000: 1}}, "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "conflict"),
        ({"stream": "yes"}, "invalid_value"),
        ({"prompt": "x" * 300}, "context_length_exceeded"),
        ({"prompt": "x" * 3_000_000}, "context_length_exceeded"),
        ({"prompt": None}, "missing_field"),
        ({"n": 100}, "too_many_texts"),
    ],
)
def test_a_wrong_field_is_named(server, field, code):
    error = server.complete(**{"prompt": "hi", **field}).json()["error"]
    assert error["code"] == code
    assert error["param"] in (*field, None) or error["param"].split(".")[0] in field


def test_a_wrong_field_of_a_chat(server):
    for field, param in (
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"audio": {}}, "audio"),
        ({"store": True}, "store"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ):
        assert server.chat(**field).json()["error"]["param"] == param
    assert server.chat(store=False, modalities=["text"], max_tokens=2).status_code == 200
    user = {"role": "user", "content": "x"}
    for wrong in ({}, {"role": "pope", "content": "x"}, "hi", {"role": "user"}, {**user, "a": 1}):
        error = server.post("/v1/chat/completions", messages=[wrong]).json()["error"]
        assert error["param"].startswith("messages")
    for messages in ([], [user] * 5000):
        error_of(server.post("/v1/chat/completions", messages=messages), 400)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '{"name": "add", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    "script",
    [
        f"I add. <tool_call>\n{CALL}\n</tool_call>",
        f"I add. [{CALL}]",
        f"I add. {CALL.replace('arguments', 'parameters')}",
    ],
)
def test_calls_of_tools(script):
    with Server(KnownEngine(script)) as server:
        body = server.chat("1 + 0", tools=[TOOL]).json()["choices"][0]
        (call,) = body["message"]["tool_calls"]
        assert body["finish_reason"] == "tool_calls" and body["message"]["content"] == "I add."
        assert call["function"]["name"] == "add"
        assert json.loads(call["function"]["arguments"]) == {"a": 1}
        messages = [{"role": "user", "content": "1 + 0"}]
        chunks = server.stream("/v1/chat/completions", messages=messages, tools=[TOOL])
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(d.get("content", "") for d in deltas).strip() == "I add."
        (streamed,) = [d["tool_calls"] for d in deltas if "tool_calls" in d]
        assert streamed[0]["index"] == 0
        assert streamed[0]["function"] == call["function"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        none = server.chat("1 + 0", tools=[TOOL], tool_choice="none").json()["choices"][0]
        assert none["message"]["content"] == script


PLACE = {
    "type": "function",
    "function": {
        "name": 'go é"to',
        "parameters": {
            "properties": {
                "where": {"$ref": "#/$defs/town"},
                "day": {"type": "string", "format": "date"},
            },
            "required": ["where"],
            "additionalProperties": False,
            "$defs": {"town": {"enum": ["Bern", "Rome"]}},
        },
    },
}
REST = {"type": "function", "function": {"name": "rest", "parameters": None}}


def test_a_call_can_be_forced():
    """Whatever the model would say: one of random weights writes a call that its tool allows."""
    lm = tiny_language_model("llama", tokenizer=ByteTokenizer(), context=256)
    grammar = tool_calls.grammar([PLACE, REST])
    called = set()
    for seed in range(12):
        text = lm.generate("x", grammar=grammar, temperature=1.0, seed=seed, max_new_tokens=200)
        content, calls = tool_calls.parse(text.text, [PLACE["function"]["name"], "rest"])
        (call,) = calls
        called.add(call["function"]["name"])
        forced = tool_calls.read_forced(text.text, [PLACE, REST], whole=True)
        assert forced.calls[0]["function"] == call["function"] and not content + forced.content
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == PLACE["function"]["name"]:
            jsonschema.validate(arguments, PLACE["function"]["parameters"])
        else:
            assert arguments == {}
    assert called == {PLACE["function"]["name"], "rest"}


def test_who_forces_a_call_says_of_what():
    named = {"type": "function", "function": {"name": "add"}}
    with Server(KnownEngine(CALL)) as server:
        for asked, param in (
            ({"tool_choice": "required", "tools": []}, "tool_choice"),
            ({"tool_choice": "wizard", "tools": [TOOL]}, "tool_choice"),
            ({"tool_choice": named, "tools": [REST]}, "tool_choice"),
            ({"tool_choice": named, "tools": [TOOL], "guided_regex": "a"}, "guided_regex and"),
        ):
            assert server.chat(**asked).json()["error"]["param"].startswith(param)
        for wrong, reason in (
            ({"type": "wizard"}, "parameters are of type 'wizard'"),
            ({"minimum": 2**60}, "1152921504606846976 is no integer"),
            ({"properties": {"b": {"type": "wizard"}}}, "Invalid type: wizard (at /properties/b)"),
        ):
            tool = {"type": "function", "function": {"name": "bad", "parameters": wrong}}
            error = server.chat(tools=[TOOL, tool], tool_choice="required").json()["error"]
            assert error["param"] == "tools"
            assert error["message"].startswith(f"tools: bad: {reason}")
        asked = {"tools": [REST, TOOL], "parallel_tool_calls": False, "stop": ["name"]}
        error = server.chat(**asked).json()["error"]
        assert error["param"] == "parallel_tool_calls"
        asked["response_format"] = {"type": "json_object"}
        for choice in ("required", named):
            answer = server.chat(**asked, tool_choice=choice).json()["choices"][0]
            assert answer["finish_reason"] == "tool_calls" and not answer["message"]["content"]
            assert answer["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
        jobs = server.engine.entered[-2:]
        for size, arguments in ((29, ""), (33, '{"a"')):
            cut = {"tools": [TOOL], "tool_choice": named, "max_tokens": size}
            answer = server.chat(**cut).json()["choices"][0]
            assert answer["finish_reason"] == "length"
            assert answer["message"]["tool_calls"][0]["function"]["arguments"] == arguments
            messages = [{"role": "user", "content": "hi"}]
            chunks = server.stream("/v1/chat/completions", messages=messages, **cut)
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            (streamed,) = [d["tool_calls"] for d in deltas if "tool_calls" in d]
            assert streamed[0]["function"] == {"name": "add", "arguments": arguments}
        assert "rest" in jobs[0].options.grammar and "rest" not in jobs[1].options.grammar


def test_what_looks_like_a_call_is_text():
    script = 'sets {1, 2} and {"name": "unknown"} <b>'
    with Server(KnownEngine(script)) as server:
        assert server.chat(tools=[TOOL]).json()["choices"][0]["message"]["content"] == script
        messages = [{"role": "user", "content": "x"}]
        chunks = server.stream("/v1/chat/completions", messages=messages, tools=[TOOL])
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == script


def test_a_base_model_refuses_a_chat_and_says_what_to_do():
    with Server(KnownEngine(template="")) as server:
        message = error_of(server.chat(), 400, "no_chat_template", "messages")
        assert "/v1/completions" in message and "--chat_template=plain" in message
        assert not server.get("/v1/models").json()["data"][0]["chat"]


def test_embeddings(server):
    asked = dict(input=[list(b"hi"), list(b"hi there"), list(b"hi")])
    body = server.post("/v1/embeddings", **asked).json()
    rows = np.array([row["embedding"] for row in body["data"]])
    lm = server.engine.lm
    assert rows.shape == (3, lm.config.width)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(rows[0], rows[2], atol=1e-6)
    states, _ = transformer.apply(lm.config, lm.params, jnp.array([list(b"hi there")]))
    mean = np.asarray(states[0]).mean(0)
    np.testing.assert_allclose(rows[1], mean / np.linalg.norm(mean), atol=1e-5)
    assert body["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
    coded = server.post("/v1/embeddings", input="hi", encoding_format="base64").json()
    numbers = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(numbers, rows[0], atol=1e-6)
    error_of(
        server.post("/v1/embeddings", input="x" * 300), 400, "context_length_exceeded", "input"
    )
    wrong = server.post("/v1/embeddings", input="hi", dimensions=3)
    error_of(wrong, 400, "unsupported_field", "dimensions")


def test_a_limit_of_new_tokens():
    with Server(max_tokens=5) as server:
        error_of(server.complete(max_tokens=6), 400, "too_many_tokens", "max_tokens")
        assert server.chat().json()["usage"]["completion_tokens"] == 5
