"""The decoding loop: prefill and decode, both compiled, over a plain pytree that is donated.

A batch is a buffer of tokens [B, S] with a length per row. Row b's next token depends on its
first length[b] tokens, its own settings and its own random key, and on nothing else in the batch.
Every token but the last of each row is in the key/value cache: a step feeds the last one, chooses
the next, and writes it behind. Slots behind a row's length hold leftovers that the causal rule
hides until they are overwritten, so there is no padding to mask. S is a bucket (256, 1024, 4096,
... up to the context), so any prompt length takes two compiled programs a bucket.

In: an `InferenceModel` and a `PromptBatch`. Out: a `DecodeState` that `advance` carries on.
Dims: B rows, S slots, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gptjax.config.schema import ModelConfig
from gptjax.core.types import Array
from gptjax.generation import meshes, sampling
from gptjax.generation.sampling import History, Settings
from gptjax.model import head, transformer
from gptjax.model.kv_cache import init_cache, take_rows
from gptjax.ops import categorical, collectives
from gptjax.ops.implementations import IMPLEMENTATIONS
from gptjax.runtime import executables, sharding

SMALLEST_BUCKET = 256


class InferenceModel(NamedTuple):
    """What the compiled functions need of a model."""

    config: ModelConfig  # `LanguageModel._inference_config`
    params: Any  # in the form of `weights.read_weights`; to compile ahead, shapes do
    cache_dtype: str = ""  # of keys and values; "" = the compute dtype
    mesh: Mesh | None = None  # of (data, tensor) that splits texts and heads; None: one device

    @property
    def groups(self) -> int:
        """Of devices, that the texts of a batch are divided between."""
        return meshes.groups(self.mesh)

    def rows(self, count: int) -> int:
        """Rows of a batch with `count` texts: the least number that the groups divide."""
        return -(-count // self.groups) * self.groups

    def put(self, tree: Any) -> Any:
        """What a batch has for each text, on the devices."""
        return jax.device_put(tree, self.shardings(tree))

    def described(self, tree: Any) -> Any:
        """Shapes of what a batch has for each text, with their shardings."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            tree,
            self.shardings(tree),
        )

    def shardings(self, tree: Any) -> Any:
        """Of what a batch has for each text; None: the default device."""
        if self.mesh is None:
            return None
        specs = sharding.decoding_specs("", tree)
        return jax.tree.map(functools.partial(NamedSharding, self.mesh), specs)

    def slots(self, length: int, extra: int = 0) -> int:
        """Slots of a buffer for `length` tokens, and for `extra` ones past the context."""
        ops = IMPLEMENTATIONS[self.config.implementation]
        return bucket(length + extra, self.config.context + 1 + extra, ops.prefill_chunk)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch of texts as they grow, on the device."""

    tokens: Array  # int32 [B, S]
    length: Array  # int32 [B]
    prompt_length: Array  # int32 [B]: without the tokens that were generated before a context shift
    limit: Array  # int32 [B]: the longest length, at most S
    generated: Array  # int32 [B]: new tokens so far, those before a context shift included
    done: Array  # bool [B]
    logprobs: Array  # float32 [B, S]: of each new token, at its slot
    seed: Array  # uint32 [B]
    copy: Array  # uint32 [B]: which of its prompt's completions a row is
    cache: Any = None  # keys and values of all tokens but the last (`init_cache`)
    passes: Any = None  # int32, with speculation: forward passes of the model so far
    draft_cache: Any = None  # with a draft model: its keys and values

    @property
    def history(self) -> History:
        return History(self.tokens, self.length, self.prompt_length)


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """What the first state of a batch is made of: P prompts, with `copies` rows of each."""

    prompts: Sequence[Sequence[int]]  # token ids
    limits: Sequence[int]  # [P]: longest length of a row, new tokens included, at most `slots`
    seeds: Sequence[int]  # [P]
    slots: int
    copies: int = 1
    generated: Sequence[int] = ()  # [P]: how many of a prompt's tokens were generated; default 0
    copy_numbers: Sequence[int] = ()  # [P * copies]: default 0, 1, ... for the rows of each prompt

    @property
    def rows(self) -> int:
        return len(self.prompts) * self.copies

    def rows_apart(self, rows: int) -> PromptBatch:
        """The same with a prompt for each row, so that devices can divide them, and with rows of
        one token that may not grow, up to so many."""
        extra = rows - self.rows
        copies = self.copy_numbers or [*range(self.copies)] * len(self.prompts)

        def repeated(values: Sequence[Any], filler: Any) -> list[Any]:
            return [v for v in values for _ in range(self.copies)] + [filler] * extra

        return dataclasses.replace(
            self,
            prompts=repeated(self.prompts, [0]),
            limits=repeated(self.limits, 1),
            seeds=repeated(self.seeds, 0),
            generated=repeated(self.generated or [0] * len(self.prompts), 0),
            copies=1,
            copy_numbers=[*copies, *[0] * extra],
        )

    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [P, slots] and lengths int32 [P] of the prompts."""
        tokens = np.zeros((len(self.prompts), self.slots), np.int32)
        for row, prompt in zip(tokens, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        return tokens, np.array([len(p) for p in self.prompts], np.int32)

    def host_state(self) -> DecodeState:
        """The state before the first new token, in host arrays and without its cache."""
        tokens, lengths = self.padded()
        lengths = lengths.repeat(self.copies, 0)
        generated = np.asarray(self.generated or [0] * len(self.prompts), np.int32)
        generated = np.repeat(generated, self.copies)
        copies = np.tile(np.arange(self.copies, dtype=np.uint32), len(self.prompts))
        if self.copy_numbers:
            copies = np.asarray(self.copy_numbers, np.uint32)
        limits = np.repeat(np.asarray(self.limits, np.int32), self.copies)
        arrays: dict[str, Any] = dict(
            tokens=tokens.repeat(self.copies, 0),
            length=lengths,
            prompt_length=lengths - generated,
            limit=limits,
            generated=generated,
            done=lengths >= limits,
            logprobs=np.zeros((len(lengths), self.slots), np.float32),
            seed=np.repeat(np.asarray(self.seeds, np.uint32), self.copies),
            copy=copies,
        )
        return DecodeState(**arrays)


def bucket(length: int, context: int, chunk: int) -> int:
    """Slots for `length` tokens: 256, 1024, 4096, ... or the context; a multiple of the chunk."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 4
    return -(-min(size, max(context, length)) // chunk) * chunk


@functools.partial(
    executables.jit, static_argnames=("config", "cache_dtype", "copies"), outputs=sharding.CACHE
)
def prefill(
    config: ModelConfig,
    params: Any,
    tokens_BS: Array,
    length_B: Array,
    *,
    cache_dtype: str = "",
    copies: int = 1,
) -> Any:
    """The cache of all tokens but the last of each row, each row `copies` times.

    It feeds a chunk of all rows at a time, so its time grows with the longest row.
    """
    batch, slots = tokens_BS.shape
    size = min(IMPLEMENTATIONS[config.implementation].prefill_chunk, slots)
    cache = init_cache(config, batch, slots, dtype=cache_dtype)
    longest = collectives.peak(length_B.max(), "data")

    def feed_chunk(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        start, cache = carry
        chunk = jax.lax.dynamic_slice_in_dim(tokens_BS, start, size, axis=1)
        start_B = jnp.full((batch,), start)
        _, cache = transformer.apply(config, params, chunk, cache=cache, start_B=start_B)
        return start + size, cache

    def unfinished(carry: tuple[Array, Any]) -> Array:
        return carry[0] < longest - 1

    _, cache = jax.lax.while_loop(unfinished, feed_chunk, (jnp.int32(0), cache))
    return cache if copies == 1 else take_rows(cache, jnp.arange(batch).repeat(copies), batch)


def start(model: InferenceModel, batch: PromptBatch) -> DecodeState:
    """The state before the first new token, on the device, with its cache."""
    tokens, lengths = batch.padded()
    cache = prefill(
        model.config,
        model.params,
        tokens,
        lengths,
        cache_dtype=model.cache_dtype,
        copies=batch.copies,
        mesh=model.mesh,
    )
    return dataclasses.replace(model.put(batch.host_state()), cache=cache)


def row_keys(seed_B: Array, copy_B: Array, generated_B: Array) -> Array:
    """A random key per row [B].

    It is a function of the row's seed, its copy and how many tokens it has, of nothing else in the
    batch.
    """

    def row_key(seed: Array, copy: Array, generated: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), copy), generated)

    return jax.vmap(row_key)(seed_B, copy_B, generated_B)


def feed(
    config: ModelConfig,
    params: Any,
    tokens_BS: Array,
    length_B: Array,
    cache: Any,
    count: int = 1,
) -> tuple[Array, Any]:
    """Feeds the tokens length - 1, ..., length + count - 2 of each row.

    Returns hidden states [B, count, D] and the cache with these tokens.
    """
    at = length_B - 1
    tokens = jnp.take_along_axis(tokens_BS, at[:, None] + jnp.arange(count)[None], axis=1)
    return transformer.apply(config, params, tokens, cache=cache, start_B=at)


def append(
    state: DecodeState, token_B: Array, logprob_B: Array | None, eos_ids: Array
) -> DecodeState:
    """The state with one more token in each row that is not done.

    logprob_B: None leaves the log-probabilities out.
    eos_ids: int32 [E], or [B, E] where rows have their own, with -1 in place of none.
    """
    growing, rows, at = ~state.done, jnp.arange(token_B.shape[0]), state.length

    def put(array: Array, value: Array) -> Array:
        return array.at[rows, at].set(jnp.where(growing, value, array[rows, at]))

    length = at + growing
    ended = (token_B[:, None] == jnp.atleast_2d(eos_ids)).any(-1)
    return dataclasses.replace(
        state,
        tokens=put(state.tokens, token_B),
        logprobs=state.logprobs if logprob_B is None else put(state.logprobs, logprob_B),
        length=length,
        generated=state.generated + growing,
        done=state.done | ended | (length >= state.limit),
    )


@functools.partial(
    executables.jit,
    static_argnames=("config", "active"),
    donate_argnames=("state",),
    outputs="state",
)
def advance(
    config: ModelConfig,
    params: Any,
    state: DecodeState,
    settings: Settings,
    steps: Array,
    *,
    active: frozenset[str],
) -> DecodeState:
    """Up to `steps` more tokens in each row; stops early when all rows are done.

    Log-probabilities are the model's own, before any processor.
    """

    def step(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        i, state = carry
        x, cache = feed(config, params, state.tokens, state.length, state.cache)
        logits = head.unembed(config, params, x[:, 0])
        processed = sampling.process(logits, settings, state.history, active)
        keys = row_keys(state.seed, state.copy, state.generated)
        token = sampling.choose(processed, settings, keys, active)
        logprob = categorical.logprob(logits, token)
        state = dataclasses.replace(state, cache=cache)
        return i + 1, append(state, token, logprob, settings["eos_ids"])

    def unfinished(carry: tuple[Array, DecodeState]) -> Array:
        return (carry[0] < steps) & collectives.anywhere(~carry[1].done.all(), "data")

    _, state = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))
    return state
