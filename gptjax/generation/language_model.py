"""One handle for a model, whatever file it came from: logits, scores, generated text.

import gptjax
lm = gptjax.load("runs/quickstart")            # a workdir, a Hugging Face folder, a .gguf file, or a name on the hub
print(lm.generate("The people", max_new_tokens=20).text)
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.checkpoints import formats, pretrained, safetensors
from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import ModelConfig
from gptjax.generation import beam_search, engine, requests
from gptjax.generation import loop as decode_loop
from gptjax.generation.requests import Completion, Request, SequenceState
from gptjax.generation.sampling import Sampling, active_of, arrays
from gptjax.model import init as model_init
from gptjax.model import lora, quantize
from gptjax.ops.implementations import IMPLEMENTATIONS, resolve
from gptjax.runtime.devices import default_platform
from gptjax.tokenizer.base import Tokenizer

WEIGHTS = ("float32", "bfloat16", "int8")


_STREAM_STEPS = (
    1,
    2,
    4,
    8,
)  # tokens between looks at the device: the first at once, later ones in larger pieces


_SCORE_ROWS = 16


SETTINGS = [f.name for f in dataclasses.fields(Sampling) if f.name != "banned"]


_inference_params = jax.jit(quantize.inference_params, static_argnames="weights")


_inference_block = jax.jit(quantize.inference_block, static_argnames="weights")


class LanguageModel:
    """config, params (host arrays, blocks stacked on axis 0, or `transfer.Stored`) and tokenizer (None: token ids only). `weights` and `cache_dtype` say
    what generation reads; see `quantize.rows` and `model.init_cache`."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        tokenizer: Tokenizer | None,
        weights: str = "float32",
        cache_dtype: str = "",
        source: pretrained.Pretrained | None = None,
        *,
        wait: bool = True,
    ):
        if weights not in WEIGHTS:
            raise UserError(unknown_name("weights", weights, list(WEIGHTS)))
        if cache_dtype not in ("", *WEIGHTS):
            raise UserError(unknown_name("cache_dtype", cache_dtype, list(WEIGHTS)))
        self.config, self.tokenizer, self.weights, self.cache_dtype, self.source = (
            config,
            tokenizer,
            weights,
            cache_dtype,
            source,
        )
        implementation = resolve(config.implementation, platform=default_platform(), devices=1)
        dtype = IMPLEMENTATIONS[implementation].activation_dtype
        self._inference_config = dataclasses.replace(
            config,
            dropout=0.0,
            remat="none",
            attention="reference",
            scan_layers=False,
            dtype="float32" if weights == "float32" else dtype,
            implementation=implementation,
        )
        self._params = params
        self._weights = self._read() if wait else self._shapes()

    def _read(self) -> Any:
        """The parameters as generation reads them. Of stored ones a layer at a time, so that memory never holds them twice."""
        stored = self._params  # a look at `params` meanwhile would replace it
        if not isinstance(stored, safetensors.LazyParams):
            return _inference_params(self.params, weights=self.weights)
        # jitted, it would copy what is float32 already, as most is
        form = quantize.inference_params if self.weights == "float32" else _inference_params
        rest = form(stored.part(None) | {"blocks": ()}, weights=self.weights)
        return rest | {
            "blocks": tuple(
                _inference_block(stored.part(i), weights=self.weights)
                for i in range(self.config.layers)
            )
        }

    def _shapes(self) -> Any:
        """Shapes and dtypes of what `_read` makes of stored parameters."""
        shapes = model_init.param_shapes(self.config)
        block = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), shapes["blocks"])
        rest = _inference_params.eval_shape({**shapes, "blocks": ()}, weights=self.weights)
        return rest | {
            "blocks": (_inference_block.eval_shape(block, weights=self.weights),)
            * self.config.layers
        }

    @property
    def params(self) -> Any:
        """Nested dict of host arrays, blocks stacked on axis 0; of a checkpoint in files, read at the first look, float32. Raises UserError."""
        if isinstance(self._params, safetensors.LazyParams):
            self._params = self._params.params()
            self.source = self.source and dataclasses.replace(self.source, params=self._params)
        elif callable(self._params):
            self._params = self._params()
        return self._params

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.tokenizer.eos_ids if self.tokenizer else ()

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError where the checkpoint brought none."""
        if self.tokenizer is None:
            raise UserError(
                "this checkpoint has no tokenizer, so it knows token ids only: put its tokenizer.json beside it, or give ids as lists"
            )
        return self.tokenizer

    @property
    def prompt_places(self) -> int:
        """Places before every text where the learned vectors of prompt tuning stand, whatever ids are there."""
        return len(self._weights["embed"].get("prompt", ()))

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt: text behind the vocabulary's prefix, ids as they are; an empty one is a new document."""
        ids = self._ids(prompt)
        if isinstance(prompt, str) and self.tokenizer:
            ids = [*[self.tokenizer.eot] * self.prompt_places, *self.tokenizer.bos_ids, *ids]
        if not ids and self.tokenizer is None:
            raise UserError(
                "an empty prompt needs a tokenizer, whose end-of-text token begins a new document"
            )
        return ids or [self.tokenizer.eot]  # type: ignore[union-attr]

    def _writes(self) -> None:
        if self.config.labels:
            raise UserError(
                f"this checkpoint tells {', '.join(self.config.labels)} apart and writes no text: use classify, or evaluate"
            )

    def _ids(self, text: str | Sequence[int]) -> list[int]:
        if isinstance(text, str):
            return [int(i) for i in self.text_tokenizer.encode(text)]
        ids = [int(i) for i in text]
        if bad := [i for i in ids if not 0 <= i < self.config.vocab_size]:
            raise UserError(
                f"token {bad[0]} is outside the vocabulary of {self.config.vocab_size:,}"
            )
        return ids

    def with_adapter(self, path: str | Path) -> LanguageModel:
        """This model with the adapters of a run or a PEFT folder beside its weights, which both share (DoRA's norms need a copy). Raises UserError."""
        from gptjax.checkpoints import peft

        settings, trained, template = peft.find(Path(path).expanduser(), self.config)
        other = copy.copy(self)
        if template and self.tokenizer:
            other.tokenizer = copy.copy(self.tokenizer)
            other.tokenizer.chat_template = template  # what the adapters were trained to follow
        if "score" in trained:
            other.config = dataclasses.replace(
                self.config,
                labels=peft.labels_of(Path(path).expanduser(), len(trained["score"]["kernel"])),
            )
            other._inference_config = dataclasses.replace(
                self._inference_config, labels=other.config.labels
            )
        other._params = lambda: lora.apply_adapter(
            settings, self.params, trained
        )  # only DoRA, and whoever looks, needs it
        if settings.dora:
            other._weights = other._read()
        else:
            other._weights = lora.apply_adapter(settings, self._weights, trained)
        other.source = None
        return other

    def logits(self, tokens: Any, lengths: Sequence[int] | None = None) -> np.ndarray:
        """float32 [B, T, V] for token ids [B, T]; rows past `lengths` are zero. Raises UserError past the context or the vocabulary."""
        self._writes()
        tokens = np.asarray(tokens)
        if (
            tokens.ndim != 2
            or tokens.shape[1] > self.config.context
            or tokens.min(initial=0) < 0
            or tokens.max(initial=0) >= self.config.vocab_size
        ):
            raise UserError(
                f"tokens {tokens.shape} must be [B, T <= {self.config.context}] with ids from 0 to {self.config.vocab_size - 1}"
            )
        size = _bucket(tokens.shape[1], self.config.context)
        padded = np.pad(
            tokens.astype(np.int32), ((0, 0), (0, size - tokens.shape[1]))
        )  # lengths share programs; what is behind changes nothing before it
        found = np.asarray(decode_loop.logits(self._inference_config, self._weights, padded))[
            :, : tokens.shape[1]
        ]
        if lengths is None:
            return found
        return np.where(
            np.arange(tokens.shape[1])[None, :, None] < np.asarray(lengths)[:, None, None],
            found,
            0.0,
        )

    def score(
        self, prompts: Sequence[str | Sequence[int]], completions: Sequence[str | Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """(log-probability of the completion after the prompt, whether greedy decoding would write it) of each pair.

        Two texts are encoded together, so that the border is cut as in running text (trailing spaces of a prompt go to its completion)."""
        rows, starts = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            if isinstance(prompt, str) and isinstance(completion, str):
                spaces = len(prompt) - len(prompt.rstrip())
                head = prompt[: len(prompt) - spaces]
                first = self.encode(head)
                whole = (
                    self.encode(prompt + completion)
                    if head
                    else [*first, *self._ids(prompt + completion)]
                )
            else:
                first = self.encode(prompt)
                whole = [*first, *self._ids(completion)]
            if len(whole) > self.config.context + 1:
                raise UserError(
                    f"prompt and completion have {len(whole)} tokens and the model's context is {self.config.context}: shorten the prompt"
                )
            rows.append(whole)
            starts.append(min(len(first), len(whole)))
        found = self.token_logprobs(rows)
        return [
            (float(lp[s - 1 :].sum(dtype=np.float64)), bool(best[s - 1 :].all()))
            for (lp, best), s in zip(found, starts, strict=True)
        ]

    def token_logprobs(self, rows: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each row of ids: (log-probabilities, greedy flags) of its tokens but the first. A few rows at a time, lengths in buckets."""
        self._writes()
        result: list[Any] = [None] * len(rows)
        for group, tokens in self._groups(rows, 1):  # the last token is no query
            logprobs, best = (
                np.asarray(a)
                for a in decode_loop.token_logprobs(self._inference_config, self._weights, tokens)
            )
            for k, i in enumerate(group):
                result[i] = (logprobs[k, : len(rows[i]) - 1], best[k, : len(rows[i]) - 1])
        return result

    def _groups(self, rows: list[list[int]], extra: int) -> Iterator[tuple[list[int], np.ndarray]]:
        """(numbers, ids padded to a bucket and `extra` columns) of a few rows of like lengths at a time."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for first in range(0, len(order), _SCORE_ROWS):
            group = order[first : first + _SCORE_ROWS]
            size = extra + _bucket(len(rows[group[-1]]) - extra, self.config.context, smallest=16)
            tokens = np.zeros((min(_SCORE_ROWS, 1 << (len(rows) - 1).bit_length()), size), np.int32)
            for row, i in zip(tokens, group, strict=False):
                row[: len(rows[i])] = rows[i]
            yield group, tokens

    def classify(self, prompts: Sequence[str | Sequence[int]]) -> np.ndarray:
        """float32 [N, labels]: probabilities of the classes `config.labels` for each text, or [N, 1] numbers where there is one label. Raises UserError."""
        if not self.config.labels:
            raise UserError(
                "this checkpoint is a language model and has no classes: fine-tune it with task.name = 'classification'"
            )
        rows = [self.encode(p) for p in prompts]
        if longest := [len(row) for row in rows if len(row) > self.config.context]:
            raise UserError(
                f"a text has {longest[0]} tokens and the model's context is {self.config.context}: shorten it"
            )
        found = np.zeros((len(rows), len(self.config.labels)), np.float32)
        for group, tokens in self._groups(rows, 0):
            lengths = np.array(
                [len(rows[i]) for i in group] + [1] * (len(tokens) - len(group)), np.int32
            )
            found[group] = np.asarray(
                decode_loop.head_scores(self._inference_config, self._weights, tokens, lengths)
            )[: len(group)]
        if found.shape[1] == 1:
            return found
        odds = np.exp(found - found.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def generate(
        self,
        prompts: str | Sequence[Any],
        *,
        max_new_tokens: int = 128,
        n: int = 1,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        banned: Sequence[Any] = (),
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        speculate_tokens: int = 0,
        draft: LanguageModel | None = None,
        overflow: str = "refuse",
        prompt_logprobs: bool = False,
        ignore_end: bool = False,
        **sampling: Any,
    ) -> Any:
        """Completions of the prompts (texts or lists of ids): one for a single text, else a flat list with the `n` of each prompt side by side.

        Greedy unless `temperature` > 0; `sampling`: the fields of `sampling.Sampling`. A `seed` s stands for s + i in request i, so a
        request's text does not depend on its batch mates. stop: texts that end a completion, found across tokens, left out of it;
        stop_tokens: further end tokens. banned: words (with and without a space before them) or lists of ids. num_beams: beam search, with
        transformers' length_penalty and early_stopping (True, False, "never"). speculate_tokens: guesses a pass, by prompt lookup or a
        `draft` model; the text stays greedy's. overflow: "refuse" prompts and lengths past the context, or "slide": keep the latest tokens,
        and go on from the latest half of the context whenever it is full. Raises UserError.
        """
        request = self._request(
            prompts,
            max_new_tokens=max_new_tokens,
            n=n,
            stop=stop,
            stop_tokens=stop_tokens,
            banned=banned,
            overflow=overflow,
            ignore_end=ignore_end,
            **sampling,
        )
        if num_beams > 1:
            found = self._beams(request, num_beams, length_penalty, early_stopping)
        else:
            guess = self._speculation(request, speculate_tokens, draft)
            steps = (16,) if request.has_stop_text else (1 << 30,)
            for _ in engine.run(
                self._inference_config,
                self._weights,
                request,
                steps=steps,
                cache_dtype=self.cache_dtype,
                guess=guess,
            ):
                pass
            found = [row.completion() for row in request.rows]
        if prompt_logprobs:
            scores = self.token_logprobs(request.prompts)
            found = [
                dataclasses.replace(c, prompt_logprobs=scores[i // n][0].tolist())
                for i, c in enumerate(found)
            ]
        return found[0] if isinstance(prompts, str) and n == 1 else found

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        banned: Sequence[Any] = (),
        speculate_tokens: int = 0,
        draft: LanguageModel | None = None,
        overflow: str = "refuse",
        ignore_end: bool = False,
        **sampling: Any,
    ) -> Iterator[str]:
        """Pieces of the text of one completion as they come: whole characters, and never a part of a stop text. Options as in `generate`."""
        _ = self.text_tokenizer  # without one there is no text to stream
        request = self._request(
            [prompt],
            max_new_tokens=max_new_tokens,
            stop=stop,
            stop_tokens=stop_tokens,
            banned=banned,
            overflow=overflow,
            ignore_end=ignore_end,
            **sampling,
        )
        guess = self._speculation(request, speculate_tokens, draft)
        row, shown = request.rows[0], 0
        for _ in engine.run(
            self._inference_config,
            self._weights,
            request,
            steps=_STREAM_STEPS,
            cache_dtype=self.cache_dtype,
            guess=guess,
        ):
            if row.safe > shown:
                yield row.text[shown : row.safe]
                shown = row.safe

    def save(self, path: str | Path, *, form: str = "hf", dtype: str = "") -> None:
        """Writes the model: a Hugging Face folder, a .gguf file or a workdir (form "hf", "gguf", "gptjax"). dtype: default the stored one."""
        source = self.source or pretrained.Pretrained(self.config, self.params, self.tokenizer)
        formats.write_checkpoint(
            Path(path), dataclasses.replace(source, params=self.params), form=form, dtype=dtype
        )

    def compile(
        self, prompt: str | Sequence[int], *, folder: str | Path | None = None, **options: Any
    ) -> None:
        """Makes ready the programs that `generate` or `stream` begins with for such a prompt; they depend on its length and on which options are used.
        options: theirs but beams, speculation and `prompt_logprobs`. folder: where programs are kept whole for other processes (`programs.make_ready`).
        The weights may be on their way (see `opening`). Raises UserError."""
        engine.compile_ahead(
            self._inference_config,
            self._weights,
            self._request([prompt], **options),
            cache_dtype=self.cache_dtype,
            folder=folder,
        )

    def _request(
        self,
        prompts: Any,
        *,
        max_new_tokens: int = 128,
        n: int = 1,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        banned: Sequence[Any] = (),
        overflow: str = "refuse",
        ignore_end: bool = False,
        **sampling: Any,
    ) -> Request:
        self._writes()
        prompts = prompts.tolist() if isinstance(prompts, np.ndarray) else prompts
        if isinstance(prompts, str) or (
            prompts and all(isinstance(p, int | np.integer) for p in prompts)
        ):
            prompts = [prompts]
        if not prompts:
            raise UserError("no prompts: give a text or a list of them")
        if overflow not in ("refuse", "slide"):
            raise UserError(unknown_name("overflow policy", overflow, ["refuse", "slide"]))
        if n < 1 or max_new_tokens < 1:
            raise UserError(f"n = {n}, max_new_tokens = {max_new_tokens}: both must be at least 1")
        if bad := [name for name in sampling if name not in SETTINGS]:
            raise UserError(unknown_name("setting", bad[0], SETTINGS))
        texts = [stop] if isinstance(stop, str) else list(stop)
        if "" in texts or (texts and self.tokenizer is None):
            raise UserError(
                "stop texts must not be empty"
                if self.tokenizer
                else "stop texts need a tokenizer, which this checkpoint lacks: use stop_tokens"
            )
        ids = [
            requests.fit(
                self.encode(p), self.config.context, max_new_tokens, slide=overflow == "slide"
            )
            for p in prompts
        ]
        seed, bans = sampling.pop("seed", 0), self._banned(banned)
        first = Sampling(**sampling, banned=bans, seed=seed)
        samplings = [dataclasses.replace(first, seed=(seed + i) % 2**32) for i in range(len(ids))]
        stops = sorted({*(() if ignore_end else self.eos_ids), *self._ids(stop_tokens)})
        rows = [SequenceState(self.tokenizer, texts, stops) for _ in range(len(ids) * n)]
        return Request(
            ids, samplings, rows, n, max_new_tokens, stops, bool(texts), overflow == "slide"
        )

    def _banned(self, words: Sequence[Any]) -> list[list[int]]:
        found = []
        for word in [words] if isinstance(words, str) else words:
            if not isinstance(word, str):
                found.append(self._ids([int(word)] if isinstance(word, int | np.integer) else word))
            elif self.tokenizer is None:
                raise UserError(
                    "banned words need a tokenizer, which this checkpoint lacks: give lists of token ids"
                )
            else:
                found += [self.tokenizer.encode(word), self.tokenizer.encode(" " + word)]
        return found

    def _speculation(
        self, request: Request, count: int, draft: LanguageModel | None
    ) -> engine.Speculation | None:
        if count < 0:
            raise UserError(f"speculate_tokens = {count}: must be 0 (off) or more")
        if not count and draft is None:
            return None
        if any(s.temperature for s in request.samplings) or any(
            s.active - {"logit_bias", "banned", "min_new"} for s in request.samplings
        ):
            raise UserError(
                "speculation gives greedy text: set temperature = 0 and leave penalties and no_repeat_ngram off"
            )
        if draft is None:
            return engine.Speculation(count)
        if draft.config.vocab_size != self.config.vocab_size:
            raise UserError(
                f"the draft model has {draft.config.vocab_size:,} tokens and the model {self.config.vocab_size:,}: they must share one vocabulary"
            )
        return engine.Speculation(
            count or 4, draft._inference_config, draft._weights, draft.cache_dtype
        )

    def _beams(
        self, request: Request, beams: int, length_penalty: float, early_stopping: bool | str
    ) -> list[Completion]:
        if (
            request.n > beams
            or any(s.temperature for s in request.samplings)
            or request.has_stop_text
            or request.slide
        ):
            raise UserError(
                f"num_beams = {beams}: needs temperature 0, n <= num_beams, and neither stop texts nor sliding"
            )
        if early_stopping not in (True, False, "never"):
            raise UserError(f"early_stopping = {early_stopping!r}: must be True, False or 'never'")
        limits = [
            min(len(p) + request.max_new_tokens, self.config.context + 1) for p in request.prompts
        ]
        state = decode_loop.start(
            self._inference_config,
            self._weights,
            request.prompts,
            limits=limits,
            seeds=[0] * len(limits),
            slots=decode_loop.bucket(
                max(limits),
                self.config.context + 1,
                IMPLEMENTATIONS[self._inference_config.implementation].prefill_chunk,
            ),
            cache_dtype=self.cache_dtype,
            copies=beams,
        )
        options = arrays(request.samplings, self.config.vocab_size, request.stops, beams)
        state = beam_search.search(
            self._inference_config,
            self._weights,
            beam_search.begin(state, beams),
            options,
            np.float32(length_penalty),
            active=active_of(request.samplings),
            beams=beams,
            early_stopping=early_stopping,
        )
        tokens, lengths, scores = (
            np.asarray(state[name]) for name in ("best_tokens", "best_length", "best_scores")
        )
        best = [(i, k) for i in range(len(request.prompts)) for k in range(request.n)]
        texts = [tokens[i, k, : lengths[i, k]].tolist() for i, k in best]
        found = []
        for (i, k), row, text, (logprobs, _) in zip(
            best, request.rows, texts, self.token_logprobs(texts), strict=True
        ):
            start = len(request.prompts[i])
            for token, logprob in zip(text[start:], logprobs[start - 1 :], strict=True):
                row.feed(token, float(logprob))
            row.finish("length")
            found.append(dataclasses.replace(row.completion(), score=float(scores[i, k])))
        return found


def _bucket(length: int, context: int, *, smallest: int = 64) -> int:
    """Columns for rows of up to `length` tokens: few sizes, so few programs."""
    return min(max(smallest, 1 << max(length - 1, 0).bit_length()), context)


def load(path: str | Path, *, weights: str = "float32", cache_dtype: str = "") -> LanguageModel:
    """The model at `path`: a workdir, a step's folder, a Hugging Face folder, a .gguf file, or a name on the hub (with the extra `hub`).

    weights: what generation reads, "float32", "bfloat16" or "int8" (a scale for each row): a step takes as long as reading them. cache_dtype: of keys
    and values, by default the compute dtype. Raises UserError.
    """
    found = pretrained.open_checkpoint(path)
    return LanguageModel(found.config, found.params, found.tokenizer, weights, cache_dtype, found)


@contextlib.contextmanager
def load_lazily(
    path: str | Path, *, weights: str = "float32", cache_dtype: str = ""
) -> Iterator[LanguageModel]:
    """`load` whose model comes at once, and its weights when the block ends: inside, while a thread reads them, it can `encode` and `compile` only.
    Raises UserError."""
    found = pretrained.open_checkpoint(path)
    stored = found.params
    if not isinstance(stored, safetensors.LazyParams):  # read already
        yield LanguageModel(found.config, stored, found.tokenizer, weights, cache_dtype, found)
        return
    lm = LanguageModel(
        found.config, stored, found.tokenizer, weights, cache_dtype, found, wait=False
    )
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lm._read)
        try:
            yield lm
            lm._weights = reading.result()
        except BaseException:
            stored.end()
            raise
