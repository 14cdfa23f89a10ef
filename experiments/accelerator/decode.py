"""The part `decode`: greedy generation of gptjax beside transformers', in turns A B A B.

bfloat16 weights (random: speed does not depend on them), exactly as many new tokens as asked. A
call with one new token is taken off a call with many, so that a step is what each further token
takes, prompt and call apart. The floor of a step is what it must read, over the read bandwidth of
the device: every weight that is multiplied, and the keys and values of all rows, at the middle of
the completion.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import contenders
import numpy as np
import shapes
import turns
from pair import NO_TORCH, Contenders, torch_device
from part import Save, Settings

ROUNDS, TOY_ROUNDS = 3, 1
SHARES = {"gptjax": 0.45, "torch": 0.45}
# transformers' cache of one size, for which it compiles the step with CUDA graphs: asked for last,
# since that takes it long.
STATIC = "torch, static cache"


def measure(settings: Settings, save: Save) -> None:
    decoded = shapes.TOY_DECODED if settings.rehearse else shapes.DECODED
    pair = Contenders(__file__, SHARES)
    record: dict[str, Any] = {"rows": [], "left_out": pair.left_out}
    try:
        pair.start("gptjax", {"rehearse": settings.rehearse})
        if settings.has_torch:
            pair.start("torch", {"rehearse": settings.rehearse})
        else:
            pair.left_out["torch"] = NO_TORCH
        if "gptjax" in pair.names:
            record["read_rate"] = pair.ask("gptjax", {"read": True})
        rounds = TOY_ROUNDS if settings.rehearse else ROUNDS
        for shape in decoded:
            for rows in shape.rows:
                take_turns({n: n for n in pair.names}, order_of(shape, rows), rounds, pair, record)
                save(record)
        for shape in decoded if not settings.rehearse else ():
            order = order_of(shape, 1) | {"static": True}
            take_turns({STATIC: "torch"}, order, rounds, pair, record)
            save(record)
    finally:
        pair.close()
    save(record)


def order_of(shape: shapes.Decoded, rows: int) -> dict[str, Any]:
    random, vocab = np.random.default_rng(0), shape.model["vocab_size"]
    return {
        "shape": shape.name,
        "model": shape.model,
        "raw": contenders.torch_config(shape.model),
        "prompts": random.integers(0, vocab, (rows, shape.prompt)).tolist(),
        "new": shape.new,
        "bytes": step_bytes(shape, rows),
    }


def step_bytes(shape: shapes.Decoded, rows: int) -> int:
    """What a step must read, in bfloat16."""
    from gptjax.config import build
    from gptjax.model.init import count_params

    model = build.build_config({"model": shape.model}).model
    lookups = model.context * model.width if model.positions == "learned" else 0
    lookups += 0 if model.tie_embeddings else model.vocab_size * model.width
    keys_and_values = 2 * model.layers * model.kv * model.head_width
    length = shape.prompt + shape.new // 2
    return 2 * (count_params(model) - lookups + rows * length * keys_and_values)


def take_turns(
    names: dict[str, str],
    order: dict[str, Any],
    rounds: int,
    pair: Contenders,
    record: dict[str, Any],
) -> None:
    """Adds rows to the record. names: {contender in the row: process}."""
    times: dict[str, list[tuple[float, float]]] = {}
    for round_number in range(rounds + 1):
        for name, process in names.items():
            if process not in pair.names or not (answer := pair.ask(process, {"order": order})):
                continue
            if round_number:  # the first round compiles and warms up
                times.setdefault(name, []).append(tuple(answer))
    new, rows = order["new"], len(order["prompts"])
    for name, pairs in times.items():
        whole = statistics.median(long for long, _ in pairs)
        step = statistics.median((long - short) / (new - 1) for long, short in pairs)
        row = {
            "shape": order["shape"],
            "batch": rows,
            "contender": name,
            "tokens_per_second": rows * new / whole,
            "step_ms": 1e3 * step,
            "prompt_ms": 1e3 * statistics.median(short for _, short in pairs),
            "floor_bytes": order["bytes"],
            "seconds": pairs,
        }
        if rate := record.get("read_rate"):
            row["share_of_bandwidth"] = order["bytes"] / rate / step
        record["rows"].append(row)


def pair_of_calls(generate: Callable[[int], None], new: int) -> tuple[float, float]:
    """Seconds of a call for so many new tokens, and for one."""
    seconds = []
    for count in (new, 1):
        began = time.perf_counter()
        generate(count)
        seconds.append(time.perf_counter() - began)
    return seconds[0], seconds[1]


def gptjax_worker(given: dict[str, Any]) -> None:
    import jax

    from gptjax.config import build
    from gptjax.generation.language_model import LanguageModel
    from gptjax.model.init import init_params

    if not given["rehearse"] and jax.devices()[0].platform == "cpu":
        raise SystemExit("JAX sees no accelerator")
    models: dict[str, LanguageModel] = {}

    def answer(request: dict[str, Any]) -> Any:
        if "read" in request:
            size = shapes.TOY_CEILINGS if given["rehearse"] else shapes.CEILINGS
            return contenders.jax_read_rate(size["read"])
        order = request["order"]
        if order["shape"] not in models:
            models.clear()  # the shape before is done
            config = build.build_config({"model": order["model"]}).model
            drawn = jax.jit(lambda: init_params(config, jax.random.key(0)))()
            params = jax.tree.map(np.asarray, drawn)
            models[order["shape"]] = LanguageModel(config, params, None, weights="bfloat16")
        lm = models[order["shape"]]

        def generate(count: int) -> None:
            completions = lm.generate(order["prompts"], max_new_tokens=count)
            assert all(len(c.tokens) == count for c in completions)

        return pair_of_calls(generate, order["new"])

    turns.serve(answer)


def torch_worker(given: dict[str, Any]) -> None:
    import torch
    import transformers

    device = torch_device(given)
    models: dict[str, Any] = {}

    def answer(request: dict[str, Any]) -> Any:
        order = request["order"]
        if order["shape"] not in models:
            models.clear()
            config = transformers.AutoConfig.for_model(**order["raw"])
            with torch.device(device):
                net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            net.generation_config.eos_token_id, net.generation_config.pad_token_id = None, 0
            models[order["shape"]] = net.eval()
        net = models[order["shape"]]
        ids = torch.tensor(order["prompts"], device=device)
        cache = {"cache_implementation": "static"} if order.get("static") else {}

        def generate(count: int) -> None:
            with torch.inference_mode():
                out = net.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=count,
                    min_new_tokens=count,
                    **cache,
                )
                assert out.cpu().shape[1] == ids.shape[1] + count  # waits for the device

        return pair_of_calls(generate, order["new"])

    turns.serve(answer)


if __name__ == "__main__":
    its_order = json.loads(sys.argv[2])
    {"gptjax": gptjax_worker, "torch": torch_worker}[its_order["contender"]](its_order)
