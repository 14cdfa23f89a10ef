"""A server of OpenAI's API, and a page to talk to the model in a browser.

    python -m gptjax.serve --checkpoint=runs/quickstart [--adapter=NAME=PATH] [--port=8000]
        [--host=127.0.0.1] [--api_key=KEY] [--weights=int8] [--slots=8] [--queue=64]

Open http://127.0.0.1:8000 in a browser, or give http://127.0.0.1:8000/v1 to a client as its base
URL. Ctrl-C finishes the running answers and ends.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gptjax.config.errors import UserError
from gptjax.core import cli, files
from gptjax.generation import language_model
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.options import GenerationOptions
from gptjax.generation.slots import Job, SlotEngine
from gptjax.runtime.compile_cache import enable_compile_cache
from gptjax.serving import app, server
from gptjax.serving.metrics import Metrics
from gptjax.serving.scheduler import Scheduler
from gptjax.serving.served import Served
from gptjax.tokenizer import chat_template

FLAGS = {
    "checkpoint": "a workdir, a step's folder in it, a Hugging Face folder or a .gguf file",
    "adapter": "NAME=PATH of a run or PEFT folder, served as a model of its own; again or commas",
    "name": "the checkpoint's id in /v1/models; by default the name of its file or folder",
    "host": "address to listen on (127.0.0.1: this machine alone); others need --api_key",
    "port": "port to listen on (8000); 0 = a free one",
    "api_key": "what requests must bring as a bearer token; or the variable GPTJAX_API_KEY",
    "slots": "texts that are written at once (8)",
    "queue": "texts that may wait for a slot (64); more are refused with 429",
    "length": "tokens that a text may have, prompt included; by default the model's context",
    "max_tokens": "the most new tokens that a request may ask for; by default any that fit",
    "timeout": "seconds that a request may take, its wait included (600)",
    "weights": "float32, bfloat16 or int8: smaller is faster",
    "cache_dtype": "of keys and values: float32, bfloat16 or int8; by default the compute dtype",
    "chat_template": "one of several by its name; plain = a simple one for a checkpoint without",
}


def read_adapters(text: str) -> dict[str, str]:
    """{name: path} of NAME=PATH with commas between them. Raises UserError."""
    adapters: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, _, path = part.partition("=")
        if not name or not path or name in adapters:
            raise UserError(f"--adapter={part}: give NAME=PATH, each name once")
        adapters[name] = path
    return adapters


def join_repeated(argv: list[str], flag: str) -> list[str]:
    """The arguments with all values of a flag in one, with commas between them."""
    values = [arg.partition("=")[2] for arg in argv if arg.startswith(f"--{flag}=")]
    others = [arg for arg in argv if not arg.startswith(f"--{flag}=")]
    return [*others, f"--{flag}={','.join(values)}"] if values else others


def load(args: cli.Args) -> LanguageModel:
    lm = language_model.load(
        args["checkpoint"], weights=args["weights"] or "float32", cache_dtype=args["cache_dtype"]
    )
    if args["chat_template"] == "plain":
        lm.text_tokenizer.chat_template = chat_template.plain_template(lm.text_tokenizer)
    elif args["chat_template"]:
        chat_template.choose(lm.text_tokenizer, args["chat_template"])
    return lm


def main(argv: list[str]) -> None:
    args = cli.parse(join_repeated(argv, "adapter"), __doc__, FLAGS, required=("checkpoint",))
    server.check_installed()
    adapters = read_adapters(args["adapter"])
    host, key = args["host"] or "127.0.0.1", args["api_key"] or os.environ.get("GPTJAX_API_KEY", "")
    if "api_key" in args and args["api_key"] in ("", "true"):
        raise UserError("--api_key has no value: give the key that requests must bring")
    if not server.is_local(host) and not key:
        raise UserError(f"--host={host} is reached from other machines: set --api_key=KEY as well")
    name = args["name"] or Path(args["checkpoint"]).resolve().name.removesuffix(".gguf")
    if name in adapters:
        raise UserError(f"--adapter={name}=...: the checkpoint has this name: choose another")
    limits = {k: args.number(k, d) for k, d in (("slots", 8), ("length", 0), ("max_tokens", 0))}
    queue, timeout = args.number("queue", 64), args.number("timeout", 600.0)
    if queue < 0 or timeout <= 0 or limits["max_tokens"] < 0:
        raise UserError("--queue and --max_tokens must be 0 or more, and --timeout above 0")
    metrics = Metrics()
    enable_compile_cache()
    with server.listen(host, args.number("port", 8000)) as sock:
        lm = load(args)
        engine = SlotEngine(
            lm,
            slots=limits["slots"],
            adapters=adapters,
            length=limits["length"],
            folder=files.cache_path("executables"),
        )
        served = Served(name, engine, max_tokens=limits["max_tokens"])
        scheduler = Scheduler(engine, metrics, queue=queue, timeout=timeout)
        options = GenerationOptions(max_new_tokens=1, temperature=1.0)
        prompt = [lm.text_tokenizer.eot] * 2
        scheduler.call(engine.prepare)
        scheduler.start([Job(prompt, options, alternatives=count) for count in (5, 0)])
        hosts = () if key else (*server.LOCAL_NAMES, host)
        asgi = app.build_app(served, scheduler, api_key=key, hosts=hosts)
        cli.say(f"serving {name} at {server.url(sock)}")
        server.serve(asgi, sock, scheduler)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
