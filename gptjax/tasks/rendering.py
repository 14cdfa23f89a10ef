"""Templates to ids: a row's fields in braces become a prompt and what is learned after it.

Prompt and answer are encoded apart, as they are when the model answers.
"""

from __future__ import annotations

import contextlib
import math
import string
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import TaskConfig
from gptjax.data.records import Record
from gptjax.tasks.base import Example, Rendering
from gptjax.tokenizer import chat_template
from gptjax.tokenizer.base import Tokenizer

_ATTEMPTS = 8  # a text that is cut at a token can have more tokens than were left: cut again


@contextlib.contextmanager
def naming(row: Record) -> Iterator[None]:
    """Puts the row's place before the message of a UserError in the block."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(row.where):
            raise
        raise UserError(f"{row.where}: {error}") from None


def names_in(template: str, setting: str) -> list[str]:
    """Names of the fields in a template's braces. Raises UserError for more than a name there."""
    advice = "write {{ and }} for braces in the text"
    names = []
    try:
        for _, name, spec, conversion in string.Formatter().parse(template):
            if name is None:  # text without a field behind it
                continue
            names.append((name, name.isidentifier() and not spec and not conversion))
    except ValueError as error:
        raise UserError(f"{setting} = {template!r}: {error}; {advice}") from None
    for name, is_plain in names:
        if not is_plain:
            raise UserError(f"{setting} = {template!r}: {{{name}}} is no name of a field; {advice}")
    return [name for name, _ in names]


def fill_template(
    template: str, row: Record, setting: str, replacements: Mapping[str, str] = {}
) -> str:
    """The template with the row's fields, numbers as they print. `replacements` go before fields.

    Raises UserError where a field is missing or no text.
    """
    values = {}
    for name in names_in(template, setting):
        value = replacements.get(name, row.fields.get(name))
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{row.where}: {setting} has {{{name}}}, which is {value} there")
        if isinstance(value, int | float):
            values[name] = str(value)
        elif name in replacements:
            values[name] = replacements[name]
        else:
            values[name] = row.text(name, setting=setting)
    return template.format_map(values)


def template_texts(config: TaskConfig, row: Record, *, has_head: bool) -> list[str]:
    """The row's prompt and completion as one text. A head has no completion."""
    completion = fill_template(config.completion, row, "task.completion")
    prompt = fill_template(config.prompt, row, "task.prompt")
    return [prompt if has_head else prompt + completion]


