"""What a call of `LanguageModel.generate` can ask for, written once.

The fields of `GenerationOptions` are the keyword arguments of `generate`, `stream` and `compile`;
the flags of `gptjax.generate` are made of them too (`flags.py`). To add an option that chooses
tokens, see `sampling.py`; any other is a field here, with its key in `GenerationKeywords`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from gptjax.config.errors import UserError, unknown_name
from gptjax.generation.sampling import Range, Sampling, SamplingKeywords, option

if TYPE_CHECKING:
    from gptjax.generation.language_model import LanguageModel

OVERFLOWS = ("refuse", "slide")
CONSTRAINTS = ("schema", "regex", "choices", "grammar")  # see `constraints.py`; at most one
RENAMED = {"speculate_tokens": "num_speculative_tokens"}  # old keywords that still work
# names that other libraries have for an option: its name here
CALLED = {
    **dict.fromkeys(
        ("max_tokens", "max_output_tokens", "max_completion_tokens", "max_gen_toks", "n_predict"),
        "max_new_tokens",
    ),
    **dict.fromkeys(("stop_sequences", "stop_strings", "stop_words", "until"), "stop"),
    **dict.fromkeys(("stop_token_ids", "eos_token_id", "eos_token_ids"), "stop_tokens"),
    **dict.fromkeys(("num_return_sequences", "num_samples", "num_completions"), "n"),
    **dict.fromkeys(("bad_words", "bad_words_ids", "suppress_tokens"), "banned"),
    **dict.fromkeys(("beam_size", "beam_width"), "num_beams"),
    **dict.fromkeys(("assistant_model", "draft_model"), "draft"),
    **dict.fromkeys(("prompt_lookup_num_tokens", "num_draft_tokens"), "num_speculative_tokens"),
    **dict.fromkeys(("repeat_penalty", "rep_penalty"), "repetition_penalty"),
    "ignore_eos": "ignore_end",
    "min_tokens": "min_new_tokens",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "random_seed": "seed",
    "temp": "temperature",
    "top_n": "top_k",
    "typical": "typical_p",
}
_OTHERWISE = {  # what other libraries have and is said in another way here
    "max_length": "max_length counts the prompt too: set max_new_tokens, the number of new tokens",
    "min_length": "min_length counts the prompt too: set min_new_tokens, the number of new tokens",
    "do_sample": "there is no do_sample: temperature = 0 is greedy, and above 0 tokens are drawn",
    "logprobs": "every completion has logprobs; prompt_logprobs = True adds those of the prompt",
    "stream": "pieces of a text as they come are another method: lm.stream(prompt, ...)",
    "return_full_text": "a completion is the new text alone: put the prompt before it",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions(Sampling):
    """All options of text generation; those of `Sampling` are among them.

    temperature, top_k, top_p, min_p, typical_p: the distribution a token is drawn from; greedy at
        temperature 0, the default.
    repetition_penalty, presence_penalty, frequency_penalty, no_repeat_ngram, min_new_tokens,
        logit_bias: changes of the logits before that.
    seed: s stands for s + i in request i, so a text does not depend on the rest of its batch.
    banned: words (with and without a space before them) or lists of ids that must not occur.
    schema, regex, choices, grammar: what the text must be, at most one of them (extra [guide]).

    Raises UserError for a value out of its range.

    >>> options = gptjax.GenerationOptions(max_new_tokens=20, stop="fox")
    >>> lm.generate("The quick", options).text
    ' brown '
    """

    max_new_tokens: int = option(128, "tokens to make", Range(1, 2**31 - 1, "at least 1"))
    n: int = option(1, "completions of the prompt", Range(1, 2**31 - 1, "at least 1"))
    stop: str | Sequence[str] | None = option((), "end the text before this string")
    stop_tokens: Sequence[int] = option((), "further token ids that end a text")
    ignore_end: bool = option(False, "go on after the tokenizer's own end tokens")
    num_beams: int = option(1, "beam search; 1 = off")
    length_penalty: float = option(1.0, "beam search: exponent of the length")
    early_stopping: bool | Literal["never"] = option(
        False, "beam search: when to stop, as in transformers: True, False or 'never'"
    )
    num_speculative_tokens: int = option(
        0,
        "guesses a pass by prompt lookup, with --temperature=0; 0 = off",
        Range(0, 2**31 - 1, "0 (off) or more"),
    )
    draft: LanguageModel | None = dataclasses.field(
        default=None,
        metadata={"meaning": "a smaller model with the same vocabulary that makes the guesses"},
    )
    overflow: Literal["refuse", "slide"] = option(
        "refuse",
        "past the context: 'refuse', or 'slide': whenever it is full, go on from its latest half",
    )
    prompt_logprobs: bool = option(False, "also the log-probability of each prompt token")
    schema: Mapping[str, Any] | str | None = option(None, "JSON by this schema, and nothing else")
    regex: str | None = option(None, "a text that this regular expression matches")
    choices: Sequence[str] | None = option(None, "one of these texts")
    grammar: str | None = option(None, "a text of this context-free grammar, written in Lark")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overflow not in OVERFLOWS:
            raise UserError(unknown_name("overflow policy", self.overflow, list(OVERFLOWS)))
        constraints = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(constraints) > 1:
            raise UserError(f"{' and '.join(constraints)}: a text follows one of them, not both")
        if constraints and (self.num_beams > 1 or self.speculates):
            other = "beam search (num_beams)" if self.num_beams > 1 else "speculation"
            raise UserError(f"{constraints[0]} does not work with {other}: leave one of them out")

    @property
    def guided(self) -> bool:
        return any(getattr(self, name) is not None for name in CONSTRAINTS)

    @property
    def stop_texts(self) -> list[str]:
        """They are found across tokens."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def context_shift(self) -> bool:
        return self.overflow == "slide"

    @property
    def speculates(self) -> bool:
        return self.num_speculative_tokens > 0 or self.draft is not None


class GenerationKeywords(SamplingKeywords, total=False):
    """The fields of `GenerationOptions` but `n` as keyword arguments, for type checkers."""

    max_new_tokens: int
    stop: str | Sequence[str] | None
    stop_tokens: Sequence[int]
    ignore_end: bool
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    num_speculative_tokens: int
    draft: LanguageModel | None
    overflow: Literal["refuse", "slide"]
    prompt_logprobs: bool
    schema: Mapping[str, Any] | str | None
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None


class BatchKeywords(GenerationKeywords, total=False):
    """`GenerationKeywords` and `n`, on which the type of `generate`'s result depends."""

    n: int


def merge_options(
    options: GenerationOptions | None, keywords: Mapping[str, Any]
) -> GenerationOptions:
    """The options with some of them replaced. Raises UserError for a name that is none of them."""
    names = [field.name for field in dataclasses.fields(GenerationOptions)]
    changes = {RENAMED.get(name, name): value for name, value in keywords.items()}
    for name in changes:
        if name in CALLED:
            raise UserError(f"{name} is called {CALLED[name]} here")
        if name not in names:
            raise UserError(_OTHERWISE.get(name) or unknown_name("setting", name, names))
    return dataclasses.replace(options or GenerationOptions(), **changes)


def refuse_options(options: GenerationOptions, method: str, *names: str) -> None:
    """Raises UserError where an option that a method has no use for is set."""
    for field in dataclasses.fields(options):
        if field.name in names and getattr(options, field.name) != field.default:
            raise UserError(f"{field.name} is an option of generate, not of {method}: leave it out")
