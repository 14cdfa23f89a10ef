"""The calls of test_openai_client.py: a table of requests, and those that need more than a row.

client.mjs gets the table as JSON and has the other calls under the same names.
"""

import contextlib
import json
import re
import time

import numpy as np
import pytest
from served import KEY

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")  # which openai brings

QUICK = "The quick"
HELLO = [{"role": "user", "content": "Hello"}]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}
]
ROLES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Bern", "Rome"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}
ROUND_TRIP = [
    {"role": "user", "content": "Rain in Bern?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"town": "Bern"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "No."},
]
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"town": "Bern"}}\n</tool_call>'
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "ok": {"type": "boolean"}},
    "required": ["x", "ok"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "point", "schema": POINT, "strict": True},
}
NULLS = dict.fromkeys(
    ("best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "n", "presence_penalty")
    + ("seed", "stop", "stream", "stream_options", "suffix", "top_p", "user")
)
CHAT_NULLS = dict.fromkeys(
    ("frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "max_tokens", "n", "tools")
    + ("presence_penalty", "response_format", "seed", "stop", "stream", "tool_choice", "top_p")
)
GREEDY = {"temperature": 0, "max_tokens": 9}
DRAWN = {"temperature": 0.9, "seed": 5, "max_tokens": 9}

# name: (endpoint, parameters); what is in extra_body goes beside them in the request
TABLE = {
    "text": ("completions", dict(prompt=QUICK, **GREEDY)),
    "several texts": ("completions", dict(prompt=[QUICK, "A", "the"], **GREEDY)),
    "ids": ("completions", dict(prompt=[84, 104, 101], **GREEDY)),
    "lists of ids": ("completions", dict(prompt=[[84, 104], [5, 6, 7]], **GREEDY)),
    "echo": ("completions", dict(prompt=QUICK, echo=True, **GREEDY)),
    "logprobs": ("completions", dict(prompt=QUICK, logprobs=3, **GREEDY)),
    "echo and logprobs": ("completions", dict(prompt=QUICK, echo=True, logprobs=2, **GREEDY)),
    "n": ("completions", dict(prompt=QUICK, n=3, **DRAWN)),
    "n of several": ("completions", dict(prompt=[QUICK, "A"], n=2, **DRAWN)),
    "best of": ("completions", dict(prompt=QUICK, best_of=4, n=2, **DRAWN)),
    "stop": ("completions", dict(prompt=QUICK, temperature=0, max_tokens=40, stop="r")),
    "stops": ("completions", dict(prompt=QUICK, temperature=0, max_tokens=40, stop=["\x13", "q"])),
    "seed": ("completions", dict(prompt=QUICK, **DRAWN)),
    "default length": ("completions", dict(prompt=QUICK, temperature=0)),
    "top p": ("completions", dict(prompt=QUICK, top_p=0.3, **DRAWN)),
    "logit bias": ("completions", dict(prompt=QUICK, logit_bias={"32": 100}, **GREEDY)),
    "a token forbidden": ("completions", dict(prompt=QUICK, logit_bias={"81": -100}, **GREEDY)),
    "presence": ("completions", dict(prompt=QUICK, presence_penalty=2.0, **GREEDY)),
    "frequency": ("completions", dict(prompt=QUICK, frequency_penalty=2.0, **GREEDY)),
    "other settings": (
        "completions",
        dict(prompt=QUICK, extra_body=dict(top_k=20, min_p=0.01, repetition_penalty=1.3), **DRAWN),
    ),
    "no end": (
        "completions",
        dict(
            prompt=QUICK, temperature=1.0, seed=1, max_tokens=300, extra_body=dict(ignore_eos=True)
        ),
    ),
    "stop ids": (
        "completions",
        dict(prompt=QUICK, temperature=0, max_tokens=40, extra_body=dict(stop_token_ids=[81])),
    ),
    "nulls": ("completions", dict(prompt=QUICK, extra_body=NULLS, **GREEDY)),
    "adapter": ("completions", dict(prompt=QUICK, model="fox", **GREEDY)),
    "choice": (
        "completions",
        dict(prompt=QUICK, extra_body=dict(guided_choice=["red", "green"]), **GREEDY),
    ),
    "regex": (
        "completions",
        dict(prompt=QUICK, extra_body=dict(guided_regex="[a-c]{3}[0-9]"), **DRAWN),
    ),
    "chat": ("chat", dict(messages=HELLO, **GREEDY)),
    "parts": ("chat", dict(messages=PARTS, **GREEDY)),
    "roles": ("chat", dict(messages=ROLES, **GREEDY)),
    "new name of the length": (
        "chat",
        dict(messages=HELLO, temperature=0, max_completion_tokens=7),
    ),
    "chat logprobs": ("chat", dict(messages=HELLO, logprobs=True, top_logprobs=4, **GREEDY)),
    "chat n": ("chat", dict(messages=HELLO, n=3, **DRAWN)),
    "chat stop": ("chat", dict(messages=HELLO, stop=["\x13", "a"], **DRAWN)),
    "chat nulls": ("chat", dict(messages=HELLO, extra_body=CHAT_NULLS, temperature=0)),
    "chat adapter": ("chat", dict(messages=HELLO, model="fox", **GREEDY)),
    "tools unused": ("chat", dict(messages=HELLO, tools=[WEATHER], **GREEDY)),
    "no tool": ("chat", dict(messages=HELLO, tools=[WEATHER], tool_choice="none", **GREEDY)),
    "tool's answer": ("chat", dict(messages=ROUND_TRIP, tools=[WEATHER], **GREEDY)),
    "schema": ("chat", dict(messages=HELLO, response_format=SCHEMA, seed=1, max_tokens=99)),
    "plain format": ("chat", dict(messages=HELLO, response_format={"type": "text"}, **GREEDY)),
}
SPECIAL = {}


def special(call):
    SPECIAL[call.__name__] = call
    return call


def client(served, **settings):
    return openai.OpenAI(base_url=served.server.url + "/v1", api_key=KEY, **settings)


def create(served, endpoint, parameters, **more):
    api = client(served)
    resource = api.completions if endpoint == "completions" else api.chat.completions
    return resource.create(**{"model": "base", **parameters, **more})


def joined(choices):
    """What streamed choices say in all: {index: [text, reason]}."""
    whole = {}
    for choice in choices:
        entry = whole.setdefault(choice.index, ["", None])
        entry[0] += choice.text if hasattr(choice, "text") else choice.delta.content or ""
        entry[1] = choice.finish_reason or entry[1]
    return whole


def outcome(choices):
    """{index: [text, reason]} of an answer's choices."""
    return {
        choice.index: [
            choice.text if hasattr(choice, "text") else choice.message.content,
            choice.finish_reason,
        ]
        for choice in choices
    }


@special
def lists_models(served):
    rows = client(served).models.list().data
    return [[row.id, row.object, getattr(row, "parent", None)] for row in rows]


@special
def retrieves_a_model(served):
    return client(served).models.retrieve("base").id


@special
def retrieves_an_adapter(served):
    row = client(served).models.retrieve("fox")
    return [row.id, row.parent]


@special
def embeds_a_text(served):
    answer = client(served).embeddings.create(model="base", input=QUICK, encoding_format="float")
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == len(served.lm.encode(QUICK))
    vector = np.array(answer.data[0].embedding)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-4)
    return len(vector)


@special
def embeds_in_base64(served):
    """As the client asks for where nothing else is said."""
    api = client(served)
    floats = api.embeddings.create(model="base", input=QUICK, encoding_format="float")
    decoded = api.embeddings.create(model="base", input=QUICK)
    np.testing.assert_array_equal(
        np.float32(decoded.data[0].embedding), np.float32(floats.data[0].embedding)
    )
    return len(decoded.data[0].embedding)


@special
def embeds_several(served):
    api = client(served)
    rows = api.embeddings.create(model="base", input=["A", QUICK, "A"]).data
    alone = api.embeddings.create(model="base", input=QUICK).data[0].embedding
    assert rows[0].embedding == rows[2].embedding != rows[1].embedding
    np.testing.assert_allclose(rows[1].embedding, alone, atol=1e-5)
    return [row.index for row in rows]


@special
def embeds_ids(served):
    api = client(served)
    ids = served.lm.encode(QUICK)
    rows = api.embeddings.create(model="base", input=[ids, ids[:2]]).data
    text = api.embeddings.create(model="base", input=QUICK).data[0].embedding
    np.testing.assert_allclose(rows[0].embedding, text, atol=1e-5)
    return len(rows)


END = 263  # the token that ends an answer of the toy model; five tokens, then that
ENDS = dict(messages=HELLO, seed=5, logit_bias={END: 100}, extra_body={"min_tokens": 5})


@special
def streams_by_the_helper(served):
    with client(served).chat.completions.stream(model="base", **ENDS) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0]
    assert "".join(deltas) == final.message.content and final.finish_reason == "stop"
    return final.message.content