def prompt_ids(config: TaskConfig, tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a prompt: through the chat template, or plain behind the vocabulary's prefix."""
    if config.template == "chat":
        messages = [{"role": "user", "content": text}]
        if config.system:
            messages.insert(0, {"role": "system", "content": config.system})
        return chat_template.encode(tokenizer, messages)
    # an empty prompt is the start of a document
    return [*tokenizer.bos_ids, *tokenizer.encode(text)] or [tokenizer.eot]


def end_of_answer(config: TaskConfig, tokenizer: Tokenizer) -> int:
    """The id that closes what a model writes: the chat template's, where that makes the prompt."""
    if config.template == "chat":
        return chat_template.answer_end(tokenizer)
    return tokenizer.eos_ids[0]


def completion_example(
    rendering: Rendering,
    row: Record,
    *,
    references: Sequence[str],
    answer: str = "",
    allow_empty: bool = False,
    longest_answer: int = 0,
) -> Example | None:
    """A prompt, then a text that is learned with its end; None where it is too long and dropped.

    answer: the text; by default that of the completion's template. allow_empty: where an empty
    answer says something. longest_answer: tokens of the longest answer that the same prompt gets,
    so that its prompt is cut alike. Raises UserError.
    """
    config, tokenizer, budget = rendering.config, rendering.tokenizer, rendering.budget
    text = answer or fill_template(config.completion, row, "task.completion")
    if not text.strip():
        if not allow_empty:
            raise UserError(
                f"{row.where}: the completion is empty, so there is nothing to learn from: "
                "fill the field or drop the row"
            )
        text = ""
    if config.template == "chat":
        text = text.strip()
    completion = [*tokenizer.encode(text), end_of_answer(config, tokenizer)]
    answer_tokens = budget.answer or max(len(completion), longest_answer)
    prompt, cut = _fit_prompt(rendering, row, answer_tokens - 1)  # the last one is only a target
    if not prompt:
        return None
    ids = np.asarray([*prompt, *completion], np.int32)
    return Example(
        row.where,
        ids,
        learned=np.arange(len(ids)) >= len(prompt),
        prompt=len(prompt),
        references=tuple(references),
        source=_source_text(config, row),
        cut=cut,
        fields=row.fields,
    )


def head_example(
    rendering: Rendering, row: Record, *, label: float, reference: str
) -> Example | None:
    """A prompt for a head on its last token; None where it is too long and dropped."""
    prompt, cut = _fit_prompt(rendering, row, 0)
    if not prompt:
        return None
    ids = np.asarray(prompt, np.int32)
    return Example(
        row.where,
        ids,
        learned=np.zeros(len(ids), bool),
        prompt=len(ids),
        references=(reference,),
        label=label,
        source=_source_text(rendering.config, row),
        cut=cut,
        fields=row.fields,
    )


def _source_text(config: TaskConfig, row: Record) -> str:
    """The prompt's first field: what a baseline copies or takes the first sentence of."""
    names = names_in(config.prompt, "task.prompt")
    return fill_template("{" + names[0] + "}", row, "task.prompt") if names else ""


def _fit_prompt(rendering: Rendering, row: Record, answer_tokens: int) -> tuple[list[int], bool]:
    """(ids of the prompt, whether it was cut), so that `answer_tokens` more fit in a row.

    The longest field is what is cut. No ids where the example is to be dropped.
    """
    config, tokenizer, budget = rendering.config, rendering.tokenizer, rendering.budget
    shortened: dict[str, str] = {}
    for _ in range(_ATTEMPTS):
        text = fill_template(config.prompt, row, "task.prompt", shortened)
        with naming(row):  # the chat template may refuse it
            ids = [tokenizer.eot] * budget.lead + prompt_ids(config, tokenizer, text)
        excess = len(ids) + answer_tokens - budget.length
        if excess <= 0:
            return ids, bool(shortened)
        if budget.policy == "drop":
            return [], False
        name, field_text = _longest_field(config, row, shortened)
        field_ids = tokenizer.encode(field_text) if name else []
        if budget.policy == "refuse" or len(field_ids) <= excess:
            raise UserError(_too_long(rendering, row, len(ids) + answer_tokens))
        rest = field_ids[excess:] if budget.policy == "cut_start" else field_ids[:-excess]
        # a character that was cut through is dropped: U+FFFD would take as many tokens again
        shortened[name] = tokenizer.decode_bytes(rest).decode(errors="ignore").strip()
    raise UserError(
        f"{row.where} could not be cut to {budget.length} tokens: raise data.length, "
        "or set task.truncation = 'drop'"
    )


def _longest_field(
    config: TaskConfig, row: Record, shortened: Mapping[str, str]
) -> tuple[str, str]:
    """(name, text) of the prompt's longest field; empty where it has no fields."""
    longest = ("", "")
    for name in names_in(config.prompt, "task.prompt"):
        text = fill_template("{" + name + "}", row, "task.prompt", shortened)
        if not longest[0] or len(text) > len(longest[1]):
            longest = (name, text)
    return longest


def _too_long(rendering: Rendering, row: Record, tokens: int) -> str:
    if rendering.budget.policy == "refuse":
        fix = "to drop, cut_start or cut_end"
    else:
        fix = "= 'drop': there is not enough of a prompt to cut"
    return (
        f"{row.where} needs {tokens} tokens and a row holds {rendering.budget.length}:\n"
        f"raise data.length or model.context, or set task.truncation {fix}"
    )
