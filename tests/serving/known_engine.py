"""An engine in place of `SlotEngine` whose texts are known, and a client of an app over it."""

import asyncio
import json
import threading

import httpx
from helpers import tiny_language_model

from gptjax.config.errors import UserError
from gptjax.generation.slots import Job, Text
from gptjax.serving.app import build_app
from gptjax.serving.metrics import Metrics
from gptjax.serving.scheduler import Scheduler
from gptjax.serving.served import Served
from gptjax.tokenizer.trained import ByteTokenizer

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


class KnownEngine:
    """Writes `script` and an end token, two tokens a turn.

    gate: turns wait until it is set. broken: the next turn raises.
    """

    length = 256

    def __init__(self, script="and so on. The end", slots=2, template=TEMPLATE, lm=None):
        self.lm = lm or tiny_language_model("llama", tokenizer=ByteTokenizer(), context=256)
        self.lm.tokenizer.chat_template = template
        self.models = {"": self.lm, "fox": self.lm}
        self.script, self.slots, self.texts = script, slots, []
        self.gate, self.broken, self.turns = threading.Event(), False, 0
        self.gate.set()
        self.entered, self.resets = [], 0
        self.likes = {}  # of a seed: the log-probability of each token

    @property
    def free(self):
        return self.slots - len(self.texts)

    def check(self, job: Job):
        self.lm._request([job.prompt], job.options)

    def enter(self, job):
        if job.prompt == list(b"unlucky"):
            raise UserError("this one cannot enter")
        text = Text(job, self.lm._request([job.prompt], job.options).sequences[0], None)
        self.texts.append(text)
        self.entered.append(job)
        return text

    def leave(self, text):
        if text in self.texts:
            self.texts.remove(text)

    def close(self):
        pass

    def reset(self):
        self.texts.clear()
        self.resets += 1

    def turn(self):
        self.gate.wait(20)
        self.turns += 1
        if self.broken:
            self.broken = False
            raise RuntimeError("the device is gone")
        changed = list(self.texts)
        ids = [*self.lm.tokenizer.encode(self.script), self.lm.tokenizer.eot]
        for text in changed:
            sequence, job = text.sequence, text.job
            if job.prompt_logprobs and not text.prompt_scores:
                text.prompt_scores = [(-1.0, [(65, -0.5)])] * (len(job.prompt) - 1)
            for _ in range(2):
                known = len(sequence.tokens)
                sequence.feed(ids[known % len(ids)], self.likes.get(job.options.seed, -0.25))
                if len(sequence.tokens) > known:
                    text.alternatives.append([(66 + i, -0.5 - i) for i in range(job.alternatives)])
                if len(sequence.tokens) >= job.options.max_new_tokens:
                    sequence.finish("length")
            if sequence.reason:
                self.leave(text)
        return changed


class Server:
    """An app over an engine; requests are made without a network."""

    def __init__(self, engine=None, *, queue=4, timeout=60.0, max_tokens=0, **settings):
        self.engine = engine or KnownEngine()
        self.scheduler = Scheduler(self.engine, Metrics(), queue=queue, timeout=timeout)
        served = Served("toy", self.engine, max_tokens=max_tokens)
        self.app = build_app(served, self.scheduler, **settings)
        self.scheduler.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if isinstance(self.engine, KnownEngine):
            self.engine.gate.set()
        self.scheduler.close(drain=False)

    def ask(self, method, path, **settings):
        async def run():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://toy") as client:
                return await client.request(method, path, **settings)

        return asyncio.run(run())

    def get(self, path, **settings):
        return self.ask("GET", path, **settings)

    def post(self, path, **body):
        return self.ask("POST", path, json=body)

    def chat(self, text="hi", **body):
        return self.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": text}], **body
        )

    def complete(self, prompt="hi", **body):
        return self.post("/v1/completions", prompt=prompt, **body)

    def stream(self, path, **body):
        """The chunks of a stream, whose frames are checked."""
        response = self.post(path, stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        frames = response.text.split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
