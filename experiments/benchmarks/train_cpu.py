"""Training-step tokens/s of gptjax against PyTorch's GPT-2 (transformers), on this machine's CPU.

    python experiments/benchmarks/train_cpu.py [--shapes=shakespeare_char,10m,124m] [--rounds=7]
        [--seconds=3] [--torch_python=python3.11]
        [--only="gptjax float32,gptjax bfloat16,torch eager float32,torch compile float32"]

Every contender is a process of its own that waits for its turn; turns are interleaved
(A B C A B C ...), so that all see the same noise, and medians are compared. Same batch, no dropout,
AdamW, gradients clipped at 1.0. Needs `pip install -e '.[parity]'`; --torch_python is the
interpreter that has it, where this one is too new for that PyTorch.
"""

from __future__ import annotations

import itertools
import statistics
import sys

import contenders
import turns

# layers, width, heads, batch, context, vocabulary
SHAPES = {
    "shakespeare_char": (4, 128, 4, 12, 64, 65),
    "10m": (6, 384, 6, 8, 256, 4096),
    "124m": (12, 768, 12, 2, 512, 50257),
}
OURS = ("gptjax float32", "gptjax bfloat16")
TORCH_FLOAT32 = ("torch eager float32", "torch compile float32")
TORCH_BFLOAT16 = ("torch eager bfloat16", "torch compile bfloat16")
CONTENDERS = OURS + TORCH_FLOAT32 + TORCH_BFLOAT16


def trainer(shape: str, name: str) -> contenders.GptjaxTrainer | contenders.TorchTrainer:
    """name: gptjax and a dtype, or torch, a mode and a dtype."""
    layers, width, heads, batch, context, vocab = SHAPES[shape]
    model = dict(layers=layers, width=width, heads=heads, context=context, vocab_size=vocab)
    library, *mode, dtype = name.split()
    if library == "gptjax":
        from gptjax.runtime.memory import keep_freed_memory

        keep_freed_memory()
        return contenders.GptjaxTrainer(
            {"model": model | dict(dtype=dtype), "train": dict(batch_size=batch)}
        )
    return contenders.TorchTrainer(
        contenders.torch_config(model),
        contenders.random_rows(vocab, batch, context),
        dtype=dtype,
        backend="inductor" if mode == ["compile"] else "",
    )


def worker(shape: str, name: str) -> None:
    _, width, _, batch, context, _ = SHAPES[shape]
    contender = trainer(shape, name)
    rate = lambda: contender.matrix_rate(batch * context, width, 4 * width)
    turns.work(contender.step, rate, wait=contender.wait)


def measure(
    shape: str, rounds: int, seconds: float, torch_python: str, wanted: list[str]
) -> dict[str, tuple[list[float], float]]:
    """{contender: (seconds a step, one per round; median matrix rate)}."""
    commands = {
        name: [sys.executable if name in OURS else torch_python, __file__, "--worker", shape, name]
        for name in wanted
    }
    found = turns.measure(commands, rounds, seconds)
    return {
        name: ([s for s, _ in rows], statistics.median(r for _, r in rows))
        for name, rows in found.items()
    }


def model_flops(shape: str) -> float:
    """Products of matrices in one step: 6 per weight and token, and the attention's (full T x T, as
    transformers computes it)."""
    layers, width, _, batch, context, vocab = SHAPES[shape]
    weights = layers * 12 * width * width + vocab * width
    return batch * context * (6 * weights + 12 * layers * width * context)


def report(shape: str, found: dict[str, tuple[list[float], float]]) -> None:
    _, _, _, batch, context, _ = SHAPES[shape]
    print(f"\n{shape}: {batch} x {context} tokens a step, {model_flops(shape) / 1e9:.1f} GFLOP")
    running = [name for name in OURS if name in found]
    ours = found[running[0]][0]
    print(
        f"{'':<24}{'ms/step':>10}{'tokens/s':>11}{'GFLOP/s':>9}{'own matmul':>12}{'share':>7}"
        f"{running[0] + ' is':>20}"
    )
    for name, (times, rate) in found.items():
        middle = statistics.median(times)
        speed = model_flops(shape) / middle
        ratio = statistics.median(t / o for t, o in zip(times, ours, strict=True))
        print(
            f"{name:<24}{1e3 * middle:>10.1f}{batch * context / middle:>11,.0f}"
            f"{speed / 1e9:>9.0f}{rate / 1e9:>12.0f}{speed / rate:>7.0%}{ratio:>19.2f}x"
        )
    for name, (label, names) in itertools.product(
        running, (("float32", TORCH_FLOAT32), ("bfloat16", TORCH_BFLOAT16))
    ):
        if rows := [found[n][0] for n in names if n in found]:
            best = [min(turn) for turn in zip(*rows, strict=True)]
            ratios = [b / o for b, o in zip(best, found[name][0], strict=True)]
            better = f"{statistics.median(ratios):.2f}x the better of PyTorch {label}"
            print(f"{name} is {better}, turn by turn")


def main(argv: list[str]) -> None:
    flags = dict(arg[2:].split("=", 1) for arg in argv)
    torch_python, wanted = (
        flags.get("torch_python", sys.executable),
        flags.get("only", ",".join(CONTENDERS)).split(","),
    )
    for shape in flags.get("shapes", ",".join(SHAPES)).split(","):
        report(
            shape,
            measure(
                shape,
                int(flags.get("rounds", 7)),
                float(flags.get("seconds", 3)),
                torch_python,
                wanted,
            ),
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main(sys.argv[1:])
