"""Text that follows a grammar: a JSON schema, a regular expression, a list of choices, or Lark.

`build_guide` compiles what the options ask for, by the library llguidance over the bytes of a
tokenizer's own tokens. Each text has a `GuideState`: which tokens may come next (a bit each), and
which must come, so that several are written in one pass. The first alone is enough for a text to be
right; the device needs it only as `settings["allowed"]` (`sampling.guide`).

To add a kind of grammar: a field of `GenerationOptions` and a row in `_GRAMMARS`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.core.characters import check_characters
from gptjax.generation.options import CONSTRAINTS, GenerationOptions
from gptjax.generation.pairs import encode_inside
from gptjax.runtime.memory import join_freed_blocks
from gptjax.tokenizer.base import Tokenizer

# JSON as `json.dumps` writes it: free white space could go on for ever, and what is not free is
# forced. A schema's own "x-guidance" wins.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TOO_DEEP = "schema: it is nested too deeply: use $defs and $ref"
_NOTHING = "no text that the vocabulary can write follows it"
_CACHED_VOCABULARIES, _CACHED_GUIDES = 4, 64
# Tokens that the library takes all at once where a grammar lets them all come, in the sizes of its
# own: words, which many expressions are of. It builds its tree of them in this order.
_WORDS = ["[a-z]{1,10}", " [a-z]{1,9}", "[a-z]{1,30}", " [a-z]{1,29}"]
_EXACT = 2**53  # the largest integer up to which float64 has all


class Guide:
    """A grammar compiled for a tokenizer; immutable, shared by rows."""

    def __init__(self, vocabulary: _Vocabulary, matcher: Any):
        self.vocabulary, self._matcher = vocabulary, matcher

    def start(self) -> GuideState:
        """The state of a text before its first token."""
        return GuideState(self.vocabulary, self._matcher.deep_copy())


class GuideState:
    """Where a text is in its grammar.

    finished: only an end token is left. fault: why no token is left though the text is not
    finished (the vocabulary lacks a character, or the grammar is too large for the library).
    """

    def __init__(self, vocabulary: _Vocabulary, matcher: Any):
        self._vocabulary, self._matcher = vocabulary, matcher
        words = np.zeros(-(-(vocabulary.end + 1) // 32), np.uint32)
        self._place = (words.ctypes.data, words.nbytes)  # where the library writes the mask
        self._texts = words[: len(vocabulary.texts)]  # its part about the model's rows
        self._bytes = memoryview(self._texts).cast("B")  # the same, quicker to compare
        self.finished, self.fault = False, ""
        self._is_new = False  # whether `_texts` is the mask of this state
        self._forced: list[int] | None = None  # of this state, once somebody asked
        self._look()

    @property
    def ended(self) -> bool:
        """Whether no token of text may come."""
        return self.finished or bool(self.fault)

    def write_mask(self, row: np.ndarray) -> None:
        """Writes uint32 [ceil(V / 32)]: a bit for each token, set where it is allowed.

        Of the tokens that may begin a forced text, only the first of `forced`: so a text is cut
        into the same tokens whether they are written in one pass or chosen one by one.
        """
        if forced := self.forced():
            row[:] = 0
            row[forced[0] // 32] = 1 << forced[0] % 32
            return
        self._compute()
        row[:] = self._texts
        if self._matcher.is_accepting():
            np.bitwise_or(row, self._vocabulary.ends, out=row)

    def accept(self, token: int) -> None:
        """Takes a token as the text's next one."""
        if self.finished or token in self._vocabulary.eos_ids:
            self.finished = True
            return
        self._is_new, self._forced = False, None
        self._matcher.consume_token(token)
        self._look()

    def forced(self) -> list[int]:
        """Ids that must come next; may be empty. Cut as the tokenizer cuts such a text."""
        if self.ended:
            return []
        if self._forced is None:
            self._forced = list(self._matcher.compute_ff_tokens())
        return self._forced

    def _look(self) -> None:
        """Sets `finished` and `fault`."""
        if self._matcher.is_error():
            self.fault = _first_line(self._matcher.get_error())
        elif self._matcher.is_stopped():
            self.finished = bool(self._matcher.is_accepting())
            self.fault = "" if self.finished else _NOTHING
        else:
            self._compute()

    def _compute(self) -> None:
        if self._is_new:
            return
        self._is_new = True
        self._matcher.unsafe_compute_mask_ptr(*self._place)
        np.bitwise_and(self._texts, self._vocabulary.texts, out=self._texts)
        if self._matcher.is_error():
            self.fault = _first_line(self._matcher.get_error())
        elif self._bytes == self._vocabulary.nothing:
            self.finished = bool(self._matcher.is_accepting())
            self.fault = "" if self.finished else "the vocabulary has no token that goes on from it"


