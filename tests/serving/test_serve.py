"""The command: what it refuses, and a process from its start to a signal."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import httpx
import pytest
from conftest import ROOT, byte_level_tokenizer
from helpers import CHATML, tiny_language_model

from gptjax import serve
from gptjax.config.errors import UserError
from gptjax.generation.slots import SlotEngine
from gptjax.serving import server
from gptjax.serving.app import build_app
from gptjax.serving.metrics import Metrics
from gptjax.serving.scheduler import Scheduler
from gptjax.serving.served import Served


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "missing --checkpoint"),
        (["--checkpoint=x", "--prt=1"], "did you mean '--port'"),
        (["--checkpoint=x", "--port=high"], "must be int"),
        (["--checkpoint=x", "--port=99999"], "from 0 .a free one. to 65535"),
        (["--checkpoint=x", "--host=0.0.0.0"], "set --api_key=KEY as well"),
        (["--checkpoint=x", "--adapter=fox"], "give NAME=PATH"),
        (["--checkpoint=x", "--adapter=a=b,a=c"], "each name once"),
        (["--checkpoint=runs/x", "--adapter=x=b"], "the checkpoint has this name"),
        (["--checkpoint=x", "--timeout=0"], "--timeout above 0"),
        (["--checkpoint=/nowhere", "--port=0"], "/nowhere"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(UserError, match=message.replace("[", "\\[")):
        serve.main(flags)


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else 1)
    with pytest.raises(UserError, match=r"needs uvicorn: pip install 'gptjax\[serve\]'"):
        serve.main(["--checkpoint=x"])


def test_flags_of_adapters():
    argv = serve.join_repeated(["--adapter=a=b", "--port=1", "--adapter=c=d,e=f"], "adapter")
    assert argv == ["--port=1", "--adapter=a=b,c=d,e=f"]
    assert serve.read_adapters("a=b,c=d=e") == {"a": "b", "c": "d=e"}


def test_addresses():
    for host, local in (("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("::", False)):
        assert server.is_local(host) == local
    assert server.is_local("localhost") and not server.is_local("example.org")
    with server.listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert server.url(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match="choose another"):
            server.listen("127.0.0.1", port)


@pytest.mark.slow
def test_an_answer_is_what_the_model_says_alone():
    tokenizer = byte_level_tokenizer(CHATML)
    lm = tiny_language_model("llama", tokenizer=tokenizer, context=128)
    scheduler = Scheduler(engine := SlotEngine(lm, slots=2), Metrics())
    app = build_app(Served("toy", engine), scheduler)
    scheduler.start()

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://toy") as client:
            settings = dict(temperature=1, seed=3, max_tokens=9)
            bodies = [dict(prompt=text, **settings) for text in ("the quick", "in the", "x")]
            asked = [client.post("/v1/completions", json=body) for body in bodies]
            return [done.json()["choices"][0]["text"] for done in await asyncio.gather(*asked)]

    texts = asyncio.run(ask())
    scheduler.close()
    for prompt, text in zip(("the quick", "in the", "x"), texts, strict=True):
        alone = lm.generate(prompt, temperature=1.0, seed=3, max_new_tokens=9)
        assert text == alone.text


@pytest.mark.slow
def test_a_process_serves_until_a_signal(tmp_path):
    lm = tiny_language_model("llama", tokenizer=byte_level_tokenizer(CHATML), context=128)
    lm.save(tmp_path / "toy")
    process = subprocess.Popen(
        [sys.executable, "-m", "gptjax.serve", f"--checkpoint={tmp_path / 'toy'}", "--port=0"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stderr.readline()
        assert line.startswith("serving toy at http://127.0.0.1:"), line
        url = line.split()[-1]
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3})
        request = urllib.request.Request(
            f"{url}/v1/chat/completions",
            body.encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
        assert answer["usage"]["completion_tokens"] <= 3
        with urllib.request.urlopen(url, timeout=20) as response:
            assert b"<!doctype html>" in response.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr.read() == ("SIGTERM: finishing what runs; once more to end at once\n")
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url, timeout=5)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
