"""What smaller weights and caches cost in loss.

    python experiments/smollm2/losses.py [--checkpoint=runs/smollm2.gguf] [--tokens=1024]

SmolLM2 reads the newest message of the embedded corpus, which it has not been tuned on.
"""

from __future__ import annotations

import itertools
import sys

import jax
import numpy as np

import gptjax
from gptjax.config.schema import Config
from gptjax.core import cli
from gptjax.data import sources
from gptjax.model import head, transformer
from gptjax.model.kv_cache import init_cache
from gptjax.runtime import executables


def loss(lm, ids: np.ndarray, *, chunk: int = 32) -> float:
    """Mean loss of ids [1, T].

    They are read in chunks through the cache, as a prompt is, so that the cache's own error counts.
    """
    cache = init_cache(lm._inference_config, 1, ids.shape[1], dtype=lm.cache_dtype)

    @executables.jit
    def step(weights, cache, piece, at):
        x, cache = transformer.apply(
            lm._inference_config, weights, piece, cache=cache, start_B=at[None]
        )
        return jax.nn.log_softmax(head.unembed(lm._inference_config, weights, x[0])), cache

    total = 0.0
    for at in range(0, ids.shape[1], chunk):
        logp, cache = step(lm._weights, cache, ids[:, at : at + chunk], np.int32(at))
        targets = ids[0, at + 1 : at + chunk + 1]
        total -= float(np.asarray(logp)[np.arange(len(targets)), targets].sum())
    return total / (ids.shape[1] - 1)


def main(argv: list[str]) -> None:
    args = cli.parse(argv, __doc__, {"checkpoint": "the .gguf file", "tokens": "how many (1024)"})
    path, count = args["checkpoint"] or "runs/smollm2.gguf", args.number("tokens", 1024)
    newest = list(sources.open_source(Config().data).documents(sources.EVAL))[-1]
    exact = None
    print(f"{'weights':<10}{'cache':<10}{'MiB':>6}{'loss':>9}{'change':>9}")
    for weights, cache in itertools.product(("float32", "bfloat16", "int8"), repeat=2):
        lm = gptjax.load(path, weights=weights, cache_dtype=cache)
        ids = np.asarray([lm.encode(newest)[:count]], np.int32)
        value = loss(lm, ids)
        exact = value if exact is None else exact
        mib = sum(leaf.nbytes for leaf in jax.tree.leaves(lm._weights)) / 2**20
        print(f"{weights:<10}{cache:<10}{mib:>6.0f}{value:>9.4f}{value - exact:>+9.4f}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
