"""The parts `gpt2` and `llama`: a training step of gptjax beside PyTorch's, in turns A B A B.

Both hold the device's memory at the same time, each in a process of its own, so that the turns are
seconds apart. Each gets ready (compiles, warms up) while the other is idle. A turn is some steps
that are asked for at once and waited for once, as in a training loop.

Memory: JAX counts what its programs and arrays hold at the peak; PyTorch what its tensors do, from
after the warm-up on. The planner's number is of the same plan that is trained.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from typing import Any

import contenders
import shapes
import turns
from pair import NO_TORCH, Contenders, torch_device
from part import Save, Settings, what_went_wrong

# In the text of a compiled program.
FUSED_ATTENTION = re.compile(r'custom_call_target="([^"]*(?:fmha|attention)[^"]*)"')
ROUNDS, TURN_SECONDS = 5, 2.0
TOY_ROUNDS, TOY_TURN_SECONDS = 2, 0.05
# The share of the device's memory that each may take: one that wants more fails alone.
SHARES = {"gptjax": 0.45, "torch": 0.5}


def measure(name: str, settings: Settings, save: Save) -> None:
    rehearse = settings.rehearse
    shape = (shapes.TOY_TRAINED if rehearse else shapes.TRAINED)[name]
    pair = Contenders(__file__, SHARES)
    record: dict[str, Any] = {
        "shape": shape.name,
        "sections": shape.sections,
        "contenders": {},
        "left_out": pair.left_out,
    }
    orders: dict[str, dict[str, Any]] = {"gptjax": {"sections": shape.sections}}
    if settings.has_torch:
        raw = contenders.torch_config(shape.model, padded=True)
        orders["torch"] = {"raw": raw, "sections": shape.sections}
    else:
        pair.left_out["torch"] = NO_TORCH

    def turn(contender: str, count: int) -> None:
        if answer := pair.ask(contender, {"steps": count}):
            entry = record["contenders"][contender]
            entry["seconds"].append(answer.pop("seconds"))
            entry |= answer

    counts: dict[str, int] = {}
    try:
        for contender, order in orders.items():
            pair.start(contender, order | {"rehearse": rehearse})
            if contender in pair.names and (about := pair.ask(contender, {"about": True})):
                entry = record["contenders"][contender] = {"seconds": [], **about}
                turn(contender, 1)
                seconds = TOY_TURN_SECONDS if rehearse else TURN_SECONDS
                counts[contender] = max(1, round(seconds / entry["seconds"][-1]))
                entry["seconds"].clear()
                turn(contender, counts[contender])  # all that is known if the other takes too long
                save(summary(record))
        for entry in record["contenders"].values():
            entry["seconds"].clear()
        for _ in range(TOY_ROUNDS if rehearse else ROUNDS):
            for contender in pair.names:
                turn(contender, counts[contender])
            save(summary(record))
    finally:
        pair.close()
    save(summary(record))


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """With medians, and what follows from them."""
    contender_entries = record["contenders"]
    ours = contender_entries.get("gptjax", {})
    for entry in contender_entries.values():
        if not entry["seconds"]:
            continue
        middle = statistics.median(entry["seconds"])
        entry["ms"] = 1e3 * middle
        tokens = record["sections"]["train"]["batch_size"] * record["sections"]["model"]["context"]
        entry["tokens_per_second"] = tokens / middle
        if ours:
            entry["model_flops_rate"] = ours["flops_per_token"] * tokens / middle
            if ours["data_sheet_flops"]:
                entry["mfu"] = entry["model_flops_rate"] / ours["data_sheet_flops"]
    theirs = contender_entries.get("torch", {})
    if ours.get("seconds") and len(ours["seconds"]) == len(theirs.get("seconds", ())):
        ratios = [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
        record["times_torch"] = statistics.median(ratios)
    return record


def gptjax_worker(order: dict[str, Any]) -> None:
    import jax

    from gptjax.model.init import count_params
    from gptjax.runtime.devices import peak_flops
    from gptjax.runtime.memory import keep_freed_memory

    keep_freed_memory()
    trainer = contenders.GptjaxTrainer(order["sections"])
    if not order["rehearse"] and trainer.device.platform == "cpu":
        raise SystemExit("JAX sees no accelerator")
    program = trainer.compiled.memory_analysis()
    text = trainer.compiled.as_text()
    trainer.step()
    first_loss = trainer.loss()
    turns.timed(trainer.step, 2, trainer.wait)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if "about" in request:
            return {
                "parameters": count_params(trainer.plan.model),
                "flops_per_token": trainer.plan.flops_per_token,
                "data_sheet_flops": peak_flops(trainer.device),
                "compile_seconds": trainer.compile_seconds,
                "attention_kernels": sorted(set(FUSED_ATTENTION.findall(text))),
                "compiler_bytes": compiler_bytes(program),
                "planner_bytes": planner_bytes(trainer.plan),
                "first_loss": first_loss,
            }
        seconds = turns.timed(trainer.step, request["steps"], trainer.wait)
        stats = jax.local_devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use")
        return {"seconds": seconds, "loss": trainer.loss(), "peak_bytes": peak}

    turns.serve(answer)


def compiler_bytes(program: Any) -> int:
    """What the compiled step holds at once: arguments, results that are not in their place, and
    temporaries."""
    return (
        program.argument_size_in_bytes
        + program.output_size_in_bytes
        - program.alias_size_in_bytes
        + program.temp_size_in_bytes
    )


def planner_bytes(plan: Any) -> float:
    """What the planner expects, from shapes alone."""
    from gptjax.training.memory import Shapes, Work, estimate

    arrays = Shapes.of(plan.state_shapes, plan.frozen_shapes)
    sizes, remat = dict(plan.mesh.shape), plan.model.remat
    work = Work.of(plan.config, sizes, plan.micro_batches, remat, plan.platform)
    return estimate(arrays, work).total


def torch_worker(order: dict[str, Any]) -> None:
    import torch

    device = torch_device(order)
    model, train = order["sections"]["model"], order["sections"]["train"]
    trainer = contenders.TorchTrainer(
        order["raw"],
        contenders.random_rows(model["vocab_size"], train["batch_size"], model["context"]),
        device=device,
        dtype="bfloat16",
        # the rehearsal traces as the real run does, and generates no code
        backend="eager" if order["rehearse"] else "inductor",
        micro_batches=train["grad_accum_steps"],
        attention="sdpa_causal",
    )
    trainer.step()
    first_loss = trainer.loss()
    turns.timed(trainer.step, 2, trainer.wait)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if "about" in request:
            parameters = sum(p.numel() for p in trainer.net.parameters())
            kernels = attention_kernels(trainer) if device == "cuda" else []
            return {
                "parameters": parameters,
                "attention_kernels": kernels,
                "first_loss": first_loss,
            }
        seconds = turns.timed(trainer.step, request["steps"], trainer.wait)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        return {"seconds": seconds, "loss": trainer.loss(), "peak_bytes": peak}

    turns.serve(answer)


def attention_kernels(trainer: contenders.TorchTrainer) -> list[str]:
    """Names of the kernels of a step that compute attention, as PyTorch's profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            trainer.step()
            trainer.wait()
    except RuntimeError as error:  # no rights to trace: the timings do not depend on it
        return [what_went_wrong(error)]
    names = {event.key.split("<")[0] for event in profiler.key_averages()}
    marks = ("flash", "fmha", "attention", "cudnn_generated")
    return sorted(name[:100] for name in names if any(mark in name.lower() for mark in marks))


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    {"gptjax": gptjax_worker, "torch": torch_worker}[given["contender"]](given)