@special
def parses_an_answer(served):
    class Point(pydantic.BaseModel):
        x: int
        ok: bool

    answer = client(served).chat.completions.parse(
        model="base", messages=HELLO, response_format=Point, max_tokens=99, seed=3
    )
    assert isinstance(answer.choices[0].message.parsed, Point)
    return answer.choices[0].finish_reason


@special
def answers_with_an_object(served):
    answer = client(served).chat.completions.create(
        model="base",
        messages=HELLO,
        response_format={"type": "json_object"},
        max_tokens=4,
        temperature=0,
    )
    text = answer.choices[0].message.content
    assert text.lstrip()[:1] == "{"
    return text


TOOL = dict(messages=HELLO, tools=[WEATHER], temperature=0, max_tokens=200)
SAYS_CALL = dict(extra_body={"guided_choice": [CALLED]})


@special
def calls_a_tool(served):
    choice = create(served, "chat", {**TOOL, **SAYS_CALL}).choices[0]
    call = choice.message.tool_calls[0]
    assert call.type == "function" and call.id and not choice.message.content
    return [choice.finish_reason, call.function.name, call.function.arguments]


@special
def streams_a_tool_call(served):
    chunks = create(served, "chat", {**TOOL, **SAYS_CALL}, stream=True)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    arguments = "".join(call.function.arguments or "" for call in calls)
    assert not any(choice.delta.content for choice in choices)
    return [choices[-1].finish_reason, calls[0].function.name, arguments, calls[0].index]


