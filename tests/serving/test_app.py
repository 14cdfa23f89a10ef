"""What is around a request: bodies that are no JSON, keys, origins, numbers, the description."""

import time

import pytest
from known_engine import Server

from gptjax.serving import fields, openapi


@pytest.fixture(scope="module")
def server():
    with Server(body_bytes=100_000) as server:
        yield server


def send(server, content, kind="application/json", path="/v1/completions"):
    return server.ask("POST", path, content=content, headers={"content-type": kind})


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"hi"', 400),
        (b'{"prompt": "\xff"}', 400),
        (b'\xef\xbb\xbf{"prompt": "hi"}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"\\udfff": "hi"}', 400),
        (b'{"prompt": "hi", "temperature": NaN}', 400),
        (b'{"prompt": "hi", "temperature": Infinity}', 400),
        (b'{"prompt": "hi", "guided_json": {"const": 1e999}}', 400),
        (b'{"prompt": "hi", "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "hi", "prompt": "you"}', 400),
        (b'{"prompt": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", 400),
        (b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}", 400),
        (b'{"prompt": "' + b"x" * 200_000 + b'"}', 413),
    ],
)
def test_a_malformed_body_is_refused_at_once(server, content, status):
    began = time.monotonic()
    response = send(server, content)
    assert response.status_code == status
    assert time.monotonic() - began < 1
    error = response.json()["error"]
    assert error["code"] == ("json" if status == 400 else None) and error["message"]


def test_a_large_body_is_refused_while_it_comes(server):
    async def chunks():
        for _ in range(1000):
            yield b"x" * 1000
            chunks.sent += 1000

    chunks.sent = 0
    headers = {"content-type": "application/json"}
    response = server.ask("POST", "/v1/completions", content=chunks(), headers=headers)
    assert response.status_code == 413 and chunks.sent <= 102_000


def test_wrong_routes_methods_and_types(server):
    for response, status in (
        (server.get("/v1/nothing"), 404),
        (server.get("/v1/completions"), 405),
        (server.ask("DELETE", "/v1/models"), 405),
        (send(server, b"{}", "text/plain"), 415),
        (send(server, b"{}", ""), 415),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert server.ask("POST", "/v1/completions", content=b"{}", headers=headers).status_code == 415
    assert send(server, b'{"prompt": "hi"}', "application/json; charset=utf-8").status_code == 200


def test_a_key():
    with Server(api_key="sesame") as server:
        for path in ("/v1/models", "/metrics", "/v1/nothing"):
            assert server.get(path).status_code == 401
        right, wrong = ({"Authorization": f"Bearer {key}"} for key in ("sesame", "sesam"))
        assert server.get("/v1/models", headers=wrong).json()["error"]["code"] == "invalid_api_key"
        assert server.get("/v1/models", headers=right).status_code == 200
        for path in ("/", "/health", "/openapi.json"):
            assert server.get(path).status_code == 200
        origin = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
        preflight = server.ask("OPTIONS", "/v1/completions", headers=origin)
        assert preflight.headers["access-control-allow-origin"] == "*"
        refused = server.get("/v1/models", headers=origin)  # so that a page can read the reason
        assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers


def test_without_a_key_only_pages_of_this_machine_may_ask(server):
    for origin, may in (("http://localhost:3000", True), ("https://example.org", False)):
        response = server.get("/v1/models", headers={"Origin": origin})
        assert ("access-control-allow-origin" in response.headers) == may


def test_a_foreign_name_of_this_machine_is_refused():
    with Server(hosts=("localhost", "[::1]")) as server:
        for host, status in (("localhost:8000", 200), ("[::1]:80", 200), ("evil.org", 403)):
            assert server.get("/v1/models", headers={"Host": host}).status_code == status


def test_numbers_for_prometheus():
    with Server() as server:
        server.complete("hi", max_tokens=4, n=2)
        server.get("/v1/" + "x" * 50)
        text = server.get("/metrics").text
    for line in (
        'gptjax_requests_total{path="/v1/completions",status="200"} 1.0',
        'gptjax_requests_total{path="other",status="404"} 1.0',
        "gptjax_prompt_tokens_total 4.0",
        "gptjax_new_tokens_total 8.0",
        'gptjax_texts_total{reason="length"} 2.0',
        "gptjax_time_to_first_token_seconds_count 2.0",
        "gptjax_time_between_tokens_seconds_count 4.0",
        "gptjax_slots 2.0",
        "gptjax_queue_texts 0.0",
    ):
        assert line in text.splitlines()


def test_the_description_is_made_of_the_tables(server):
    description = server.get("/openapi.json").json()
    assert description["openapi"].startswith("3.1")
    body = description["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == set(fields.CHAT)
    assert schema["properties"]["audio"]["enum"] == [None]
    jsonschema = pytest.importorskip("jsonschema")
    for table in (fields.CHAT, fields.COMPLETIONS, fields.EMBEDDINGS):
        jsonschema.Draft202012Validator.check_schema(openapi.schema_of(table))
