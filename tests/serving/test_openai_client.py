"""The official `openai` clients, Python's here and npm's in client.mjs, make the same calls.

A call is a row of TABLE, whose answer must be what the model says alone in this process, or a
function of SPECIAL. Each gives a plain value, which both clients must see alike.
"""

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from client_calls import KEY, SPECIAL, TABLE, constants, create, joined, outcome

from gptjax.tokenizer import chat_template

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.parity

# our name of a request's setting
OURS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "stop_token_ids": "stop_tokens",
    "ignore_eos": "ignore_end",
    "guided_choice": "choices",
    "guided_regex": "regex",
}
AS_OURS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


def options_of(endpoint, parameters):
    """The same settings as keywords of `lm.generate`."""
    flat = {**parameters, **parameters.get("extra_body", {})}
    length = 16 if endpoint == "completions" else 10**6
    options = {"temperature": 1.0, "max_new_tokens": length}
    for name, value in flat.items():
        if value is not None and (name in OURS or name in AS_OURS):
            options[OURS.get(name, name)] = value
    if bias := flat.get("logit_bias"):
        options["logit_bias"] = {int(i): value for i, value in bias.items()}
    if (flat.get("response_format") or {}).get("type") == "json_schema":
        options["schema"] = flat["response_format"]["json_schema"]["schema"]
    return options


def prompts_of(lm, endpoint, parameters):
    if endpoint == "chat":
        tools = parameters.get("tools") if parameters.get("tool_choice") != "none" else None
        texts = [
            {**m, "content": "\n".join(part["text"] for part in m["content"])}
            if isinstance(m["content"], list)
            else m
            for m in parameters["messages"]
        ]
        return [chat_template.encode(lm.tokenizer, texts, tools=tools)]
    prompt = parameters["prompt"]
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return [lm.encode(p) for p in (prompt if several else [prompt])]


def alone(served, endpoint, parameters):
    """The completions that the model makes in this process, in the order of choices."""
    lm = served.lm
    if parameters.get("model") == "fox":
        lm = lm.with_adapter(served.folder / "fox")
    options = options_of(endpoint, parameters)
    count = parameters.get("best_of") or parameters.get("n") or 1
    wanted = parameters.get("n") or 1
    seed = options.pop("seed", 0)
    completions = []
    for number, prompt in enumerate(prompts_of(lm, endpoint, parameters)):
        room = lm.config.context + 1 - len(prompt)
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
        texts = [
            lm.generate([prompt], seed=seed + number * count + i, **options)[0]
            for i in range(count)
        ]
        if count > wanted:
            texts.sort(key=lambda c: -float(np.mean(c.logprobs)))
        completions += texts[:wanted]
    return completions


