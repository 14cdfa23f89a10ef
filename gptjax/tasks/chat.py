"""Conversations through the checkpoint's chat template: all that the assistant says is learned.

A model is evaluated on the last answer, given all turns before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import TaskConfig
from gptjax.data.records import Record
from gptjax.metrics import text as text_metrics
from gptjax.metrics.bootstrap import Metric, corpus_metric
from gptjax.tasks import summarization, translation
from gptjax.tasks.base import (
    Answer,
    Baselines,
    Example,
    Rendering,
    Task,
    copy_source,
    most_frequent,
)
from gptjax.tokenizer import chat_template

Message = dict[str, str]

# Which roles may follow a role; "" is the start.
_NEXT_ROLES = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def messages_of(config: TaskConfig, row: Record) -> list[Message]:
    """The row's messages, behind task.system where they bring no system message.

    Raises UserError for roles out of order.
    """
    messages = row.value(config.messages, setting="task.messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{row.where} has no messages under task.messages = {config.messages!r}; "
            f"fields are {', '.join(map(str, row.fields))}"
        )
    previous = ""
    for i, message in enumerate(messages):
        if not _is_message(message):
            text = str(dict(message) if isinstance(message, Mapping) else message)
            raise UserError(
                f"{row.where}: message {i} is {text[:60]!r}: "
                "each is {'role': ..., 'content': text}"
            )
        role = message["role"]
        if role not in _NEXT_ROLES.get(previous, ()):
            place = f"after {previous!r}" if previous else "first"
            raise UserError(
                f"{row.where}: message {i} has role {role!r} {place}; "
                "roles go system (at most once, first), user, assistant, user, ..."
            )
        previous = role
    if previous != "assistant":
        raise UserError(
            f"{row.where}: the last message is the {previous}'s, so its answer is missing: "
            "end with the assistant, or drop the row"
        )
    messages = [dict(message) for message in messages]
    if config.system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system})
    return messages


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )


def make_example(rendering: Rendering, row: Record) -> Example | None:
    """All turns that fit; with a policy that cuts, the first or the last ones are left out."""
    budget = rendering.budget
    all_messages = messages = messages_of(rendering.config, row)
    while True:
        turns = _join_turns(chat_template.split_turns(rendering.tokenizer, messages))
        tokens = turns.last_answer + budget.answer if budget.answer else len(turns.ids)
        needed = budget.lead + tokens - 1  # the last one is only a target
        if needed <= budget.length:
            break
        if budget.policy == "drop":
            return None
        # in evaluation the last answer must stay: the model writes it
        from_end = budget.policy == "cut_end" and not budget.answer
        shorter = _without_a_turn(messages, from_end=from_end)
        if budget.policy == "refuse" or not shorter:
            raise UserError(
                f"{row.where} needs {needed} tokens and a row holds {budget.length}:\n"
                "raise data.length or model.context, or set task.truncation to drop, "
                "or to cut_start or cut_end, which leave out complete turns"
            )
        messages = shorter
    lead_ids = np.full(budget.lead, rendering.tokenizer.eot, np.int32)
    return Example(
        row.where,
        ids=np.concatenate([lead_ids, turns.ids]),
        learned=np.concatenate([np.zeros(budget.lead, bool), turns.learned]),
        prompt=budget.lead + turns.last_answer,
        references=(messages[-1]["content"],),
        source=messages[-2]["content"],
        cut=messages is not all_messages,
        fields=row.fields,
    )


def _without_a_turn(messages: list[Message], *, from_end: bool) -> list[Message]:
    """The messages without their first (or last) turn; none where there is but one.

    A turn begins with each message of the user. What comes before the first one stays.
    """
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if len(starts) < 2:
        return []
    if from_end:
        return messages[: starts[-1]]
    return messages[: starts[0]] + messages[starts[1] :]


class _Turns(NamedTuple):
    ids: np.ndarray  # int32 [n]
    learned: np.ndarray  # bool [n]
    last_answer: int  # where the last learned span begins


def _join_turns(turns: Sequence[tuple[list[int], bool]]) -> _Turns:
    ids: list[int] = []
    learned: list[bool] = []
    last_answer = 0
    for span, is_learned in turns:
        if is_learned:
            last_answer = len(ids)
        ids += span
        learned += [is_learned] * len(span)
    return _Turns(np.array(ids, np.int32), np.array(learned, bool), last_answer)


def _texts(config: TaskConfig, row: Record) -> list[str]:
    return [message["content"] for message in messages_of(config, row)]


def evaluate(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    """BLEU, chrF, ROUGE-L against the reference; distinct n-grams and repetition of answers."""
    texts = [answer.text for answer in answers]
    rouge = summarization.evaluate(config, labels, examples, answers)
    metrics = translation.evaluate(config, labels, examples, answers)
    metrics["rougeL"] = rouge["rougeL"]
    for name, value in text_metrics.distinct(texts).items():
        metrics[name] = corpus_metric(value)
    return metrics | text_metrics.diversity(texts)


def _baselines(examples: Sequence[Example], train: Sequence[Example]) -> Baselines:
    return most_frequent(examples, train) | copy_source(examples, train)


CHAT = Task(
    make_example,
    evaluate,
    headline="bleu",  # as the field reports; chrF's recall rewards the copying of long turns
    chat=True,
    texts=_texts,
    baselines=_baselines,
    package="sacrebleu",
)
