"""From a row to an example: ids, which of them are learned, and what an answer is compared with.

Ids and loss weights come from the same spans, so neither depends on what an id is: the end of an answer is learned also where it is the id
that elsewhere fills up. Prompt and answer are encoded apart, as they are when the model answers.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import TaskConfig
from gptjax.data.rows import Record
from gptjax.metrics.bootstrap import Metric
from gptjax.tokenizer import chat_template
from gptjax.tokenizer.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """ids [n] int32 with learned [n] bool; the first `prompt` ids are what the model is given when it answers. references: right answers as
    text; label: class or number; source: text of the prompt's first field; cut: whether it was too long; parts: lengths of
    several texts that `ids` holds one behind the other; fields: the row's."""

    where: str
    ids: np.ndarray
    learned: np.ndarray
    prompt: int
    references: tuple[str, ...] = ()
    label: float | None = None
    source: str = ""
    cut: bool = False
    parts: tuple[int, ...] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's: text, or a class with the probabilities of all, or a number. ids: what it wrote."""

    text: str = ""
    value: float = 0.0
    probabilities: tuple[float, ...] = ()
    ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: its templates, how answers are judged, and answers that need no model. headline: the metric that a table shows first."""

    prompt: str
    completion: str
    headline: str
    judge: Callable[
        [TaskConfig, Sequence[str], Sequence[Example], Sequence[Answer]], dict[str, Metric]
    ]
    baselines: Callable[[Sequence[Example], Sequence[Example]], dict[str, list[Answer]]]
    package: str = ""  # that judging needs

    def check_package(self) -> None:
        """Raises UserError where judging would fail in the end."""
        if self.package and importlib.util.find_spec(self.package) is None:
            raise UserError(
                f"answers are judged with the package {self.package}: pip install 'gptjax[eval]' (or train with task.eval_samples = 0)"
            )


def no_baseline(examples: Sequence[Example], train: Sequence[Example]) -> dict[str, list[Answer]]:
    return {}


def most_frequent(examples: Sequence[Example], train: Sequence[Example]) -> dict[str, list[Answer]]:
    """The answer that is right most often in the training split."""
    text, _ = collections.Counter(
        e.references[0] if e.references else "" for e in train
    ).most_common(1)[0]
    return {"most frequent answer": [Answer(text)] * len(examples)}


def copied(examples: Sequence[Example], train: Sequence[Example]) -> dict[str, list[Answer]]:
    """The prompt's first field back."""
    return {"copy": [Answer(e.source) for e in examples]}


@dataclasses.dataclass(frozen=True)
class TokenBudget:
    """How much fits: `length` positions of a row, of which an example's ids take one less where the last is only a target."""

    length: int
    policy: str  # task.truncation
    lead: int = 0  # lora.prompt_tokens: places before every example
    answer: int = 0  # where a model is asked: places left for what it writes, however long the right answer is


def names_in(template: str, knob: str) -> list[str]:
    """Names of the fields in a template's braces. Raises UserError for braces that are more than a name."""
    try:
        parts = [
            (name, spec, conversion)
            for _, name, spec, conversion in string.Formatter().parse(template)
            if name is not None
        ]
    except ValueError as error:
        raise UserError(
            f"{knob} = {template!r}: {error}; write {{{{ and }}}} for braces in the text"
        ) from None
    if bad := [
        name for name, spec, conversion in parts if not name.isidentifier() or spec or conversion
    ]:
        raise UserError(
            f"{knob} = {template!r}: {{{bad[0]}}} is no name of a field; write {{{{ and }}}} for braces in the text"
        )
    return [name for name, _, _ in parts]


def fill_template(template: str, row: Record, knob: str, changed: Mapping[str, str] = {}) -> str:
    """The template with the row's fields, numbers as they print. `changed` stands in for some of them."""
    values = {}
    for name in names_in(template, knob):
        value = changed.get(name, row.fields.get(name))
        values[name] = (
            str(value)
            if isinstance(value, int | float)
            else changed[name]
            if name in changed
            else row.text(name, knob=knob)
        )
    return template.format_map(values)