def build_guide(
    tokenizer: Tokenizer | None,
    vocab_size: int,
    eos_ids: Sequence[int],
    options: GenerationOptions,
) -> Guide | None:
    """The guide that the options ask for; None where they ask for none.

    vocab_size: V, the model's rows. eos_ids: any of them may end a text, and none is in one.
    Raises UserError with the grammar's fault, and for a tokenizer whose tokens have no bytes.
    """
    name = next((n for n in CONSTRAINTS if getattr(options, n) is not None), "")
    if not name:
        return None
    if tokenizer is None:
        raise UserError(f"{name} needs a tokenizer, which this checkpoint lacks")
    grammar = _GRAMMARS[name](getattr(options, name))
    return _compiled(tokenizer, vocab_size, tuple(sorted(set(eos_ids))), name, grammar)


@functools.lru_cache(_CACHED_GUIDES)
def _compiled(
    tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...], name: str, grammar: str
) -> Guide:
    vocabulary = _read_vocabulary(tokenizer, vocab_size, eos_ids)
    matcher = vocabulary.matcher(grammar)
    if matcher.is_error():
        raise UserError(f"{name}: {_explain(vocabulary, name, grammar, matcher.get_error())}")
    guide = Guide(vocabulary, matcher)
    if fault := guide.start().fault:
        raise UserError(f"{name}: {fault}")
    return guide


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """A tokenizer in the library's form."""

    library: Any  # LLTokenizer
    end: int  # the library's own end token, past the model's rows
    eos_ids: frozenset[int]
    texts: np.ndarray  # uint32 [ceil(V / 32)]: tokens that stand for bytes
    ends: np.ndarray  # the same: tokens that end a text
    nothing: bytes  # of a mask without a token

    def matcher(self, grammar: str) -> Any:
        return _library().LLMatcher(self.library, grammar, log_level=0)


class _Tokens:
    """What the library reads a vocabulary from."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes]):
        self.tokens, self._tokenizer = tokens, tokenizer
        self.eos_token_id = len(tokens) - 1
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a text inside another one; of what the tokenizer cannot write, none."""
        if isinstance(text, bytes):
            text = text.decode(errors="ignore")
        try:
            return encode_inside(self._tokenizer, text)
        except UserError:
            return []


