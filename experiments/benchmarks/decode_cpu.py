"""Tokens/s of generation at GPT-2 124M on this machine's CPU.

gptjax against transformers' `generate` and CTranslate2:

    python experiments/benchmarks/decode_cpu.py [--batches=1,8] [--rounds=5] [--seconds=4]
        [--prompt=64] [--new=128] [--torch_python=python3.11]

Random weights (speed does not depend on them), greedy, exactly as many new tokens as asked. Turns
are interleaved (A B C A B C ...) and medians compared. The floor is the bytes of the weights over
the read bandwidth, measured in every turn: a step at batch 1 reads each weight once. Needs
`pip install -e '.[parity]' ctranslate2`; --torch_python is the interpreter that has PyTorch, where
this one is too new for it.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import turns
from contenders import jax_read_rate

CONTENDERS = (
    "gptjax float32",
    "gptjax bfloat16",
    "gptjax int8",
    "transformers float32",
    "transformers bfloat16",
    "ctranslate2 float32",
    "ctranslate2 int8",
)
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
WEIGHTS = (
    12 * 12 * 768**2 + 50257 * 768
)  # matrices that a step reads; the rest is a hundredth of them


def prepare(folder: Path) -> None:
    """A GPT-2 124M with random weights: a Hugging Face folder, and CTranslate2's two precisions."""
    import jax

    from gptjax.checkpoints import formats, mapping, pretrained
    from gptjax.config import build
    from gptjax.model import init as model_init

    c = build.build_config(
        {"model": dict(layers=12, width=768, heads=12, context=1024, vocab_size=50257)}
    ).model
    params = jax.tree.map(
        np.asarray, jax.jit(lambda: model_init.init_params(c, jax.random.key(0)))()
    )
    ids = {"bos_token_id": 50256, "eos_token_id": 50256}
    formats.write_checkpoint(folder / "hf", pretrained.Pretrained(c, params, None, keep=ids))
    try:
        from ctranslate2.specs import common_spec, transformer_spec
    except ImportError as error:
        print(f"no CTranslate2: {error}", file=sys.stderr)
        return
    state = {name: make() for name, _, make in mapping.from_params(c, params)}
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        12, 12, pre_norm=True, activation=common_spec.Activation.GELUTanh
    )
    d = spec.decoder
    d.scale_embeddings = False
    d.embeddings.weight = d.projection.weight = state["transformer.wte.weight"]
    d.position_encodings.encodings = state["transformer.wpe.weight"]

    def norm(target, name):
        target.gamma, target.beta = state[f"{name}.weight"], state[f"{name}.bias"]

    def linear(target, name):
        target.weight, target.bias = state[f"{name}.weight"].T.copy(), state[f"{name}.bias"]

    norm(d.layer_norm, "transformer.ln_f")
    for i, layer in enumerate(d.layer):
        h = f"transformer.h.{i}"
        norm(layer.self_attention.layer_norm, f"{h}.ln_1")
        linear(layer.self_attention.linear[0], f"{h}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"{h}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"{h}.ln_2")
        linear(layer.ffn.linear_0, f"{h}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"{h}.mlp.c_proj")
    spec.register_vocabulary([f"t{i}" for i in range(50256)] + ["</s>"])
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "</s>"
    spec.validate()
    spec.optimize()
    (folder / "ct2").mkdir()
    spec.save(str(folder / "ct2"))


def worker(folder: str, name: str, batch: int, prompt: int, new: int) -> None:
    library, dtype = name.split()
    prompts = np.random.default_rng(0).integers(0, 50000, (batch, prompt)).tolist()
    if library == "gptjax":
        import gptjax

        lm = gptjax.load(f"{folder}/hf", weights=dtype)

        def step(new: int = new) -> None:
            assert all(len(c.tokens) == new for c in lm.generate(prompts, max_new_tokens=new))
    elif library == "transformers":
        import torch
        import transformers

        net = transformers.AutoModelForCausalLM.from_pretrained(
            f"{folder}/hf", dtype=getattr(torch, dtype)
        ).eval()
        net.generation_config.eos_token_id, net.generation_config.pad_token_id = None, 0
        ids = torch.tensor(prompts)

        def step(new: int = new) -> None:
            with torch.inference_mode():
                out = net.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=new,
                    min_new_tokens=new,
                )
            assert out.shape[1] == prompt + new
    else:
        import ctranslate2

        generator = ctranslate2.Generator(
            f"{folder}/ct2", compute_type=dtype, inter_threads=1, intra_threads=2
        )
        words = [[f"t{i}" for i in row] for row in prompts]

        def step(new: int = new) -> None:
            out = generator.generate_batch(
                words,
                max_length=new,
                min_length=new,
                sampling_topk=1,
                include_prompt_in_result=False,
            )
            assert all(len(o.sequences_ids[0]) == new for o in out)

    def first() -> float:
        began = time.perf_counter()
        step(1)
        return time.perf_counter() - began

    step(1)
    turns.work(step, lambda: (jax_read_rate(512 << 20), first()))


def report(batch: int, new: int, found: dict[str, list[tuple[float, tuple[float, float]]]]) -> None:
    """tokens/s of the complete call with its prompt; a step is what each further token takes, and
    the floor is that of a step."""
    rate = statistics.median(r for rows in found.values() for _, (r, _) in rows)
    print(f"\nbatch {batch}: read bandwidth {rate / 1e9:.1f} GB/s")
    print(
        f"{'':<24}{'tokens/s':>10}{'prompt, ms':>12}{'ms/step':>9}{'floor':>8}{'of floor':>10}"
        "   gptjax at equal precision is"
    )
    times = {name: [s for s, _ in rows] for name, rows in found.items()}
    for name, seconds in times.items():
        dtype, middle = name.split()[1], statistics.median(seconds)
        first = statistics.median(f for _, (_, f) in found[name])
        step = statistics.median((s - f) / max(1, new - 1) for s, (_, f) in found[name])
        floor = WEIGHTS * BYTES[dtype] / rate
        ours = times.get(f"gptjax {dtype}")
        ratio = (
            statistics.median(t / o for t, o in zip(seconds, ours, strict=True))
            if ours
            else float("nan")
        )
        print(
            f"{name:<24}{batch * new / middle:>10.1f}{1e3 * first:>12.0f}{1e3 * step:>9.1f}"
            f"{1e3 * floor:>8.1f}{floor / step:>10.0%}{ratio:>10.2f}x",
            flush=True,
        )


def main(argv: list[str]) -> None:
    flags = dict(arg[2:].split("=", 1) for arg in argv)
    prompt, new = int(flags.get("prompt", 64)), int(flags.get("new", 128))
    wanted = flags.get("only", ",".join(CONTENDERS)).split(",")
    torch_python = flags.get("torch_python", sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for batch in map(int, flags.get("batches", "1,8").split(",")):
            python = lambda name: (
                torch_python if name.startswith("transformers") else sys.executable
            )
            commands = {
                name: [
                    python(name),
                    __file__,
                    "--worker",
                    json.dumps([folder, name, batch, prompt, new]),
                ]
                for name in wanted
            }
            report(
                batch,
                new,
                turns.measure(
                    commands, int(flags.get("rounds", 5)), float(flags.get("seconds", 4))
                ),
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*json.loads(sys.argv[2]))
    else:
        main(sys.argv[1:])