@special
def forces_a_tool(served):
    forced = {"type": "function", "function": {"name": "weather"}}
    choice = create(served, "chat", {**TOOL, "tool_choice": forced}).choices[0]
    call = choice.message.tool_calls[0]
    assert json.loads(call.function.arguments)["town"] in ("Bern", "Rome")
    return [choice.finish_reason, call.function.name, call.function.arguments]


@special
def gives_raw_responses(served):
    raw = client(served).chat.completions.with_raw_response.create(
        model="base", messages=HELLO, **GREEDY
    )
    assert raw.headers["x-request-id"]
    return [raw.status_code, raw.headers["content-type"], raw.parse().object]


@special
def takes_options_for_one_call(served):
    api = client(served).with_options(timeout=30, max_retries=0)
    return api.completions.create(model="base", prompt=QUICK, **GREEDY).choices[0].text


LONG = dict(model="base", prompt=QUICK, max_tokens=900, extra_body={"ignore_eos": True})


def all_free(served, seconds=5):
    """Whether all slots are free again within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        body = served.server.request("GET", "/metrics")[2].decode()
        busy = re.search(r"^gptjax_slots_used(?:\{.*\})? (\S+)$", body, re.M)
        if float(busy[1]) == 0:
            return True
        time.sleep(0.05)
    return False


@special
def gives_up_after_a_time(served):
    with pytest.raises(openai.APITimeoutError):
        client(served, timeout=0.05, max_retries=0).completions.create(**LONG)
    return all_free(served)


@special
def cancels_a_stream(served):
    stream = client(served).completions.create(**LONG, stream=True)
    first = [choice.text for chunk, _ in zip(stream, range(3)) for choice in chunk.choices]
    stream.close()
    assert first
    return all_free(served)


@special
def comes_again_when_refused(served):
    """No more than slots and queue hold at once; the client waits as Retry-After says."""
    many = dict(model="base", prompt=[QUICK] * 16, max_tokens=150, extra_body={"ignore_eos": True})
    with contextlib.ExitStack() as stack:
        api = client(served, max_retries=0)
        for _ in range(3):
            with contextlib.suppress(openai.RateLimitError):
                stream = api.completions.create(**many, stream=True)
                stack.callback(stream.close)
        with pytest.raises(openai.RateLimitError) as caught:
            api.completions.create(**many, stream=True)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        patient = client(served, max_retries=30)
        text = patient.completions.create(model="base", prompt=QUICK, **GREEDY).choices[0].text
    return [caught.value.status_code, text]


def refusal(kind, call):
    """What an error says: its status, type, parameter and code."""
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert error.body["message"] and "Traceback" not in error.body["message"]
    return [error.status_code, error.body["type"], error.body["param"], error.body["code"]]


@special
def refuses_a_wrong_key(served):
    wrong = openai.OpenAI(base_url=served.server.url + "/v1", api_key="wrong")
    return refusal(openai.AuthenticationError, wrong.models.list)


@special
def knows_no_other_model(served):
    return refusal(
        openai.NotFoundError,
        lambda: client(served).completions.create(model="gpt-9", prompt="A"),
    )


@special
def retrieves_no_other_model(served):
    return refusal(openai.NotFoundError, lambda: client(served).models.retrieve("gpt-9"))


@special
def has_no_other_endpoint(served):
    return refusal(
        openai.NotFoundError, lambda: client(served).responses.create(model="base", input="A")
    )


@special
def refuses_a_suffix(served):
    return refusal(
        openai.BadRequestError,
        lambda: create(served, "completions", dict(prompt="A", suffix="B")),
    )


@special
def refuses_an_unknown_field(served):
    return refusal(
        openai.BadRequestError,
        lambda: create(served, "chat", dict(messages=HELLO, extra_body={"temprature": 1})),
    )


@special
def refuses_an_image(served):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    messages = [{"role": "user", "content": [image]}]
    return refusal(openai.BadRequestError, lambda: create(served, "chat", dict(messages=messages)))


@special
def refuses_a_long_prompt(served):
    return refusal(
        openai.BadRequestError, lambda: create(served, "completions", dict(prompt="A b " * 2000))
    )


@special
def refuses_a_wrong_type(served):
    return refusal(
        openai.APIStatusError,
        lambda: create(served, "completions", dict(prompt="A", max_tokens="many")),
    )


@special
def refuses_a_hundred_megabytes(served):
    """With 413, or by a connection that is closed before all of it is sent."""
    with pytest.raises(openai.APIError) as caught:
        client(served, max_retries=0).completions.create(model="base", prompt="A" * 100_000_000)
    return getattr(caught.value, "status_code", 413)


def constants():
    """What client.mjs needs beside the table."""
    long = {"prompt": QUICK, "max_tokens": 900, "extra_body": {"ignore_eos": True}}
    return dict(
        QUICK=QUICK,
        HELLO=HELLO,
        GREEDY=GREEDY,
        TOOL=TOOL,
        CALLED=CALLED,
        LONG=long,
        ENDS=ENDS,
        POINT=POINT,
    )
