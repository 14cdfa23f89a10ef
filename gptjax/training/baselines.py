"""Simpler models that a language model is compared with: bits per byte on the same held-out text.

`xz -9` compresses that text alone. A bigram model predicts each token from the one before it; one
has counted all training text, and one only the tokens that the GPT has read so far.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence

import numpy as np

from gptjax.config.schema import Config
from gptjax.data.loader import Windows, window_starts
from gptjax.data.shards import Prepared
from gptjax.data.sources import EVAL, TRAIN

MAX_TOKENS = 1 << 22  # tokens that a baseline counts at most: enough for a bigram model
_DISCOUNT = 0.75


def bigram_bits(segments: Sequence[np.ndarray], held_out: np.ndarray, vocab_size: int) -> float:
    """Bits that a bigram model of tokens spends on held_out[1:].

    segments: stretches of training tokens, int [n] each; pairs across two of them do not count.
    Absolute discounting of 0.75 over an add-one unigram model (Ney et al. 1994).
    """
    tokens = np.concatenate(segments)
    is_pair = np.ones(len(tokens) - 1, bool)
    is_pair[np.cumsum([len(segment) for segment in segments])[:-1] - 1] = False
    first, second = tokens[:-1][is_pair].astype(np.int64), tokens[1:][is_pair]
    unigram = (np.bincount(tokens, minlength=vocab_size) + 1.0) / (len(tokens) + vocab_size)
    pairs, counts = np.unique(first * vocab_size + second, return_counts=True)
    context_total = np.bincount(first, minlength=vocab_size)
    context_kinds = np.bincount(pairs // vocab_size, minlength=vocab_size)

    before, after = held_out[:-1].astype(np.int64), held_out[1:].astype(np.int64)
    held_out_pairs = before * vocab_size + after
    at = np.minimum(np.searchsorted(pairs, held_out_pairs), len(pairs) - 1)
    discounted = np.where(pairs[at] == held_out_pairs, counts[at] - _DISCOUNT, 0.0)
    total = np.maximum(context_total[before], 1)
    backoff = np.where(context_total[before] > 0, _DISCOUNT * context_kinds[before] / total, 1.0)
    return float(-np.log2(discounted / total + backoff * unigram[after]).sum())


def segments_read(train: Windows, *, seed: int, examples: Sequence[int]) -> list[np.ndarray]:
    """The stretches of the training split that these examples (see `window_starts`) cover.

    Overlapping windows are merged, so a pair of tokens that was read twice is there once.
    """
    starts = np.unique(window_starts(train, seed=seed, examples=examples))
    # a window reads the pairs that begin at start ... start + T - 1
    gaps = np.flatnonzero(np.diff(starts) > train.length)
    firsts = starts[np.concatenate([[0], gaps + 1])]
    lasts = starts[np.concatenate([gaps, [len(starts) - 1]])]
    return [
        train.read(int(a), int(b) + train.length + 1) for a, b in zip(firsts, lasts, strict=True)
    ]


def baselines(prepared: Prepared, config: Config, *, step: int) -> dict[str, float]:
    """{name: bits per byte} on the held-out text that the evaluation sees; empty without one.

    step: steps that the run has done. A baseline that could not count everything says so in its
    name.
    """
    t, tokenizer = config.train, prepared.tokenizer
    held_out = Windows.of(prepared, EVAL, 1, mask_documents=False)
    if held_out.total < 2:
        return {}
    limit = MAX_TOKENS
    if t.eval_batches:
        limit = t.eval_batches * t.batch_size * config.length + 1
    tokens = held_out.read(0, min(held_out.total, limit))
    text = tokenizer.decode_bytes(tokens.tolist())
    if not text:
        return {}
    result = {"xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text)}

    train = Windows.of(prepared, TRAIN, config.length, mask_documents=False)
    name = "bigram model of all training text"
    if train.total > MAX_TOKENS:
        name = f"bigram model of the first {MAX_TOKENS:,} of {train.total:,} training tokens"
    everything = [train.read(0, min(train.total, MAX_TOKENS))]
    result[name] = bigram_bits(everything, tokens, tokenizer.vocab_size) / len(text)

    windows = step * t.batch_size
    counted = min(windows, max(1, MAX_TOKENS // config.length))
    if counted:
        name = "bigram model of the tokens that the GPT has read"
        if counted < windows:
            name += f" (of {counted:,} of its {windows:,} windows)"
        examples = [i * windows // counted for i in range(counted)]
        segments = segments_read(train, seed=t.seed, examples=examples)
        result[name] = bigram_bits(segments, tokens, tokenizer.vocab_size) / len(text)
    return result