def fields_in_order(config: TaskConfig, tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a prompt as the model sees it: plain behind the vocabulary's prefix (or the start of a document), or through the chat template."""
    if config.template == "chat":
        system = [{"role": "system", "content": config.system}] * bool(config.system)
        return chat_template.encode(tokenizer, [*system, {"role": "user", "content": text}])
    return [*tokenizer.prefix, *tokenizer.encode(text)] or [tokenizer.eot]


def completion(
    config: TaskConfig,
    kind: Task,
    tokenizer: Tokenizer,
    row: Record,
    room: TokenBudget,
    *,
    references: Sequence[str],
    answer: str = "",
    empty: bool = False,
    room_for: int = 0,
) -> Example | None:
    """Prompt, then the answer (default: the completion's template), learned with its end; an answer may be `empty` where that says something.
    room_for: tokens of the longest answer that the same prompt gets. None where it is too long and the policy is to drop it. Raises UserError."""
    text = answer or fill_template(config.completion or kind.completion, row, "task.completion")
    if empty and not text.strip():
        text = ""
    elif not text.strip():
        raise UserError(
            f"{row.where}: the completion is empty, so there is nothing to learn from: fill the field or drop the row"
        )
    text = text.strip() if config.template == "chat" else text
    tail = [*tokenizer.encode(text), tokenizer.ends[0]]
    head, cut = _fitting(
        config, kind, tokenizer, row, room, (room.answer or max(len(tail), room_for)) - 1
    )
    if not head:
        return None
    ids = np.asarray([*head, *tail], np.int32)
    source = source_of(config, kind, row)
    return Example(
        row.where,
        ids,
        np.arange(len(ids)) >= len(head),
        len(head),
        tuple(references),
        source=source,
        cut=cut,
        fields=row.fields,
    )


def prompt_only(
    config: TaskConfig,
    kind: Task,
    tokenizer: Tokenizer,
    row: Record,
    room: TokenBudget,
    *,
    label: float,
    reference: str,
) -> Example | None:
    """A text for a head on its last token."""
    head, cut = _fitting(config, kind, tokenizer, row, room, 0)
    if not head:
        return None
    ids = np.asarray(head, np.int32)
    return Example(
        row.where,
        ids,
        np.zeros(len(ids), bool),
        len(ids),
        (reference,),
        label,
        source_of(config, kind, row),
        cut,
        fields=row.fields,
    )


def source_of(config: TaskConfig, kind: Task, row: Record) -> str:
    """Text of the prompt's first field: what a baseline copies or takes the first sentence of."""
    names = names_in(config.prompt or kind.prompt, "task.prompt")
    return fill_template("{" + names[0] + "}", row, "task.prompt") if names else ""


def _fitting(
    config: TaskConfig, kind: Task, tokenizer: Tokenizer, row: Record, room: TokenBudget, rest: int
) -> tuple[list[int], bool]:
    """(ids of the prompt, at most room.length - rest of them, whether it was cut); no ids where it is dropped. The longest field is what is cut."""
    template = config.prompt or kind.prompt
    changed: dict[str, str] = {}
    lead = [tokenizer.eot] * room.lead
    for _ in range(8):  # cutting at a token can make more tokens of what is left, so look again
        ids = [
            *lead,
            *fields_in_order(
                config, tokenizer, fill_template(template, row, "task.prompt", changed)
            ),
        ]
        over = len(ids) + rest - room.length
        if over <= 0:
            return ids, bool(changed)
        if room.policy == "drop":
            return [], False
        names = names_in(template, "task.prompt")
        texts = {
            name: fill_template("{" + name + "}", row, "task.prompt", changed) for name in names
        }
        longest = max(texts, key=lambda name: len(texts[name]), default="")
        parts = tokenizer.encode(texts[longest]) if longest else []
        if room.policy == "refuse" or len(parts) <= over:
            cure = (
                "to drop, cut_start or cut_end"
                if room.policy == "refuse"
                else "= 'drop': there is not enough of a prompt to cut"
            )
            raise UserError(
                f"{row.where} needs {len(ids) + rest} tokens and a row holds {room.length}:\nraise data.length or model.context, "
                f"or set task.truncation {cure}"
            )
        kept = tokenizer.decode_bytes(parts[over:] if room.policy == "cut_start" else parts[:-over])
        changed[longest] = kept.decode(
            errors="ignore"
        ).strip()  # a cut through a character drops it: U+FFFD would take as many tokens again
    raise UserError(
        f"{row.where} could not be cut to {room.length} tokens: raise data.length, or set task.truncation = 'drop'"
    )
