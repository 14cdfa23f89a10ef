"""TODO docstring."""

from __future__ import annotations

from gptjax.config.schema import Config
from gptjax.core import tree
from gptjax.model import init as model_init
from gptjax.tracking.throughput import flops_per_token
from gptjax.training import step as train_step


def explain(config: Config, tokens: int) -> str:
    """Each number that follows from the config and the data, with the reason. tokens: in the training split."""
    m, t, o = config.model, config.train, config.optim
    params = model_init.count_params(m)
    per_step = t.batch_size * config.length
    flops = flops_per_token(config, params)
    cache = 2 * m.layers * m.context * m.kv * m.head_width * (4 if m.dtype == "float32" else 2)
    decay = {
        "wsd": round(o.warmup_steps + (1 - o.decay_fraction) * (t.steps - 1 - o.warmup_steps)),
        "constant": t.steps,
    }.get(o.schedule, o.warmup_steps)
    rows = [
        ("vocabulary", f"{m.vocab_size:,}", "model.vocab_size, or the tokenizer's where that is 0"),
        (
            "embedding rows",
            f"{m.padded_vocab:,}",
            f"padded to a multiple of {m.vocab_multiple} (model.vocab_multiple); the padding never gets probability",
        ),
        ("head width C", f"{m.head_width}", "model.head_dim, or width / heads"),
        ("key/value heads K", f"{m.kv}", "model.kv_heads, or heads"),
        (
            "MLP width F",
            f"{m.mlp_width:,}",
            "model.mlp_dim, or 4 x width (gelu), 8/3 x width in steps of 64 (swiglu)",
        ),
        ("parameters", f"{params:,}", "without the padding of the vocabulary"),
        (
            "training state",
            f"{tree.nbytes(train_step.state_shapes(config)[0]) / 2**20:,.1f} MiB",
            f"float32 parameters and what {o.name} keeps, over all devices",
        ),
        (
            "tokens per step",
            f"{per_step:,}",
            "train.batch_size x data.length, or model.context where that is 0",
        ),
        (
            "training tokens",
            f"{tokens:,}",
            "in the training split, filled up to whole rows where examples are packed",
        ),
        (
            "epochs",
            f"{t.steps * per_step / max(tokens, 1):.2f}",
            "train.steps x tokens per step / training tokens",
        ),
        (
            "tokens per parameter",
            f"{t.steps * per_step / params:.1f}",
            "about 20 is compute-optimal (Hoffmann et al. 2022)",
        ),
        (
            "FLOPs per token",
            f"{flops:.3g}",
            "6 x parameters that multiply + 12 x layers x heads x head width x context",
        ),
        (
            "FLOPs of the run",
            f"{flops * per_step * t.steps:.3g}",
            "FLOPs per token x tokens per step x train.steps",
        ),
        (
            "micro-batch",
            f"{t.batch_size // t.grad_accum_steps}",
            "train.batch_size / train.grad_accum_steps, sequences at once",
        ),
        (
            "decay begins at step",
            f"{decay:,}",
            f"optim.schedule = {o.schedule}",
        ),
        (
            "final learning rate",
            f"{o.lr * (1 if o.schedule == 'constant' else o.min_lr_ratio):.3g}",
            "optim.lr x optim.min_lr_ratio",
        ),
        (
            "cache per sequence",
            f"{cache / 2**20:.2f} MiB",
            "2 x layers x context x K x C in the compute dtype, when generating",
        ),
    ]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(
        f"{name:<{widths[0]}}  {value:>{widths[1]}}  {why}" for name, value, why in rows
    )