@functools.lru_cache(_CACHED_VOCABULARIES)
def _read_vocabulary(
    tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]
) -> _Vocabulary:
    """Control tokens, ends and rows that only fill up the model's table stand for nothing here."""
    llguidance = _library()
    join_freed_blocks()
    tokens = [b"" if 0xFF in text else text for text in tokenizer.token_bytes[:vocab_size]]
    tokens += [b""] * (vocab_size - len(tokens))
    for i in {*eos_ids, *tokenizer.control.values()}:
        if i < vocab_size:
            tokens[i] = b""
    texts, ends = np.zeros((2, -(-vocab_size // 32) * 32), bool)
    texts[:vocab_size] = [bool(text) for text in tokens]
    ends[list(eos_ids)] = True
    wrapper = llguidance.TokenizerWrapper(_Tokens(tokenizer, [*tokens, b"<end>"]))
    slices = [*_WORDS, *llguidance.LLTokenizer.general_slices()]
    return _Vocabulary(
        llguidance.LLTokenizer(wrapper, slices=slices),
        end=vocab_size,
        eos_ids=frozenset(eos_ids),
        texts=np.packbits(texts, bitorder="little").view(np.uint32),
        ends=np.packbits(ends, bitorder="little").view(np.uint32),
        nothing=bytes(len(texts) // 8),
    )


def _inexact_integer(schema: Any) -> int:
    """An integer in a schema that float64 may round, as the library does; 0 if there is none."""
    if isinstance(schema, int):
        return schema if abs(schema) > _EXACT else 0
    parts = schema.values() if isinstance(schema, dict) else schema
    if not isinstance(schema, dict | list | tuple):
        return 0
    return next(filter(None, map(_inexact_integer, parts)), 0)


# The library takes every year for a leap year, and a year 0000.
_BY_FOUR = "(?:0[48]|[2468][048]|[13579][26])"
_DATE = (
    "^(?:(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})-"
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|(?:[0-9]{{2}}{_BY_FOUR}|{_BY_FOUR}00)-02-29)"
)
_DATES = {"date": f"{_DATE}$", "date-time": _DATE}  # a format: what its texts match
_NAMED = {  # keywords whose values are schemas by name, and OpenAPI's
    *("properties", "patternProperties", "dependentSchemas", "dependencies"),
    *("$defs", "definitions", "schemas"),
}
_VALUES = {"const", "enum", "default", "examples"}  # keywords whose values are no schemas


def _with_exact_dates(schema: Any) -> Any:
    """The schema, whose dates are days of the calendar (RFC 3339) wherever it asks for dates."""
    if isinstance(schema, list | tuple):
        return [_with_exact_dates(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    exact = dict(schema)
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            exact[key] = {name: _with_exact_dates(part) for name, part in value.items()}
        elif key not in _VALUES:
            exact[key] = _with_exact_dates(value)
    named, others = exact.get("format"), exact.get("allOf", [])
    if isinstance(named, str) and named in _DATES and isinstance(others, list):
        exact["allOf"] = [*others, {"pattern": _DATES[named]}]
    return exact


def schema_term(schema: Mapping[str, Any]) -> str:
    """JSON by this schema, as a term of a grammar of the option `grammar`. Raises UserError."""
    own = schema.get("x-guidance", {})
    guidance = {**_JSON, **own} if isinstance(own, dict) else own
    return f"%json {_schema_text({**schema, 'x-guidance': guidance})}"


def _schema_grammar(schema: Any) -> str:
    from_json_schema = _library().LLMatcher.grammar_from_json_schema
    text = _schema_text(schema)
    try:
        return str(from_json_schema(text, _JSON))
    except ValueError as error:
        is_deep = "recursion limit exceeded" in str(error)
        raise UserError(_TOO_DEEP if is_deep else f"schema: {_first_line(str(error))}") from None


def _schema_text(schema: Any) -> str:
    """The schema in JSON, checked."""
    if isinstance(schema, str):
        check_characters(schema, "the schema")
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise UserError(f"schema: {schema!r:.80} is no JSON schema of any text: give an object")
        if too_large := _inexact_integer(schema):
            raise UserError(
                f"schema: {too_large} is no integer that JSON readers keep exactly: "
                f"use one of at most 2**53 = {_EXACT:,}, or a string"
            )
        return json.dumps(_with_exact_dates(schema), allow_nan=False)
    except UserError:  # which is a ValueError
        raise
    except RecursionError:
        raise UserError(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise UserError(f"schema: no JSON: {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"schema: {_first_line(str(error))}") from None


def _regex_grammar(regex: Any) -> str:
    if not isinstance(regex, str):
        raise UserError(f"regex: {regex!r:.80} must be a text")
    check_characters(regex, "the regular expression")
    return str(_library().LLMatcher.grammar_from_regex(regex))


def _choices_grammar(choices: Any) -> str:
    if isinstance(choices, str) or not choices:
        raise UserError(f"choices: {choices!r:.80} must be a list of one text or more")
    for choice in choices:
        if not isinstance(choice, str):
            raise UserError(f"choices: {choice!r:.80} must be a text")
        check_characters(choice, "a choice")
    return _regex_grammar("|".join(re.sub(r"[^\w]", _escaped, choice) for choice in choices))


def _escaped(match: re.Match[str]) -> str:
    return f"\\x{{{ord(match[0]):x}}}"


def _lark_grammar(grammar: Any) -> str:
    if not isinstance(grammar, str):
        raise UserError(f"grammar: {grammar!r:.80} must be a text")
    check_characters(grammar, "the grammar")
    return str(_library().LLMatcher.grammar_from_lark(grammar))


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError(
            "constrained output needs the package llguidance: pip install 'gptjax[guide]'"
        ) from None
    return llguidance


_GRAMMARS: dict[str, Callable[[Any], str]] = {  # an option's value: the library's grammar
    "schema": _schema_grammar,
    "regex": _regex_grammar,
    "choices": _choices_grammar,
    "grammar": _lark_grammar,
}


def _first_line(message: str) -> str:
    if message.startswith("NoExtension"):
        return _NOTHING
    return message.strip().splitlines()[0][:200] if message.strip() else "unknown fault"


def _explain(vocabulary: _Vocabulary, name: str, grammar: str, message: str) -> str:
    """The library's message, with the place of the fault."""
    if name == "schema":
        described = json.loads(grammar)["grammars"][0]["json_schema"]
        place = _place_of(vocabulary, described, message)
        return f"{_first_line(message)} (at {place or 'its root'})"
    message = re.sub(r"; following special tokens are available: .*", "", message)
    if name == "regex":  # the library wraps it in a grammar of one line, which nobody wrote
        error = re.search(r"regex parse error:\n(.*?)\nerror: (.*?)\n", message, re.DOTALL)
        if error:
            return f"{error[2]}\n{error[1]}"
        return _first_line(message.partition("(in regex): ")[2] or message)
    return "\n".join(f"{line:.200}" for line in message.strip().splitlines()[:5])


def _place_of(vocabulary: _Vocabulary, schema: Any, message: str, place: str = "") -> str:
    """The innermost part of a schema that has the same fault by itself, such as /properties/a."""
    parts = schema.items() if isinstance(schema, dict) else enumerate(schema)
    for key, part in parts:
        if not isinstance(part, dict | list) or key == "x-guidance":
            continue
        inside = f"{place}/{key}"
        if deeper := _place_of(vocabulary, part, message, inside):
            return deeper
        if isinstance(part, dict):
            matcher = _library().LLMatcher
            grammar = matcher.grammar_from_json_schema(json.dumps(part), _JSON)
            if vocabulary.matcher(grammar).get_error() == message:
                return inside
    return ""
