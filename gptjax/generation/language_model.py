"""One handle for a model, whatever file it came from: logits, scores, generated text.

    import gptjax

    lm = gptjax.load("runs/quickstart")
    print(lm.generate("The people", max_new_tokens=20).text)

What a call may ask for is in `options.py`; the work is done in `engine.py`, `beam_search.py` and
`scoring.py`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import numpy as np
from jax.sharding import Mesh

from gptjax.checkpoints import formats, pretrained
from gptjax.checkpoints.safetensors import LazyParams
from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig
from gptjax.core.types import Params
from gptjax.generation import beam_search, engine, pairs, requests, scoring, speculative, tracing
from gptjax.generation.loop import InferenceModel
from gptjax.generation.meshes import decoding_mesh
from gptjax.generation.options import (
    BatchKeywords,
    GenerationKeywords,
    GenerationOptions,
    merge_options,
    refuse_options,
)
from gptjax.generation.pairs import Pair
from gptjax.generation.requests import Completion, Prompt, Request
from gptjax.generation.scoring import TokenScores
from gptjax.generation.weights import (
    check_dtypes,
    inference_config,
    place_weights,
    read_weights,
    weight_shapes,
)
from gptjax.model import lora
from gptjax.tokenizer import chat_template
from gptjax.tokenizer.base import Tokenizer

# steps until the texts hear of their tokens: the first at once, later ones in larger pieces
_STREAM_STEPS = (1, 2, 4, 8)
_STOP_TEXT_STEPS = (16,)  # where a stop text may end the completion before its length
_STEPS = (32,)  # otherwise: so many at a time, for a signal to be heard between them


class LanguageModel:
    """A model's config, parameters and tokenizer, ready to generate, score and classify.

    config, params, tokenizer: `params` is a nested dict of host arrays with blocks stacked on axis
        0, or `LazyParams` that are still in files; without a tokenizer prompts are token ids only.
    weights: how generation stores matrices, "float32", "bfloat16" or "int8".
    cache_dtype: of cached keys and values, the same names; "" is the compute dtype.
    mesh: devices that share the work, as text or the mesh of a run (`meshes.decoding_mesh`).
    source: the checkpoint it came from, which `save` writes again.
    read: False leaves the weights unread for `load_lazily`.

    Raises UserError for an unknown name of weights or cache_dtype, and a mesh that does not fit.

    >>> lm.config.layers, lm.weights, lm.tokenizer.vocab_size
    (1, 'float32', 257)
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params | LazyParams,
        tokenizer: Tokenizer | None,
        *,
        weights: str = "float32",
        cache_dtype: str = "",
        mesh: str | Mesh | None = None,
        source: pretrained.Pretrained | None = None,
        read: bool = True,
    ):
        check_dtypes(weights, cache_dtype)
        self.config = config
        self.tokenizer = tokenizer
        self.weights = weights
        self.cache_dtype = cache_dtype
        self.mesh = decoding_mesh(config, mesh)
        self.source = source
        self._adapted_by = ""  # the folder of its adapter
        self._inference_config = inference_config(config, weights, self.mesh)
        self._params: Any = params  # or a function that makes them at the first look
        self._weights = self._read_weights() if read else weight_shapes(config, weights, self.mesh)

    def _read_weights(self) -> Params:
        params = self._params  # a look at `self.params` meanwhile would replace it
        if not isinstance(params, LazyParams):
            params = self.params
        return read_weights(self.config, params, self.weights, self.mesh)

    @property
    def _model(self) -> InferenceModel:
        return InferenceModel(self._inference_config, self._weights, self.cache_dtype, self.mesh)

    @property
    def params(self) -> Params:
        """Nested dict of float32 host arrays, blocks stacked on axis 0.

        Of a checkpoint in files, they are read at the first look. Raises UserError.
        """
        if isinstance(self._params, LazyParams):
            self._params = self._params.params()
            self.source = self.source and dataclasses.replace(self.source, params=self._params)
        elif callable(self._params):
            self._params = self._params()
        return self._params

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a generated text, the end of an answer in the chat template among them."""
        return chat_template.end_ids(self.tokenizer) if self.tokenizer else ()

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError where the checkpoint brought none."""
        if self.tokenizer is None:
            raise UserError(
                "this checkpoint has no tokenizer, so it knows token ids only: put its "
                "tokenizer.json next to it, or give ids as lists"
            )
        return self.tokenizer

    @property
    def prompt_tokens(self) -> int:
        """Tokens before every text whose embeddings are learned (prompt tuning)."""
        return len(self._weights["embed"].get("prompt", ()))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: of a text after `bos_ids`; ids as they are.

        An empty prompt is the start of a new document. Raises UserError.

        >>> lm.encode("The")
        [84, 104, 101]
        """
        ids = self._ids(prompt)
        if isinstance(prompt, str) and self.tokenizer:
            ids = [*[self.tokenizer.eot] * self.prompt_tokens, *self.tokenizer.bos_ids, *ids]
        if ids:
            return ids
        if self.tokenizer is None:
            raise UserError(
                "an empty prompt needs a tokenizer, whose end-of-text token begins a new document"
            )
        return [self.tokenizer.eot]

    def _ids(self, text: Prompt) -> list[int]:
        if isinstance(text, str):
            return [int(i) for i in self.text_tokenizer.encode(text)]
        ids = [int(i) for i in text]
        for i in ids:
            if not 0 <= i < self.config.vocab_size:
                raise UserError(
                    f"token {i} is outside the vocabulary of {self.config.vocab_size:,}"
                )
        return ids

    def _require_text_model(self) -> None:
        if self.config.labels:
            raise UserError(
                f"this checkpoint tells {', '.join(self.config.labels)} apart and writes no text: "
                "use classify, or evaluate"
            )

    def with_adapter(self, path: str | Path) -> LanguageModel:
        """This model with the adapters of a run or of a PEFT folder.

        Both models share the base's weights; only DoRA, whose norms need them, and adapters that
        replace some of them take a copy. Raises UserError.

        >>> lm.with_adapter("runs/adapter").generate("The quick", max_new_tokens=6).text
        ' brown'
        """
        from gptjax.checkpoints import peft

        folder = Path(path).expanduser()
        if self._adapted_by:
            raise UserError(f"the adapter {self._adapted_by} is there already: load the base again")
        adapter = peft.find(folder, self.config, lambda: self.params)
        other = copy.copy(self)
        other._adapted_by = str(folder)
        if adapter.chat_template and self.tokenizer:
            other.tokenizer = copy.copy(self.tokenizer)
            other.tokenizer.chat_template = adapter.chat_template  # what the adapter follows
        other.config = adapter.adapted_config(self.config)
        other._inference_config = adapter.adapted_config(self._inference_config)
        other._params = lambda: adapter.merged_params(self.params)  # for who looks, and for `save`
        if adapter.needs_params:
            params = adapter.adapted_params(self.params)
            other._weights = read_weights(other.config, params, self.weights, self.mesh)
        else:
            adapted = lora.apply_adapter(adapter.settings, self._weights, adapter.trained)
            other._weights = place_weights(adapted, self.mesh)
        if source := self.source:
            other.source = dataclasses.replace(
                source, config=other.config, tokenizer=other.tokenizer
            )
        return other

    def logits(self, tokens: Any, lengths: Sequence[int] | None = None) -> np.ndarray:
        """float32 [B, T, V] for token ids [B, T]; zeros in each row from its `lengths` on.

        Raises UserError for rows longer than the context and ids outside the vocabulary.

        >>> lm.logits([lm.encode("The quick")]).shape
        (1, 9, 257)
        """
        self._require_text_model()
        tokens = np.asarray(tokens)
        context, vocab_size = self.config.context, self.config.vocab_size
        fits = tokens.ndim == 2 and tokens.shape[1] <= context
        if not fits or tokens.min(initial=0) < 0 or tokens.max(initial=0) >= vocab_size:
            raise UserError(
                f"tokens {tokens.shape} must be [B, T <= {context}] with ids from 0 to "
                f"{vocab_size - 1}"
            )
        logits = scoring.padded_logits(self._model, tokens)
        if lengths is None:
            return logits
        inside = np.arange(tokens.shape[1])[None] < np.asarray(lengths)[:, None]
        return np.where(inside[:, :, None], logits, 0.0)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Prompt]
    ) -> list[tuple[float, bool]]:
        """Of each pair: the log-probability of the completion after the prompt (nats), and whether
        greedy decoding would write it.

        Two texts are encoded together, so that the border is cut as in running text; where a token
        spans it, the score is that of the characters which the completion adds (`pairs.py`).
        Nothing has log-probability 0. Raises UserError for a pair that is too long.

        >>> (fox, is_greedy), (cat, _) = lm.score(["brown"] * 2, [" fox", " cat"])
        >>> fox > cat, is_greedy
        (True, True)
        """
        encoded = []
        for prompt, completion in zip(prompts, completions, strict=True):
            encoded.append(self._encode_pair(prompt, completion))
        return self.score_pairs(encoded)

    def score_pairs(self, encoded: Sequence[Pair]) -> list[tuple[float, bool]]:
        """`score` of pairs that are ids already. Raises UserError for one that is too long."""
        self._require_text_model()
        for pair in encoded:
            if pair.positions > self.config.context:
                raise UserError(
                    f"prompt and completion have {pair.positions + 1} tokens and the model's "
                    f"context is {self.config.context}: shorten the prompt"
                )
        return pairs.score_pairs(self._model, self.tokenizer, encoded)

    def _encode_pair(self, prompt: Prompt, completion: Prompt) -> Pair:
        if isinstance(prompt, str) and isinstance(completion, str):
            return pairs.text_pair(self.encode, self.text_tokenizer, prompt, completion)
        if isinstance(completion, str):
            completion = pairs.encode_inside(self.text_tokenizer, completion)
        return Pair(self.encode(prompt), self._ids(completion))

    def token_logprobs(self, rows: Sequence[Sequence[int]]) -> list[TokenScores]:
        """For each row of ids: (log-probabilities, greedy flags) of its tokens but the first."""
        self._require_text_model()
        return scoring.score_rows(self._model, rows)

    def classify(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """float32 [N, labels]: for each text, probabilities of the classes `config.labels`.

        With problem_type multi_label_classification each label has a probability of its own; with
        regression (one label) they are numbers. Raises UserError.

        >>> classifier.classify(["The quick fox", "The lazy dog"]).shape
        (2, 3)
        """
        if not self.config.labels:
            raise UserError(
                "this checkpoint is a language model and has no classes: fine-tune it with "
                "task.name = 'classification'"
            )
        ends = self.classified_end
        rows = [[*self.encode(p), *(ends if isinstance(p, str) else ())] for p in prompts]
        pad = self.source.keep.get("pad_token_id") if self.source else None
        return scoring.classify_rows(self._model, rows, pad)

    @property
    def classified_end(self) -> tuple[int, ...]:
        """Ids that a Hugging Face classifier's tokenizer writes after a text to be classified."""
        is_theirs = self.source is not None and "pad_token_id" in self.source.keep
        return self.tokenizer.end_ids if is_theirs and self.tokenizer else ()

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] as well
        self,
        prompts: str,
        options: GenerationOptions | None = None,
        *,
        n: Literal[1] = 1,
        **keywords: Unpack[GenerationKeywords],
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt] | Sequence[int] | np.ndarray,
        options: GenerationOptions | None = None,
        **keywords: Unpack[BatchKeywords],
    ) -> list[Completion]: ...

    def generate(
        self, prompts: Any, options: GenerationOptions | None = None, **keywords: Any
    ) -> Completion | list[Completion]:
        """Completions of the prompts, greedy unless `temperature` > 0.

        Args:
            prompts: a text, token ids, or a list of texts or of lists of ids.
            options: all options as one object.
            keywords: fields of `GenerationOptions`; they win over `options`.

        Returns:
            One `Completion` for a single text with n = 1; else a list, with the n completions of
            each prompt side by side.

        Raises:
            UserError: an option is wrong, or a prompt does not fit.

        Example:
            >>> lm.generate("The quick", max_new_tokens=6).text
            ' brown'
            >>> [c.text for c in lm.generate(["quick", "brown"], max_new_tokens=4, stop="w")]
            [' bro', ' fox']
        """
        options = merge_options(options, keywords)
        request = self._request(requests.list_prompts(prompts), options)
        if options.num_beams > 1:
            completions = beam_search.complete(self._model, request, options)
        else:
            self._run(request, options)
            completions = [sequence.completion() for sequence in request.sequences]
        if options.prompt_logprobs:
            scores = self.token_logprobs(request.prompts)
            completions = [
                dataclasses.replace(c, prompt_logprobs=scores[i // options.n].logprobs.tolist())
                for i, c in enumerate(completions)
            ]
        return completions[0] if isinstance(prompts, str) and options.n == 1 else completions

    def stream(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Iterator[str]:
        """Pieces of the text of one completion as they come; arguments as in `generate`.

        A piece holds complete characters, and never a part of a stop text. Raises UserError.

        >>> list(lm.stream("The quick", max_new_tokens=6))
        [' ', 'br', 'own']
        """
        options = merge_options(options, keywords)
        refuse_options(options, "stream", "n", "num_beams", "prompt_logprobs")
        _ = self.text_tokenizer  # without one there is no text to stream
        request = self._request([prompt], options)
        speculation = self._speculation(request, options)
        sequence, sent = request.sequences[0], 0
        for _ in engine.run(self._model, request, steps=_STREAM_STEPS, speculation=speculation):
            if sequence.safe > sent:
                yield sequence.text[sent : sequence.safe]
                sent = sequence.safe

    def compile(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        folder: str | Path | None = None,
        **keywords: Unpack[BatchKeywords],
    ) -> None:
        """Prepares the programs that `generate` or `stream` begins with for such a prompt.

        They depend on its length and on which options are used; beams and speculation have others,
        which are not prepared. folder: where programs are cached for other processes
        (`executables.prepare`). The weights may still be on their way (`load_lazily`).
        Raises UserError.
        """
        options = merge_options(options, keywords)
        refuse_options(options, "compile", "num_beams", "num_speculative_tokens", "draft")
        engine.compile_ahead(self._model, self._request([prompt], options), folder=folder)

    trace = tracing.trace

    def save(self, path: str | Path, *, form: str = "hf", dtype: str = "") -> None:
        """Writes the model: a Hugging Face folder, a .gguf file or a workdir.

        form: "hf", "gguf" or "gptjax"; dtype: of the numbers in it, by default the stored one.
        Raises UserError.

        >>> lm.save("runs/fox-hf")
        """
        source = self.source or pretrained.Pretrained(self.config, self.params, self.tokenizer)
        source = dataclasses.replace(source, params=self.params)
        formats.write_checkpoint(Path(path), source, form=form, dtype=dtype)

    def _request(self, prompts: Sequence[Prompt], options: GenerationOptions) -> Request:
        self._require_text_model()
        own = () if options.ignore_end else self.eos_ids
        return requests.build_request(
            [self.encode(prompt) for prompt in prompts],
            options,
            tokenizer=self.tokenizer,
            context=self.config.context,
            eos_ids=sorted({*own, *self._ids(options.stop_tokens)}),
            banned=requests.encode_banned(options.banned, self.tokenizer, self._ids),
            vocab_size=self.config.vocab_size,
        )

    def _run(self, request: Request, options: GenerationOptions) -> None:
        """Fills the request's sequences to their ends."""
        steps = _STOP_TEXT_STEPS if request.has_stop_text else _STEPS
        speculation = self._speculation(request, options)
        for _ in engine.run(self._model, request, steps=steps, speculation=speculation):
            pass

    def _speculation(
        self, request: Request, options: GenerationOptions
    ) -> speculative.Speculation | None:
        if not options.speculates:
            return None
        count, draft = options.num_speculative_tokens, options.draft
        return speculative.build_speculation(
            self._model, request, count, draft._model if draft else None
        )


def load(
    path: str | Path, *, weights: str = "float32", cache_dtype: str = "", mesh: str = ""
) -> LanguageModel:
    """The model at `path`; see `gptjax.load`. Raises UserError."""
    checkpoint = pretrained.open_for_generation(path)
    return LanguageModel(
        checkpoint.config,
        checkpoint.params,
        checkpoint.tokenizer,
        weights=weights,
        cache_dtype=cache_dtype,
        mesh=mesh,
        source=checkpoint,
    )


@contextlib.contextmanager
def load_lazily(
    path: str | Path, *, weights: str = "float32", cache_dtype: str = "", mesh: str = ""
) -> Iterator[LanguageModel]:
    """`load` whose model comes at once, and its weights when the block ends.

    Inside the block, while a thread reads them, the model can `encode` and `compile` only.
    Raises UserError.
    """
    checkpoint = pretrained.open_for_generation(path)
    params = checkpoint.params
    in_files = isinstance(params, LazyParams)
    lm = LanguageModel(
        checkpoint.config,
        params,
        checkpoint.tokenizer,
        weights=weights,
        cache_dtype=cache_dtype,
        mesh=mesh,
        source=checkpoint,
        read=not in_files,
    )
    if not in_files:
        yield lm
        return
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lm._read_weights)
        try:
            yield lm
            lm._weights = reading.result()
        except BaseException:
            params.end()
            raise
