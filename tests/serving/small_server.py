"""A server of the same API without a model: its answers are known and as slow as a test wants.

A message with "slow" in it is answered for 20 s, one with "late" begins after 3 s, in which the
server says that it starts; a schema whose type is "nonsense" is refused, and so is temperature 2,
with 429; the model "base" has no chat template; with a key, requests without it are answered 401.
"""

import asyncio
import json
import math
import threading
import time
from contextlib import contextmanager

ANSWER = "The capital of France is Paris. It lies on the river Seine, and has <b>bridges</b>."


def error(status, message, param=None, wait=None):
    from starlette.responses import JSONResponse

    fault = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    headers = {"Retry-After": wait} if wait else {}
    return JSONResponse({"error": fault}, status_code=status, headers=headers)


def words_of(asked):
    """The answer's tokens: it repeats how many messages it was sent, so that tests can see it."""
    if isinstance(asked, str):
        return [" and", " so", " on", " 5", " ", "bytes:\\xe2\\x82", "bytes:\\xac", "."]
    if "slow" in asked[-1]["content"]:
        return [" slow"] * 400
    first_word, *others = ANSWER.split()
    words = [first_word, *(f" {word}" for word in others)]
    first = asked[0]["content"] if asked[0]["role"] == "system" else "none"
    return [*words, f"\n({len(asked)} messages, system: {first})"]


def chunk_of(is_chat, i, word):
    probability = max(0.96 / (1 + i % 7), 0.01)
    others = [(word, probability), (" other", 0.03), (" else", 0.005), ("\n", 0.002), (".", 0.001)]
    if not is_chat:
        logprobs = {
            "tokens": [word],
            "token_logprobs": [math.log(probability)],
            "top_logprobs": [{text: math.log(p) for text, p in others}],
            "text_offset": [0],
        }
        text = {"bytes:\\xe2\\x82": "", "bytes:\\xac": "€"}.get(word, word)
        return {"text": text, "logprobs": logprobs, "finish_reason": None}
    rows = [
        {"token": text, "logprob": math.log(p), "bytes": list(text.encode())} for text, p in others
    ]
    logprobs = {"content": [{**rows[0], "top_logprobs": rows}]}
    return {"delta": {"content": word}, "logprobs": logprobs, "finish_reason": None}


def make_app(requests, key=""):
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    from gptjax.serving.page_files import page_routes

    status = {"status": "ok"}

    def is_refused(request):
        return bool(key) and request.headers.get("authorization") != f"Bearer {key}"

    async def models(request):
        if is_refused(request):
            return error(401, "this server wants a key")
        rows = [
            {"id": "toy", "chat": True},
            {"id": "base", "chat": False},
            {"id": "poet", "parent": "toy", "chat": True},
        ]
        return JSONResponse({"object": "list", "data": [{"object": "model", **r} for r in rows]})

    async def answer(request):
        if is_refused(request):
            return error(401, "this server wants a key")
        body = await request.json()
        requests.append(body)
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {})
        if schema.get("type") == "nonsense":
            return error(400, 'type is none of JSON schema\'s: "nonsense"', "response_format")
        if body.get("temperature", 0) == 2:
            return error(429, "the queue is full.", wait="7")
        is_chat = "messages" in body
        asked = body["messages"] if is_chat else body["prompt"]
        words = ['{"city": ', '"Paris"}'] if schema else words_of(asked)

        async def events():
            opening = {"delta": {"role": "assistant", "content": ""}, "text": "", "logprobs": None}
            yield f"data: {json.dumps({'choices': [opening]})}\n\n"
            if is_chat and "late" in asked[-1]["content"]:
                status["status"] = "starting"
                await asyncio.sleep(3)
                status["status"] = "ok"
            for i, word in enumerate(words):
                yield f"data: {json.dumps({'choices': [chunk_of(is_chat, i, word)]})}\n\n"
                await asyncio.sleep(0.05 if len(words) > 100 else 0.002)
            last = {"delta": {}, "text": "", "finish_reason": "stop"}
            yield f"data: {json.dumps({'choices': [last]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(
        routes=[
            *page_routes(),
            Route("/v1/models", models),
            Route("/v1/chat/completions", answer, methods=["POST"]),
            Route("/v1/completions", answer, methods=["POST"]),
            Route("/health", lambda request: JSONResponse(status)),
        ]
    )


class Server:
    """An app on a free port of the loopback; `stop` and `start` keep the port."""

    def __init__(self, app):
        self.app, self.port = app, 0
        self.start()

    def start(self):
        import uvicorn

        config = uvicorn.Config(
            self.app, port=self.port, log_level="critical", ws="none", timeout_graceful_shutdown=1
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 20
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)


@contextmanager
def serving(key=""):
    requests = []
    server = Server(make_app(requests, key))
    server.requests = requests
    try:
        yield server
    finally:
        server.stop()
