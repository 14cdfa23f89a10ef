"""Text from a trained model: prefill, then one decode step per token, both compiled, with a key/value cache.

    python -m gptjax.generate --checkpoint=runs/quickstart --prompt="My fellow citizens" [--max_new_tokens=100]
        [--temperature=0.8] [--top_k=0] [--top_p=1.0] [--seed=0] [--rolling]

Streams to stdout. Lengths of prompts are rounded up to powers of two, so few programs are compiled; sampling parameters are data.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import checkpoint, cli, metrics, model
from gptjax.config import ModelConfig, UserError
from gptjax.tokenizer import StreamDecoder, Tokenizer

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the most likely token; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature}: must be 0 (most likely token) or more")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed = {self.seed}: must be from 0 to 4294967295")
        if not 0 <= self.top_k < 1 << 31:
            raise UserError(f"top_k = {self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must be above 0 and at most 1 (off)")


def sample(logits_V: Array, key: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """One token id. top_k keeps the k largest logits (and their equals); top_p the smallest set of the most likely tokens
    whose probability reaches p (Holtzman et al. 2020), computed after temperature and top_k."""
    scaled = logits_V / jnp.maximum(temperature, 1e-6)
    ordered = jnp.sort(scaled, descending=True)
    kth = ordered[jnp.clip(top_k, 1, ordered.size) - 1]
    scaled = jnp.where((top_k > 0) & (scaled < kth), -jnp.inf, scaled)
    order = jnp.argsort(scaled, descending=True)
    probs = jax.nn.softmax(scaled[order])
    kept = jnp.cumsum(probs) - probs < top_p
    scaled = jnp.where(jnp.zeros_like(kept).at[order].set(kept), scaled, -jnp.inf)
    return jnp.where(temperature > 0, jax.random.categorical(key, scaled), jnp.argmax(logits_V)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(config: ModelConfig, params: Any, cache: Any, tokens_T: Array, start: Array, last: Array, key: Array, options: tuple[Array, ...]):
    """Feeds tokens at slots start..., returns the cache and the token sampled after index `last` of them."""
    x, cache = model.apply(config, params, tokens_T[None], cache=cache, start_B=start[None])
    logits = model.unembed(config, params, x[0, last])
    return cache, sample(logits, jax.random.fold_in(key, start + last), *options)


def _bucket(length: int, limit: int) -> int:
    return min(max(16, 1 << (length - 1).bit_length()), limit)


def stream(
    config: ModelConfig,
    params: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    eot: int,
    vocab_size: int = 0,
    rolling: bool = False,
) -> Iterator[int]:
    """Yields new token ids, below `vocab_size` (that of the tokenizer, where the model knows more), until `eot` or `max_new_tokens`. An empty prompt is a new document.

    Raises UserError where prompt and new tokens exceed the context, unless `rolling`: then, whenever the context is full, its
    second half is read again from the start and goes on.
    """
    ids = list(prompt) or [eot]
    if len(ids) > config.context and not rolling:
        raise UserError(f"the prompt has {len(ids)} tokens and the model's context is {config.context}: shorten it, or pass --rolling")
    if len(ids) + max_new_tokens > config.context + 1 and not rolling:
        raise UserError(
            f"{len(ids)} prompt tokens and max_new_tokens = {max_new_tokens} exceed the model's context of {config.context}:\n"
            f"ask for at most {config.context + 1 - len(ids)}, or pass --rolling to let the oldest text fall out of sight"
        )
    config = dataclasses.replace(config, vocab_size=vocab_size or config.vocab_size, dropout=0.0, remat="none", attention="reference")
    key = jax.random.key(sampling.seed)
    options = (jnp.float32(sampling.temperature), jnp.int32(sampling.top_k), jnp.float32(sampling.top_p))
    made = 0
    while made < max_new_tokens:
        window = ids if len(ids) < config.context or not rolling else ids[-max(config.context // 2, 1) :]
        size = _bucket(len(window), config.context)
        cache = model.init_cache(config, 1, config.context)
        feed, at = jnp.asarray(window + [0] * (size - len(window)), jnp.int32), 0
        last = len(window) - 1
        epoch_key = jax.random.fold_in(key, made)  # a window that rolled on draws anew at the same slots
        while made < max_new_tokens:
            cache, token = _advance(config, params, cache, feed, jnp.int32(at), jnp.int32(last), epoch_key, options)
            at += last + 1
            ids.append(int(token))
            if ids[-1] == eot:
                return
            yield ids[-1]
            made += 1
            if at >= config.context:
                break
            feed, last = jnp.asarray(ids[-1:], jnp.int32), 0


def text(config: ModelConfig, params: Any, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: Sampling) -> str:
    """The continuation of `prompt`, without it."""
    return tokenizer.decode(
        stream(config, params, tokenizer.encode(prompt), max_new_tokens, sampling, eot=tokenizer.eot, vocab_size=tokenizer.vocab_size)
    )


def main(argv: list[str]) -> None:
    flags = {
        "checkpoint": "a run's workdir, or a step's folder in it",
        "prompt": "text to continue; empty = a new document",
        "max_new_tokens": "tokens to make (100, or what the context allows)",
        "temperature": "0 = most likely token (0.8)",
        "top_k": "keep the k most likely tokens; 0 = all",
        "top_p": "keep the most likely tokens up to this probability; 1 = all",
        "seed": "same seed, same text (0)",
        "rolling": "go on past the context",
    }
    args = cli.parse(argv, __doc__, flags, required=("checkpoint",))
    sampling = Sampling(args.number("temperature", 0.8), args.number("top_k", 0), args.number("top_p", 1.0), args.number("seed", 0))
    if (limit := args.number("max_new_tokens", 100)) < 1:
        raise UserError(f"--max_new_tokens={limit}: must be at least 1")
    metrics.enable_compile_cache()
    config, params, tokenizer = checkpoint.load_run(Path(args["checkpoint"]))
    ids = tokenizer.encode(args["prompt"])
    rolling = "rolling" in args
    if "max_new_tokens" not in args and not rolling:
        limit = max(min(limit, config.model.context + 1 - max(len(ids), 1)), 1)
    tokens = stream(config.model, params, ids, limit, sampling, eot=tokenizer.eot, vocab_size=tokenizer.vocab_size, rolling=rolling)
    if "json" in args:
        made = list(tokens)
        cli.result({"prompt": args["prompt"], "text": tokenizer.decode(made), "tokens": made}, args)
        return
    decoder = StreamDecoder(tokenizer)
    for i, token in enumerate(tokens):  # the first token comes after all checks: the prompt is echoed once they passed
        sys.stdout.write((args["prompt"] if i == 0 else "") + decoder.feed(token))
        sys.stdout.flush()
    print(decoder.finish())


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
