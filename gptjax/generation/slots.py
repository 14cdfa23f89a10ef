"""Continuous batching: texts join and leave while others are being written.

A `SlotEngine` has a fixed number of slots, each a row of one key/value cache. `enter` gives a job a
slot, and each `turn` feeds a chunk of a prompt that waits and makes a few tokens of the texts that
one program has rows for. One thread drives it; `check` may be called from any.

    engine = SlotEngine(lm, slots=8, adapters={"fox": "runs/adapter"})
    text = engine.enter(Job(lm.encode("The quick"), GenerationOptions(max_new_tokens=6)))
    while not text.sequence.reason:
        engine.turn()

What a text gets depends on its job alone, bit for bit: a prompt is fed by the chunks that it has
alone, wherever its beginning is in the cache already; programs for few and for many rows sum in the
same order (`ops.products`); and what other texts ask of the choice of tokens is an exact identity.
But with jax before 0.12, log-probabilities of GPT-2 were seen to differ by a rounding.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.config.errors import UserError, unknown_name
from gptjax.generation import sampling, slot_programs, slot_rows
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.options import GenerationOptions, refuse_options
from gptjax.generation.requests import SequenceState
from gptjax.generation.slot_programs import ALTERNATIVES, Alternatives, Scored
from gptjax.generation.slot_rows import Row
from gptjax.model.kv_cache import init_cache
from gptjax.ops.attention.cache import BLOCK
from gptjax.ops.implementations import IMPLEMENTATIONS
from gptjax.runtime import executables

_TURN_STEPS = 4  # tokens of each text in a turn
_FORCED = 8  # tokens that a grammar forces take a pass of their own from so many on
_IDLE_CHUNKS = 4  # of prompts in a turn in which no text grows


@dataclasses.dataclass(frozen=True)
class Job:
    """One text that is wanted."""

    prompt: list[int]  # ids, already encoded
    options: GenerationOptions  # n = 1; beams, speculation and context shift are refused
    adapter: str = ""  # name of one of the engine's adapters
    alternatives: int = 0  # most likely tokens given with each new one, at most `ALTERNATIVES`
    prompt_logprobs: bool = False  # scores of the prompt's tokens too, with as many alternatives


@dataclasses.dataclass(eq=False)
class Text:
    """A job that has a slot, as it grows."""

    job: Job
    sequence: SequenceState
    row: Row  # what the programs are told about it
    alternatives: list[Alternatives] = dataclasses.field(default_factory=list)  # of each new token
    # of each prompt token but the first, where asked for: its log-probability, and alternatives
    prompt_scores: list[tuple[float, Alternatives]] = dataclasses.field(default_factory=list)
    slot: int = -1
    fed: int = 0  # tokens of the prompt that are in the cache

    @property
    def scores_prompt(self) -> bool:
        return self.job.prompt_logprobs or self.job.options.prompt_logprobs

    @property
    def begins(self) -> bool:
        return not self.sequence.tokens

    @property
    def waits(self) -> bool:
        """For some of its prompt to be fed; the last token is fed by the first step."""
        return self.fed < self.row.prompt_length - 1


@dataclasses.dataclass
class _Slot:
    text: Text | None = None
    # tokens whose keys and values stay in the cache as prefill makes them, and for which adapter
    prefix: list[int] = dataclasses.field(default_factory=list)
    adapter: int = 0
    freed: int = 0  # the turn in which it was


class SlotEngine:
    """Slots over one model.

    adapters: {name: workdir or PEFT folder}: LoRA on the model's layers; those that replace weights
        of the model, DoRA and learned prompts are refused.
    length: tokens that a text may have, prompt included; 0: the model's context, or as much of it
        as keys and values of all slots in 2 GiB allow.
    folder: where compiled programs are kept for other processes (`executables.prepare`).

    Raises UserError.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        slots: int = 8,
        adapters: Mapping[str, str | Path] = {},
        length: int = 0,
        folder: str | Path | None = None,
    ):
        if slots < 1:
            raise UserError(f"slots = {slots}: at least 1")
        if lm.mesh is not None:
            raise UserError("slots are on one device: load the model without a mesh")
        lm._require_text_model()
        model = lm._model
        self.lm, self.config, self.params = lm, model.config, model.params
        ops = IMPLEMENTATIONS[model.config.implementation]
        self.chunk, whole = ops.prefill_chunk, math.lcm(ops.prefill_chunk, BLOCK)
        self.length = slot_rows.text_length(model, slots, length, whole)
        self.models = {"": lm}  # the model of each adapter; "": the base
        for name, path in adapters.items():
            self.models[name] = lm.with_adapter(path)
        self.adapters = slot_rows.stack_adapters(self.models)
        # whole chunks: XLA would move one that sticks out back over what is there
        self.cache_slots = -(-self.length // whole) * whole
        self.slots = slots
        self.reset()
        most = min(slots, ops.decode_rows)  # rows of a program of decoding
        self._sizes = [n for n in (1, 8, 16, 32, 64, 128) if n < most] + [most]
        self._folder = folder
        self._programs: dict[Any, Any] = {}  # names of executables, by what they are for
        self._making: threading.Thread | None = None  # a program
        self._turn = 0
        self._fed_last = -1  # the slot whose prompt was fed last
        self._grown_last = -1  # the window of slots whose texts grew last in their turn
        self._began = False  # whether texts that begin came before others in the last turn

    def reset(self) -> None:
        """Frees all slots and begins with an empty cache, as after an error in a turn."""
        self._slots = [_Slot() for _ in range(self.slots)]
        dtype = self.lm._model.cache_dtype
        self._cache: Any = init_cache(self.config, self.slots, self.cache_slots, dtype=dtype)

    def close(self) -> None:
        """Waits for the program that is being made: XLA would compile on while the process takes
        itself apart, and crash it."""
        if self._making:
            self._making.join()

    def prepare(self) -> None:
        """Makes the program that copies rows, for which the first texts that share would wait."""
        self._copy(0, 0, 0)

    @property
    def free(self) -> int:
        """Slots without a text."""
        return sum(slot.text is None for slot in self._slots)

    def check(self, job: Job) -> None:
        """Raises UserError for a job that cannot run."""
        self._text(job)

    def _text(self, job: Job) -> Text:
        if job.adapter not in self.models:
            raise UserError(unknown_name("adapter", job.adapter, [n for n in self.models if n]))
        if not 0 <= job.alternatives <= ALTERNATIVES:
            raise UserError(f"alternatives = {job.alternatives}: from 0 to {ALTERNATIVES}")
        names = ("n", "num_beams", "num_speculative_tokens", "draft", "overflow")
        refuse_options(job.options, "a text in a slot", *names)
        request = self.models[job.adapter]._request([job.prompt], job.options)
        prompt = request.prompts[0]
        if len(prompt) + request.max_new_tokens > self.length + 1:
            raise UserError(
                f"{len(prompt)} prompt tokens and max_new_tokens = {request.max_new_tokens} exceed "
                f"the {self.length} tokens that a slot holds"
            )
        adapter = list(self.models).index(job.adapter)
        row = slot_rows.build_row(request, self.config.vocab_size, adapter)
        return Text(job, request.sequences[0], row)

    def enter(self, job: Job) -> Text:
        """Gives the job a free slot. Raises UserError, also where no slot is free."""
        text = self._text(job)
        if not self.free:
            raise UserError("no slot is free")
        source, _ = self._longest_prefix(text)
        text.slot = self._choose_slot(source)
        slot = self._slots[text.slot]
        if source != text.slot:
            slot.prefix = []
        slot.text, slot.adapter = text, text.row.adapter
        self._share(text)
        return text

    def _share(self, text: Text) -> None:
        """Takes over more of its prompt where the cache has more of it than the text: who comes
        together with the same beginning feeds it once."""
        source, shared = self._longest_prefix(text)
        if source >= 0:
            if source != text.slot:
                self._copy(source, text.slot, shared)
            text.fed = shared
        self._slots[text.slot].prefix = text.row.tokens[: text.fed]

    def _longest_prefix(self, text: Text) -> tuple[int, int]:
        """(slot, tokens) of the longest beginning that is in the cache beyond what the text has
        fed, in whole chunks, unless it is all that has to be fed: the rest of a chunk is fed in its
        place in the chunk."""
        best = (-1, text.fed)
        if text.scores_prompt:  # every token has to be fed
            return best
        prompt = text.row.tokens[: text.row.prompt_length - 1]
        for i, slot in enumerate(self._slots):
            differs_at_once = slot.adapter != text.row.adapter or prompt[:1] != slot.prefix[:1]
            if differs_at_once or len(slot.prefix) <= best[1]:
                continue
            size = min(len(prompt), len(slot.prefix))
            differs = np.flatnonzero(np.not_equal(prompt[:size], slot.prefix[:size]))
            shared = int(differs[0]) if len(differs) else size
            if shared < len(prompt):
                shared -= shared % self.chunk
            if shared > best[1]:
                best = (i, shared)
        return best

    def _choose_slot(self, source: int) -> int:
        """The free slot with this prefix; else of the first eight free ones that freed first."""
        free = [i for i, slot in enumerate(self._slots) if slot.text is None]
        if source in free:
            return source
        group = [i for i in free if i // self._group == free[0] // self._group]
        return min(group, key=lambda i: self._slots[i].freed)

    _group = 8

    def _copy(self, source: int, target: int, used: int) -> None:
        numbers = [np.int32(number) for number in (source, target, used)]
        call = slot_programs.copy_row.call(self._cache, *numbers, slots=self.slots)
        self._cache = self._program(("copy",), call)(self._cache, *numbers)

    def leave(self, text: Text) -> None:
        """Frees the slot of a text, finished or not; after a reset it has none."""
        slot = self._slots[text.slot]
        if slot.text is text:
            slot.text, slot.freed, text.slot = None, self._turn, -1

    def turn(self) -> list[Text]:
        """A chunk of a prompt that waits (several while no text grows), and a few tokens in the
        texts of one program whose prompts are in. Returns the texts that changed; those with a
        reason have left."""
        self._turn += 1
        texts = [slot.text for slot in self._slots if slot.text is not None]
        chunks = 1 if any(not text.waits for text in texts) else _IDLE_CHUNKS
        changed = []
        while chunks and (text := self._next_waiting()):
            self._share(text)
            if text.waits:
                self._feed_chunk(text)
                chunks -= 1
            changed.append(text)
        group = self._next_group([text for text in texts if not text.waits])
        # a grammar looks at every token before the next one is chosen; a first one waits for none
        guided = any(text.sequence.guide for text in group)
        steps = 1 if any(text.begins for text in group) else _TURN_STEPS
        calls, steps_of_a_call = (steps, 1) if guided else (1, steps)
        for _ in range(calls):
            for text in _unfinished(group):
                self._feed_forced(text)
            if growing := _unfinished(group):
                self._decode(growing, steps_of_a_call)
        for text in group:
            if text.sequence.reason:  # also of a grammar of the empty text
                self.leave(text)
        return list(dict.fromkeys([*changed, *group]))

    def _next_group(self, ready: Sequence[Text]) -> list[Text]:
        """The texts of one program, in turns; of texts that begin first, but never twice on end."""
        groups = self._group_texts(ready)
        if not groups:
            return []
        begin = [g for g in groups if any(text.begins for text in groups[g])]
        if begin and not self._began:
            self._began = True
            return groups[begin[0]]
        self._began = False
        after = [g for g in groups if g > self._grown_last]
        self._grown_last = min(after or groups)
        return groups[self._grown_last]

    def _next_waiting(self) -> Text | None:
        """Prompts are fed in turns, so that a long one does not stop others."""
        waiting = [slot.text for slot in self._slots if slot.text and slot.text.waits]
        if not waiting:
            return None
        after = [text for text in waiting if text.slot > self._fed_last]
        text = (after or waiting)[0]
        self._fed_last = text.slot
        return text

    def _feed_chunk(self, text: Text) -> None:
        row, start = text.row, text.fed
        alternatives = -1
        if text.scores_prompt:
            alternatives = ALTERNATIVES if text.job.alternatives else 0
        scored = self._prefill(
            text, row.tokens[start : start + self.chunk + 1], start, alternatives
        )
        count = min(self.chunk, row.prompt_length - 1 - start)
        text.fed = start + count
        self._slots[text.slot].prefix = row.tokens[: text.fed]
        if scored is not None:
            for i in range(count):
                pairs = scored.pairs(i, text.job.alternatives)
                text.prompt_scores.append((float(scored.logprob[i]), pairs))

    def _feed_forced(self, text: Text) -> None:
        """Writes what a text's grammar leaves no choice about, in one pass where that is long."""
        known, sequence = len(text.row.tokens), text.sequence
        room = min(self.chunk, text.row.limit - known)
        is_long = sequence.guide and len(sequence.guide.forced()) >= _FORCED
        if not is_long or known - 1 + self.chunk > self.cache_slots:
            return
        given = sequence.take_given(room)
        alternatives = ALTERNATIVES if text.job.alternatives else 0
        tokens = [text.row.tokens[-1], *given]
        scored = self._prefill(text, tokens, known - 1, alternatives)
        for i, token in enumerate(given):
            self._add(text, token, scored, i)

    def _prefill(self, text: Text, part: Sequence[int], start: int, alternatives: int) -> Any:
        """Feeds all but the last of at most chunk + 1 tokens; scores of the tokens after them."""
        row, tokens = text.row, np.zeros(self.chunk + 1, np.int32)
        tokens[: len(part)] = part
        arrays = (tokens, np.int32(text.slot), np.int32(start), np.int32(row.adapter))
        program = self._program(
            ("prefill", alternatives),
            lambda: slot_programs.prefill.call(
                self.config,
                self.params,
                self.adapters,
                self._cache,
                *arrays,
                alternatives=alternatives,
            ),
        )
        self._cache, scored = program(self.params, self.adapters, self._cache, *arrays)
        return None if scored is None else jax.device_get(scored)

    def _group_texts(self, ready: Sequence[Text]) -> dict[int, list[Text]]:
        """The texts by the windows of the largest program, few after some moved."""
        most, windows = self._sizes[-1], collections.defaultdict[int, list[Text]](list)
        for text in ready:
            windows[text.slot // most].append(text)
        while len(windows) > 1:
            last = max(windows)
            holes = []
            for i, slot in enumerate(self._slots):
                if slot.text is None and i // most in windows and i // most < last:
                    holes.append(i)
            if len(windows[last]) > len(holes):
                break
            for text, hole in zip(windows.pop(last), holes, strict=False):
                self._move(text, hole)
                windows[hole // most].append(text)
        return windows

    def _decode(self, ready: Sequence[Text], steps: int) -> None:
        """So many steps of these texts, which one program has rows for."""
        first, size = self._window(ready)
        rows: list[Row | None] = [None] * size
        for text in ready:
            rows[text.slot - first] = text.row
        wants = any(text.job.alternatives for text in ready)
        active = frozenset[str]().union(*(text.row.active for text in ready))
        batch = slot_rows.stack_rows(rows, self.config.vocab_size, self.cache_slots)
        if "guide" in active:
            allowed = np.full(
                (size, sampling.mask_words(self.config.vocab_size)), 0xFFFFFFFF, np.uint32
            )
            for text in ready:
                if text.sequence.guide:
                    text.sequence.guide.write_mask(allowed[text.slot - first])
            batch.settings["allowed"] = allowed
        alternatives = ALTERNATIVES if wants else 0
        arrays = (*batch, np.array([first, steps], np.int32))
        program = self._decode_program(arrays, batch.shapes, size, active, alternatives)
        if program is None:
            for text in ready:
                self._decode([text], steps)
            return
        self._cache, chosen, top = program(self.params, self.adapters, self._cache, *arrays)
        chosen, top = np.asarray(chosen), jax.device_get(top) if wants else None
        logprobs = chosen.view(np.float32)[..., 1]
        for text in ready:
            at = text.slot - first
            alternatives_of = (top[0][at], top[1][at]) if top else (None, None)
            made = Scored(logprobs[at], *alternatives_of)
            self._collect(text, chosen[at, :steps, 0], made)

    def _decode_program(
        self,
        arrays: Any,
        shapes: tuple[Any, ...],
        size: int,
        active: frozenset[str],
        alternatives: int,
    ) -> Any:
        """The program for what these texts ask for; until a thread has made it, one that does more,
        which changes nothing for them, or none where they can go on one by one."""
        key = ("decode", size, shapes, active, alternatives)
        if program := self._ready(key):
            return program
        call = slot_programs.decode.call
        described = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (self._cache, arrays)
        )
        make = lambda: call(
            self.config,
            self.params,
            self.adapters,
            described[0],
            *described[1],
            active=active,
            alternatives=alternatives,
        )
        able = [
            (len(known[3]), program)
            for known in list(self._programs)
            if known[:3] == key[:3] and known[3] >= active and known[4] >= alternatives
            if (program := self._ready(known))
        ]
        if not able and size == 1:
            return self._program(key, make)
        if not self._making or not self._making.is_alive():
            self._making = threading.Thread(target=self._program, args=(key, make), daemon=True)
            self._making.start()
        return min(able, key=lambda pair: pair[0])[1] if able else None

    def _window(self, ready: Sequence[Text]) -> tuple[int, int]:
        """(first row, rows) of the smallest program that these texts fit in, after some moved."""
        used = [text.slot for text in ready]
        for size in self._sizes:
            if size < len(ready):
                continue
            first = min(max(min(used), 0), self.slots - size)
            outside = [text for text in ready if not first <= text.slot < first + size]
            holes = [i for i in range(first, first + size) if self._slots[i].text is None]
            if len(outside) <= len(holes):
                for text, hole in zip(outside, holes, strict=False):
                    self._move(text, hole)
                return first, size
        raise AssertionError("the largest program has all rows")

    def _move(self, text: Text, target: int) -> None:
        source = text.slot
        self._copy(source, target, len(text.row.tokens))
        old, new = self._slots[source], self._slots[target]
        new.text, new.prefix, new.adapter = text, old.prefix, old.adapter
        old.text, old.prefix, old.freed = None, [], self._turn
        text.slot = target

    def _collect(self, text: Text, tokens: np.ndarray, made: Scored) -> None:
        """Feeds new tokens to a text until it ends."""
        for i, token in enumerate(tokens.tolist()):
            if not text.sequence.reason:
                self._add(text, token, made, i)

    def _add(self, text: Text, token: int, scored: Scored, i: int) -> None:
        """Feeds a token to a text, which leaves if that ends it."""
        sequence, known = text.sequence, len(text.sequence.tokens)
        sequence.feed(token, float(scored.logprob[i]))
        if len(sequence.tokens) > known:
            text.row.tokens.append(token)
            text.alternatives.append(scored.pairs(i, text.job.alternatives))
        if len(sequence.tokens) >= text.job.options.max_new_tokens:
            sequence.finish("length")
        if sequence.reason:
            self.leave(text)

    def _ready(self, key: Any) -> Any:
        """The executable of a key; None if it was not made, or is needed no longer."""
        return executables.ready(self._programs[key]) if key in self._programs else None

    def _program(self, key: Any, call: Any) -> Any:
        """The executable of a key, made where it is not ready."""
        program = self._ready(key)
        if program is None:
            call = call() if callable(call) else call
            program, self._programs[key] = executables.executable(call, self._folder), call.name
        return program


def _unfinished(texts: Sequence[Text]) -> list[Text]:
    return [text for text in texts if not text.sequence.reason]