@pytest.mark.parametrize("name", TABLE)
def test_answers_are_what_the_model_says_alone(served, name):
    endpoint, parameters = TABLE[name]
    answer = create(served, endpoint, parameters)
    prompts = prompts_of(served.lm, endpoint, parameters)
    completions = alone(served, endpoint, parameters)
    echoed = [served.lm.tokenizer.decode(p) if parameters.get("echo") else "" for p in prompts]
    per_prompt = len(completions) // len(prompts)
    texts = [echoed[i // per_prompt] + c.text for i, c in enumerate(completions)]
    assert outcome(answer.choices) == {
        i: [text, completion.finish_reason]
        for i, (text, completion) in enumerate(zip(texts, completions, strict=True))
    }
    assert answer.usage.prompt_tokens == sum(len(prompt) for prompt in prompts)
    written = sum(len(c.tokens) + (c.end is not None) for c in completions)
    if not parameters.get("best_of"):
        assert answer.usage.completion_tokens in (written, sum(len(c.tokens) for c in completions))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == parameters.get("model", "base")
    check_logprobs(served, answer, parameters, prompts, completions)


def check_logprobs(served, answer, parameters, prompts, completions):
    if not parameters.get("logprobs"):
        assert all(choice.logprobs is None for choice in answer.choices)
        return
    prompt, completion = prompts[0], completions[0]
    ids = prompt + completion.tokens
    scores = served.lm.token_logprobs([ids])[0].logprobs
    given = answer.choices[0].logprobs
    if given_content := getattr(given, "content", None):
        np.testing.assert_allclose(
            [entry.logprob for entry in given_content], scores[len(prompt) - 1 :], atol=1e-3
        )
        whole = b"".join(bytes(entry.bytes) for entry in given_content)
        assert whole.decode("utf-8", "replace") == answer.choices[0].message.content
        for entry in given_content:
            top = [other.logprob for other in entry.top_logprobs]
            assert top == sorted(top, reverse=True) and len(top) == parameters["top_logprobs"]
            assert entry.token == entry.top_logprobs[0].token  # it is greedy
        return
    expected = [None, *scores] if parameters.get("echo") else list(scores[len(prompt) - 1 :])
    assert len(given.tokens) == len(given.text_offset) == len(expected)
    assert given.token_logprobs[0] is None or not parameters.get("echo")
    pairs = [p for p in zip(given.token_logprobs, expected, strict=True) if p[1] is not None]
    np.testing.assert_allclose(*zip(*pairs, strict=True), atol=1e-3)
    for number, (offset, top) in enumerate(zip(given.text_offset, given.top_logprobs, strict=True)):
        assert 0 <= offset <= len(answer.choices[0].text), number
        assert top is None or 0 < len(top) <= parameters["logprobs"] + 1


@pytest.mark.parametrize("name", [n for n in TABLE if n not in ("best of", "echo and logprobs")])
def test_a_stream_says_the_same(served, name):
    endpoint, parameters = TABLE[name]
    whole = create(served, endpoint, parameters)
    parameters = {**parameters, "extra_body": dict(parameters.get("extra_body", {}))}
    for key in ("stream", "stream_options"):
        parameters["extra_body"].pop(key, None)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(create(served, endpoint, parameters, **usage))
    assert joined(c for chunk in chunks for c in chunk.choices) == outcome(whole.choices)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    if parameters.get("logprobs"):
        given = [c.logprobs for chunk in chunks for c in chunk.choices if c.logprobs]
        own = whole.choices[0].logprobs
        if endpoint == "chat":
            assert [entry for part in given for entry in part.content] == own.content
        else:
            assert [token for part in given for token in part.tokens] == own.tokens
            assert [at for part in given for at in part.text_offset] == own.text_offset


async def _all_at_once(served, names):
    api = openai.AsyncOpenAI(base_url=served.server.url + "/v1", api_key=KEY, max_retries=200)
    calls = []
    for name in names:
        endpoint, parameters = TABLE[name]
        resource = api.completions if endpoint == "completions" else api.chat.completions
        calls.append(resource.create(**{"model": "base", **parameters}))
    async with api:
        return await asyncio.gather(*calls)


def test_all_at_once_say_the_same(served):
    """More than slots and queue hold: refused ones come again after the time that they are told."""
    names = [name for name, row in TABLE.items() if row[1].get("n", 1) == 1]
    answers = asyncio.run(_all_at_once(served, names))
    for name, answer in zip(names, answers, strict=True):
        assert outcome(answer.choices) == outcome(create(served, *TABLE[name]).choices), name


@pytest.mark.parametrize("name", SPECIAL)
def test_other_calls(served, name):
    SPECIAL[name](served)


def npm_folder():
    """A folder with the npm package `openai`, which CI installs, or a skipped test."""
    folder = Path(os.environ.get("GPTJAX_NODE_MODULES", ""))
    if not shutil.which("node"):
        pytest.skip("no node on this machine")
    if not (folder / "openai").is_dir():
        pytest.skip("GPTJAX_NODE_MODULES names no folder with the npm package openai in it")
    return folder


def test_the_npm_client_sees_the_same(served):
    folder = npm_folder()
    given = {
        "url": served.server.url,
        "key": KEY,
        "table": TABLE,
        "constants": constants(),
    }
    done = subprocess.run(
        ["node", str(Path(__file__).with_name("client.mjs"))],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "NODE_PATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout)
    expected = {name: outcome(create(served, *TABLE[name]).choices) for name in TABLE}
    expected |= {name: call(served) for name, call in SPECIAL.items()}
    assert len(expected) >= 60
    expected = json.loads(json.dumps(expected))
    differ = {n: (got.get(n), expected[n]) for n in expected if got.get(n) != expected[n]}
    assert not differ, json.dumps(differ, indent=1)
