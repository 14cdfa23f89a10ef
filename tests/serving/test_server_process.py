"""The command itself: how it starts, refuses to start, and stops."""

import contextlib
import json
import signal
import socket
import threading
import time

import pytest
from conftest import command
from served import KEY, Server, free_port

pytestmark = pytest.mark.slow


def serve(*flags, **more):
    return command("gptjax.serve", *flags, check=False, **more)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint=nowhere"], "nowhere"),
        ([], "checkpoint"),
        (["--host=0.0.0.0"], "api_key"),
        (["--host=::"], "api_key"),
        (["--port=70000"], "port"),
        (["--port=-1"], "port"),
        (["--slots=0"], "slots"),
        (["--queue=-1"], "queue"),
        (["--adapter=fox"], "NAME=PATH"),
        (["--adapter=fox=nowhere"], "nowhere"),
        (["--adapter==x"], "adapter"),
        (["--weights=int3"], "int3"),
        (["--wizard=1"], "wizard"),
        (["--api_key="], "api_key"),
    ],
)
def test_it_does_not_start(served, flags, message):
    """In a few lines that say what is wrong, without a traceback, with status 2."""
    if "--checkpoint=nowhere" not in flags and flags:
        flags = [f"--checkpoint={served.folder / 'base'}", f"--port={free_port()}", *flags]
    done = serve(*flags)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 6, done.stderr


def test_a_port_in_use_is_said(served):
    port = served.server.port
    done = serve(f"--checkpoint={served.folder / 'base'}", f"--port={port}")
    assert done.returncode == 2, done.stderr[-2000:]
    assert str(port) in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def own(served, tmp_path):
    """A server that a test may stop."""
    server = Server(
        f"--checkpoint={served.folder / 'base'}", "--slots=2", "--queue=2", log=tmp_path / "log"
    )
    yield server
    if server.process.poll() is None:
        server.process.kill()
        server.process.wait()


LONG = {"prompt": "The quick", "max_tokens": 600, "ignore_eos": True, "seed": 1, "stream": True}


def start_stream(server):
    """A connection on which a long text has begun to come."""
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    body = json.dumps(LONG).encode()
    raw.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    got = b""
    while b"data: " not in got:
        part = raw.recv(4096)
        assert part, got
        got += part
    return raw, got


def finish(raw, got):
    with contextlib.closing(raw):
        while part := raw.recv(65536):
            got += part
            if b"[DONE]" in got:
                break
    return got


def test_sigterm_finishes_what_runs_and_refuses_the_rest(own):
    streams = [start_stream(own) for _ in range(2)]
    own.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    with contextlib.suppress(OSError):
        status = own.request("POST", "/v1/completions", {"prompt": "A", "max_tokens": 1})[0]
        assert status == 503
    for raw, got in streams:
        whole = finish(raw, got)
        assert b'"finish_reason":"length"' in whole.replace(b": ", b":") and b"[DONE]" in whole
    assert own.process.wait(20) == 0
    assert "Traceback" not in own.log.read_text()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_stops(own, sent):
    """Also while a thread compiles a program, which a process must not end in the middle of."""
    assert own.stop(sent) == 0
    assert "Traceback" not in own.log.read_text()


def test_a_second_signal_stops_at_once(own):
    raw, _ = start_stream(own)
    own.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    own.process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    own.process.wait(20)
    raw.close()
    assert time.monotonic() - start < 3
    assert "Traceback" not in own.log.read_text()


def test_more_than_slots_and_queue_are_refused_and_none_is_lost(own):
    statuses, answers = [], []
    body = {"prompt": "The quick", "max_tokens": 60, "ignore_eos": True, "seed": 1}

    def ask():
        status, headers, content = own.request("POST", "/v1/completions", body)
        statuses.append(status)
        if status == 200:
            answers.append(json.loads(content)["choices"][0]["text"])
        else:
            assert int(headers["retry-after"]) >= 1

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(statuses) == {200, 429} and len(statuses) == 20
    assert len(set(answers)) == 1
    counted = own.request("GET", "/metrics")[2].decode()
    assert str(statuses.count(429)) in counted


def test_who_leaves_frees_the_slot(own):
    """More leave than there are slots; then a text comes at once."""
    for _ in range(6):
        raw, _ = start_stream(own)
        raw.close()
    start = time.monotonic()
    body = {"prompt": "A", "max_tokens": 2, "temperature": 0}
    while (status := own.request("POST", "/v1/completions", body)[0]) == 429:
        time.sleep(0.05)
    assert status == 200 and time.monotonic() - start < 2


def test_pages_of_other_places_may_ask(served):
    status, headers, _ = served.server.request(
        "OPTIONS",
        "/v1/completions",
        origin="http://other.example",
        access_control_request_method="POST",
        access_control_request_headers="authorization,content-type,x-stainless-os",
    )
    assert status in (200, 204), "a browser asks first, without a key"
    assert headers["access-control-allow-origin"] in ("*", "http://other.example")
    assert "post" in headers["access-control-allow-methods"].lower()
    allowed = headers["access-control-allow-headers"].lower()
    assert allowed == "*" or "x-stainless-os" in allowed
    for path, key, expected in (("/v1/models", KEY, 200), ("/v1/models", "x", 401)):
        status, headers, _ = served.server.request(
            "GET", path, origin="http://other.example", authorization=f"Bearer {key}"
        )
        assert status == expected and "access-control-allow-origin" in headers, (path, key)
