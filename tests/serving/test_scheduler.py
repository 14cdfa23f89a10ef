"""Slots and queue: who waits, who is refused, and that nobody keeps a slot for nothing."""

import asyncio
import json
import threading
import time

import pytest
from known_engine import KnownEngine, Server

from gptjax.generation.options import GenerationOptions
from gptjax.generation.slots import Job
from gptjax.serving.errors import ApiError


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def job(text=b"hi", tokens=100):
    return Job(list(text), GenerationOptions(max_new_tokens=tokens))


@pytest.fixture
def server():
    with Server() as server:
        yield server


def test_a_full_queue_refuses_and_says_when_to_ask_again(server):
    server.engine.gate.clear()
    pieces = []
    for _ in range(6):  # two slots, four that wait
        server.scheduler.submit([job()], pieces.append)
    wait_for(lambda: server.engine.free == 0)
    response = server.complete("hi")
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "queue_full"
    assert server.post("/v1/embeddings", input="hi").status_code == 429
    server.engine.gate.set()
    wait_for(lambda: sum(bool(piece.reason) for piece in pieces) == 6)
    assert server.complete("hi").status_code == 200


def test_a_cancelled_request_leaves_queue_and_slots(server):
    server.engine.script = "x" * 200
    server.engine.gate.clear()
    pieces = []
    tickets = [server.scheduler.submit([job()] * 2, pieces.append) for _ in range(3)]
    wait_for(lambda: server.engine.free == 0)
    for ticket in tickets:
        server.scheduler.cancel(ticket)
    turns = server.engine.turns
    server.engine.gate.set()
    wait_for(lambda: server.engine.free == 2 and not server.scheduler._waiting)
    assert server.engine.turns <= turns + 2
    assert not pieces  # nobody hears of it any longer


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_slot(server, stream):
    """The application itself, with a connection that ends after a moment."""
    server.engine.script = "x" * 200
    server.engine.gate.clear()
    body = json.dumps({"prompt": "hi", "max_tokens": 200, "stream": stream}).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("toy", 80),
        "asgi": {"version": "3.0"},
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def run():
        async def receive():
            if messages:
                return messages.pop(0)
            while server.engine.free == 2:
                await asyncio.sleep(0.005)
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        await asyncio.wait_for(server.app(scope, receive, send), 10)

    asyncio.run(run())
    server.engine.gate.set()
    wait_for(lambda: server.engine.free == 2)
    assert server.engine.turns <= 3


def test_a_request_that_takes_too_long_is_ended():
    with Server(timeout=0.2) as server:
        server.engine.gate.clear()
        threading.Timer(0.4, server.engine.gate.set).start()
        response = server.complete("hi", max_tokens=200)
        assert response.status_code == 408 and response.json()["error"]["code"] == "timeout"
        wait_for(lambda: server.engine.free == 2)


def test_an_error_of_the_engine_fails_its_requests_alone(server, capsys):
    server.engine.broken = True
    assert server.complete("hi").status_code == 500
    assert "the device is gone" in capsys.readouterr().err
    assert server.engine.resets == 1  # what is in its cache is not to be trusted
    assert server.engine.free == 2
    assert server.complete("hi").status_code == 200
    server.engine.broken = True
    messages = [{"role": "user", "content": "hi"}]
    chunks = server.stream("/v1/chat/completions", messages=messages)
    assert "error" in chunks[-1]
    assert server.complete("unlucky").status_code == 400
    assert server.complete("hi").status_code == 200


def test_who_waits_is_told_even_if_the_engine_cannot_begin_anew(monkeypatch):
    ended = []
    monkeypatch.setattr(threading, "excepthook", ended.append)  # of the scheduler's thread
    with Server() as server:
        monkeypatch.setattr(server.engine, "reset", lambda: 1 / 0)
        server.engine.broken = True
        assert server.complete("hi").status_code == 500
    assert [error.exc_type for error in ended] == [ZeroDivisionError]


def test_the_end_finishes_what_runs_and_refuses_the_rest(server):
    server.engine.gate.clear()
    pieces = {name: [] for name in ("running", "waiting")}
    server.scheduler.submit([job(), job()], pieces["running"].append)
    wait_for(lambda: server.engine.free == 0)
    server.scheduler.submit([job()], pieces["waiting"].append)
    closing = threading.Thread(target=server.scheduler.close)
    closing.start()
    wait_for(lambda: pieces["waiting"])
    assert pieces["waiting"][0].error.status == 503
    response = server.complete("hi")
    assert response.status_code == 503 and "retry-after" in response.headers
    assert server.get("/health").json() == {"status": "stopping"}
    server.engine.gate.set()
    closing.join(10)
    texts = ["", ""]
    for piece in pieces["running"]:
        texts[piece.index] += piece.text
    assert texts == [server.engine.script] * 2
    with pytest.raises(ApiError):
        server.scheduler.submit([job()], print)


def test_health_waits_for_the_first_program():
    engine = KnownEngine()
    engine.gate.clear()
    with Server(engine) as server:
        server.scheduler.ready = False
        assert server.get("/health").status_code == 503
        server.scheduler.ready = True
        assert server.get("/health").json() == {"status": "ok"}
