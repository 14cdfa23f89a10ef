"""A toy model behind the real server, for tests that speak to it over the network.

The model has random weights, a byte-level tokenizer and a chat template with tools, so that every
kind of request has an answer; one adapter changes it. `Server` runs `python -m gptjax.serve`.
"""

import contextlib
import dataclasses
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
from conftest import ROOT, byte_level_tokenizer, tiny_checkpoint
from helpers import adapter_config, adapters_for

from gptjax.checkpoints import peft
from gptjax.generation.language_model import LanguageModel

KEY = "secret"
# Hermes' kind: tools in the system's turn, a call as JSON between two tags.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>"
    "\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(folder):
    """Writes folder/base and folder/fox, an adapter for it; returns the model."""
    tokenizer = byte_level_tokenizer(TEMPLATE)
    made = tiny_checkpoint("llama", vocab=264, context=1024, layers=1, tokenizer=tokenizer)
    lm = LanguageModel(made.config, made.params, tokenizer)
    lm.save(folder / "base")
    settings = adapter_config("llama", rank=2, alpha=64.0)
    settings = dataclasses.replace(settings, model=made.config)
    trained = jax.tree.map(np.asarray, adapters_for(settings, made.params, scale=0.3))
    peft.write_adapter(folder / "fox", made.config, settings.lora, trained, "base")
    return lm


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """`python -m gptjax.serve` with these flags, from the moment that it answers."""

    def __init__(self, *flags, log, port=0, wait=True):
        self.port = port or free_port()
        self.log = log
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gptjax.serve", f"--port={self.port}", *map(str, flags)],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if wait:
            self.wait_until_healthy()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def request(self, method, path, body=None, *, timeout=60, **headers):
        """(status, headers in lower case, content) of a request; dicts are sent as JSON."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers.setdefault("authorization", f"Bearer {KEY}")
        if isinstance(body, dict | list):
            body = json.dumps(body)
            headers.setdefault("content-type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()

    def healthy(self):
        try:
            return self.request("GET", "/health", timeout=5)[0] == 200
        except OSError:
            return False

    def wait_until_healthy(self, seconds=120):
        end = time.monotonic() + seconds
        while not self.healthy():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, f"no answer: {self.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def stop(self, sent=signal.SIGTERM):
        """Its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(sent)
        try:
            return self.process.wait(180)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@dataclasses.dataclass
class Served:
    """What tests share: the server, and the model that it serves in this process too."""

    server: Server
    lm: LanguageModel
    folder: object


@contextlib.contextmanager
def serve_toy(folder, *flags):
    lm = write_model(folder)
    server = Server(
        f"--checkpoint={folder / 'base'}",
        f"--adapter=fox={folder / 'fox'}",
        f"--api_key={KEY}",
        "--slots=4",
        "--queue=16",
        *flags,
        log=folder / "server.log",
    )
    try:
        yield Served(server, lm, folder)
    finally:
        server.stop()
