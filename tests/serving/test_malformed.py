"""What no client should send: each request is refused with a 4xx within a second, in OpenAI's form
where it asks the API for something, and the server answers the next one as before.

To add a request, add a row to FIELDS, BODIES, or RAW.
"""

import gzip
import json
import socket
import time

import pytest
from served import KEY

pytestmark = pytest.mark.slow

NAN, INFINITE = float("nan"), float("inf")
GOOD = {
    "completions": {"model": "base", "prompt": "A", "max_tokens": 2},
    "chat/completions": {
        "model": "base",
        "messages": [{"role": "user", "content": "A"}],
        "max_tokens": 2,
    },
    "embeddings": {"model": "base", "input": "A"},
}
BOTH = {  # fields of completions and of chat, and what they cannot be
    "model": [1, [], {}, True],
    "max_tokens": ["many", -1, 1.5, 10**9, 10**30, [], -(10**30), INFINITE],
    "temperature": ["hot", -1, NAN, INFINITE, [], {}, 10**400],
    "top_p": [-1, 2, "x", NAN, []],
    "n": [0, -1, 1.5, 10**9, 10**30, "x", []],
    "stop": [1, [1], {}, [None], ["a"] * 5000, ["a" * 10**6] * 4],
    "seed": ["x", 1.5, [], NAN, 10**40],
    "presence_penalty": ["x", NAN, [], 10**30],
    "frequency_penalty": ["x", INFINITE, {}, -(10**30)],
    "logit_bias": [[], 1, {"x": 1}, {"-1": 1}, {"999999": 1}, {"1": "x"}, {"1": 1e9}, {"1": NAN}],
    "stream": ["yes", 1, []],
    "stream_options": [1, {"nothing": 1}, {"include_usage": True}],  # without stream
    "user": [1, []],
    "top_k": [-5, "x", 1.5, 10**30],
    "min_p": [2, -1, "x", NAN],
    "typical_p": [2, "x"],
    "repetition_penalty": [0, -1, "x", NAN],
    "no_repeat_ngram": [-1, "x", 10**30],
    "min_tokens": [-1, "x", 10**30],
    "ignore_eos": ["x", 3],
    "stop_token_ids": [1, ["x"], [-1], [10**9]],
    "guided_json": ["{", 5, {"type": "nothing"}],
    "guided_regex": ["(", 5, []],
    "guided_choice": ["a", [], [1], [[]]],
    "guided_grammar": ["a b c", 5, "start: nothing"],
    "nothing": [1],
}
FIELDS = {
    "completions": {
        "prompt": [1, 1.5, True, {}, [], [1.5], [["a"]], [None], [1, "a"], [-1], [10**9], ["a", 1]]
        + [[[1], "a"], [[[1]]], "A" * 100_000, ["A"] * 10_000],
        "suffix": ["x", 1],
        "best_of": [0, "x", 10**9, -1],
        "logprobs": [-1, 10**6, "x", 1.5],
        "echo": ["yes", []],
    },
    "chat/completions": {
        "messages": [1, "x", {}, [], [1], [{}], [None], [[]]]
        + [
            [{"role": role, "content": content}]
            for role, content in (
                *(("wizard", "A"), (1, "A"), (None, "A"), ("user", 1), ("user", {}), ("user", [1])),
                *(("user", [{"type": "image_url", "image_url": {"url": "x"}}]), ("user", [{}])),
                *(("user", [{"type": "text"}]), ("user", [{"type": "text", "text": 1}])),
                ("user", [{"type": ["text"], "text": "A"}]),
            )
        ]
        + [
            [{"role": "user", "content": "A", "nothing": 1}],
            [{"role": "user", "content": "\ud800"}],
            [{"role": "user", "content": "A" * 100_000}],
            [{"role": "user", "content": "A"}] * 5000,
            [{"role": "assistant", "content": None, "tool_calls": "x"}],
            [{"role": "assistant", "content": None, "tool_calls": [{}]}],
        ],
        "max_completion_tokens": ["x", -1, 10**30],
        "logprobs": ["x", 3],
        "top_logprobs": [-1, 21, "x", 3],  # the last without logprobs
        "tools": ["x", [1], [{}], [{"type": "function"}], [{"type": "wizard"}]],
        "tool_choice": ["x", 1, {"type": "function"}, "required"],  # without tools
        "response_format": ["x", {}, {"type": "x"}, {"type": "json_schema"}]
        + [{"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}],
        "functions": [[{"name": "a"}]],
        "modalities": [["audio"]],
    },
    "embeddings": {
        "model": [1, [], {}],
        "input": [1, 1.5, {}, [], [1.5], [-1], [10**9], [None], "A" * 100_000, [[]], [["a"]]],
        "encoding_format": ["x", 1],
        "dimensions": [3, "x", -1],
        "nothing": [1],
    },
}
FIELDS["completions"] |= BOTH
FIELDS["chat/completions"] |= BOTH
CASES = [
    (endpoint, field, value)
    for endpoint, fields in FIELDS.items()
    for field, values in fields.items()
    for value in values
]
JSON = json.dumps(GOOD["completions"])
BODIES = {  # a body, or (a body, its headers)
    "nothing": b"",
    "cut": JSON[:-1].encode(),
    "cut in a text": JSON[:20].encode(),
    "more behind": (JSON + "}").encode(),
    "two": (JSON + JSON).encode(),
    "a list": b"[]",
    "a number": b"1",
    "a text": b'"A"',
    "null": b"null",
    "lists in lists": b"[" * 100_000,
    "closed lists in lists": b"[" * 100_000 + b"]" * 100_000,
    "objects in objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a deep schema": json.dumps(GOOD["completions"])[:-1].encode()
    + b', "guided_json": '
    + b'{"items":' * 5000
    + b"{}"
    + b"}" * 5001,
    "no UTF-8": b'{"model": "base", "prompt": "\xff\xfe"}',
    "half a character": b'{"model": "base", "prompt": "\xc3"}',
    "UTF-16": JSON.encode("utf-16"),
    "half a pair": b'{"model": "base", "prompt": "\\ud800"}',
    "half a pair as a field": b'{"model": "base", "prompt": "A", "\\ud800": 1}',
    "a null byte": JSON.encode() + b"\0",
    "null bytes": b"\0" * 1000,
    "a number of 5,000 digits": JSON[:-1].encode() + b', "seed": ' + b"9" * 5000 + b"}",
    "a number too large": JSON[:-1].encode() + b', "temperature": 1e999}',
    "a key twice": b'{"model": "base", "prompt": "A", "prompt": 5}',
    "a form": (b"model=base&prompt=A", {"content-type": "application/x-www-form-urlencoded"}),
    "a file": (b"--x\r\n\r\nA\r\n--x--", {"content-type": "multipart/form-data; boundary=x"}),
    "packed and not said how": gzip.compress(JSON.encode()),
    "packed": (gzip.compress(JSON.encode()), {"content-encoding": "gzip"}),
    "a bomb": (gzip.compress(b" " * 50_000_000), {"content-encoding": "gzip"}),
    "an unknown packing": (JSON.encode(), {"content-encoding": "wizard"}),
    "100 MB": b'{"prompt": "' + b"A" * 100_000_000,
}
HOST = b"Host: 127.0.0.1\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n"
HEAD = HOST + b"Content-Type: application/json\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\n" + HEAD
PATHS = (
    *("/page/../../etc/passwd", "/page/%2e%2e/%2e%2e/etc/passwd", "/page/..%2f..%2fpyproject.toml"),
    *(
        "/page//etc/passwd",
        "/page/.%00",
        "/page/\\..\\..\\x",
        "/page/nothing.js",
        "/%00",
        "/v1/%ff",
    ),
    *("/v1/models/%2e%2e%2fbase", "/v1/models/" + "a" * 5000, "/v1", "/nothing", "/v1/chat"),
)
RAW = {  # what is sent as it is
    **{f"the path {path[:40]}": f"GET {path} HTTP/1.1\r\n".encode() + HOST for path in PATHS},
    **{
        f"{method} {path}": f"{method} {path} HTTP/1.1\r\n".encode() + HOST
        for method, path in (
            *(("GET", "/v1/completions"), ("DELETE", "/v1/completions"), ("PUT", "/v1/models")),
            *(("POST", "/v1/models"), ("PATCH", "/v1/embeddings"), ("POST", "/health")),
            *(("GET", "/v1/chat/completions"), ("POST", "/metrics"), ("WIZARD", "/v1/completions")),
        )
    },
    "no HTTP": b"hello",
    "bytes": bytes(range(256)),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "a header of 1 MB": b"GET / HTTP/1.1\r\nX: " + b"a" * 2**20 + b"\r\n",
    "a header without a name": b"GET / HTTP/1.1\r\n: a\r\n",
    "a null byte in a header": b"GET / HTTP/1.1\r\nX: \0\r\n",
    "a negative length": POST + b"Content-Length: -5\r\n",
    "a length in words": POST + b"Content-Length: five\r\n",
    "a length of 10^30": POST + b"Content-Length: 1" + b"0" * 30 + b"\r\n",
    "a length of 100 MB": POST + b"Content-Length: 100000000\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n",
    "too short a length": POST + b"Content-Length: 5\r\n\r\n" + JSON.encode(),
    "a broken chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nA",
    "an unknown transfer": POST + b"Transfer-Encoding: wizard\r\n\r\n" + JSON.encode(),
}


@pytest.fixture(autouse=True)
def answers_on(served):
    """After every test the server says what it said before."""
    before = completion(served)
    assert before[0] == 200
    yield
    assert completion(served)[0] == 200
    assert choice(completion(served)) == choice(before)


def completion(served):
    body = {"model": "base", "prompt": "The quick", "temperature": 0, "max_tokens": 4}
    return served.server.request("POST", "/v1/completions", body)


def choice(answer):
    return json.loads(answer[2])["choices"][0]


def fault(status, content, started):
    """What is wrong with a refusal, or nothing."""
    seconds = time.monotonic() - started
    if not 400 <= status < 500:
        return f"{status} {content[:200]}"
    if seconds > 1:
        return f"{status} after {seconds:.1f} s"
    return ""


def fault_of_error(content):
    """What is wrong with OpenAI's form of an error."""
    try:
        error = json.loads(content)["error"]
        assert error["message"] and error["type"] and {"param", "code"} <= error.keys()
    except (ValueError, KeyError, TypeError, AssertionError):
        return f"no error in OpenAI's form: {content[:200]}"
    return "" if len(error["message"]) < 2000 else f"{len(error['message'])} characters of message"


def test_there_are_many():
    assert len(CASES) + len(BODIES) + len(RAW) >= 200


@pytest.mark.parametrize("endpoint", FIELDS)
def test_fields(served, endpoint):
    faults = []
    for _, field, value in (case for case in CASES if case[0] == endpoint):
        body = json.dumps({**GOOD[endpoint], field: value})
        start = time.monotonic()
        status, _, content = served.server.request(
            "POST", f"/v1/{endpoint}", body, content_type="application/json"
        )
        wrong = fault(status, content, start) or fault_of_error(content)
        if not wrong and not any(
            word in content.decode() for word in (field, "JSON", "vocabulary", "message ")
        ):
            wrong = f"the message names no {field}: {content[:200]}"
        if wrong:
            faults.append(f"{field} = {str(value)[:60]}: {wrong}")
    assert not faults, "\n".join(faults)


def test_a_field_that_is_missing(served):
    for endpoint, body in GOOD.items():
        for field in {"model", "prompt", "messages", "input"} & body.keys():
            rest = {name: value for name, value in body.items() if name != field}
            status, _, content = served.server.request("POST", f"/v1/{endpoint}", rest)
            if (field, status) != ("model", 200):  # one model alone needs no name
                assert status == 400 and not fault_of_error(content), (field, content)


def test_bodies(served):
    faults = []
    for name, body in BODIES.items():
        body, headers = body if isinstance(body, tuple) else (body, {})
        headers = {"content-type": "application/json", **headers}
        start = time.monotonic()
        try:
            status, _, content = served.server.request("POST", "/v1/completions", body, **headers)
        except OSError as error:  # closed before all of it was sent
            if len(body) < 10**6:
                faults.append(f"{name}: {error!r}")
            continue
        if wrong := fault(status, content, start) or fault_of_error(content):
            faults.append(f"{name}: {wrong}")
    assert not faults, "\n".join(faults)


def talk(served, sent, seconds=3):
    """What comes back on a connection of its own before it is closed or silent."""
    got = b""
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=seconds) as raw:
        try:
            raw.sendall(sent)
            while b"\r\n\r\n" not in got and (part := raw.recv(65536)):
                got += part
        except (ConnectionError, TimeoutError):
            pass
    return got


def test_raw_requests(served):
    faults = []
    for name, sent in RAW.items():
        sent += b"" if b"\r\n\r\n" in sent else b"\r\n\r\n" if sent[-2:] != b"\r\n" else b"\r\n"
        start = time.monotonic()
        got = talk(served, sent)
        status = int(got.split()[1]) if got.startswith(b"HTTP/1") else 0
        if wrong := fault(status, got, start):
            faults.append(f"{name}: {wrong}")
    assert not faults, "\n".join(faults)


def test_bodies_that_never_end_hold_nobody_up(served):
    sent = {
        "a body that does not come": POST + b"Content-Length: 50\r\n\r\n",
        "half a body": POST + b"Content-Length: 50\r\n\r\n{",
        "chunks without an end": POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
        "half a head": POST[:40],
    }
    open_ones = []
    for start in [*sent.values()] * 25:
        raw = socket.create_connection(("127.0.0.1", served.server.port), timeout=5)
        raw.sendall(start)
        open_ones.append(raw)
    start = time.monotonic()
    assert completion(served)[0] == 200
    assert time.monotonic() - start < 1
    for raw in open_ones:
        raw.close()


def test_chunks_of_100_mb_are_cut_off(served):
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=5) as raw:
        raw.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
        count = 0
        try:
            for count in range(100):  # noqa: B007
                raw.sendall(chunk)
            got = raw.recv(100)
        except ConnectionError:
            got = b"HTTP/1.1 413"
    assert b" 413" in got[:20], (count, got)


def test_a_key_is_asked_for(served):
    for path in ("/v1/models", "/v1/models/base"):
        for key in ("", "Bearer", "Bearer wrong", "Basic c2VjcmV0", KEY, f"Bearer {KEY}x", "é"):
            status, _, content = served.server.request("GET", path, authorization=key)
            assert status == 401 and not fault_of_error(content), key
