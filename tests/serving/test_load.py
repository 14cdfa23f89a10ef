"""More clients than slots, some of which go away: nobody loses or gets another's text."""

import asyncio
import sys
import threading
import time

import pytest
import uvicorn
from conftest import ROOT, byte_level_tokenizer
from helpers import CHATML, tiny_language_model

from gptjax.generation.slots import SlotEngine
from gptjax.serving import server
from gptjax.serving.app import build_app
from gptjax.serving.metrics import Metrics
from gptjax.serving.scheduler import Scheduler
from gptjax.serving.served import Served

sys.path.insert(0, str(ROOT / "experiments" / "benchmarks"))

import serve_load


@pytest.mark.slow
def test_ten_clients_a_slot_some_of_which_go_away():
    lm = tiny_language_model("llama", tokenizer=byte_level_tokenizer(CHATML), context=256)
    scheduler = Scheduler(engine := SlotEngine(lm, slots=2), Metrics(), queue=4)
    scheduler.start()
    sock = server.listen("127.0.0.1", 0)
    app = build_app(Served("toy", engine), scheduler)
    process = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=process.run, kwargs={"sockets": [sock]})
    thread.start()
    bodies = [
        {"prompt": "the quick brown fox " * (1 + i % 3), "max_tokens": 8 + 12 * (i % 3)}
        | ({"temperature": 1, "seed": i} if i % 2 else {})
        for i in range(6)
    ]
    try:
        url = server.url(sock)
        alone = [asyncio.run(serve_load.ask(url, body)).text for body in bodies]
        assert all(alone)
        seen = asyncio.run(serve_load.load(url, bodies, alone, clients=20, seconds=4, kill=0.3))
        assert seen.lost == seen.wrong == 0
        assert min(len(seen.answers), seen.refused, seen.killed) > 0
        deadline = time.monotonic() + 10
        while engine.free < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.free == 2
    finally:
        process.should_exit = True
        thread.join()
        scheduler.close()
        sock.close()
