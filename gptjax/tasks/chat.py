"""Conversations of several turns through the checkpoint's chat template; only what the assistant says is learned, every turn of it.

A model is judged on the last answer, given all turns before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import TaskConfig
from gptjax.data.rows import Record
from gptjax.metrics import text as text_metrics
from gptjax.metrics.bootstrap import Metric, corpus_metric
from gptjax.tasks import summarization, translation
from gptjax.tasks.base import Answer, Example, Task, TokenBudget, copied, most_frequent
from gptjax.tokenizer import chat_template
from gptjax.tokenizer.base import Tokenizer


def messages_of(config: TaskConfig, row: Record) -> list[dict[str, str]]:
    """The row's messages, behind task.system where they bring no system message. Raises UserError for roles out of order."""
    found = row.fields.get(config.messages)
    if not isinstance(found, list) or not found:
        raise UserError(
            f"{row.where} has no messages under task.messages = {config.messages!r}; fields are {', '.join(map(str, row.fields))}"
        )
    messages, before = [dict(m) if isinstance(m, Mapping) else m for m in found], ""
    for i, message in enumerate(messages):
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise UserError(
                f"{row.where}: message {i} is {str(message)[:60]!r}: each is {{'role': ..., 'content': text}}"
            )
        role = message["role"]
        after = {
            "": ("system", "user"),
            "system": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("assistant", "tool"),
        }
        if role not in after.get(before, ()):
            place = f"after {before!r}" if before else "first"
            raise UserError(
                f"{row.where}: message {i} has role {role!r} {place}; roles go system (at most once, first), user, assistant, user, ..."
            )
        before = role
    if before != "assistant":
        raise UserError(
            f"{row.where}: the last message is the {before}'s, so its answer is missing: end with the assistant, or drop the row"
        )
    system = (
        [{"role": "system", "content": config.system}]
        if config.system and messages[0]["role"] != "system"
        else []
    )
    return system + messages


def example(
    config: TaskConfig, tokenizer: Tokenizer, row: Record, room: TokenBudget, labels: Sequence[str]
) -> Example | None:
    messages = whole = messages_of(config, row)
    while True:
        ids, learned, last = _join(chat_template.turns(tokenizer, messages))
        needed = room.lead + (last + room.answer if room.answer else len(ids)) - 1
        if needed <= room.length:
            break
        if room.policy == "drop":
            return None
        asks = [
            i for i, message in enumerate(messages) if message["role"] == "user"
        ]  # a turn begins with each of them
        from_end = (
            room.policy == "cut_end" and not room.answer
        )  # the last answer is what a model is asked for
        cut = (
            messages[: asks[-1]]
            if from_end
            else [*messages[: asks[0]], *messages[asks[1] if len(asks) > 1 else len(messages) :]]
        )
        if room.policy == "refuse" or len(asks) < 2:
            raise UserError(
                f"{row.where} needs {needed} tokens and a row holds {room.length}:\nraise data.length or model.context, "
                "or set task.truncation to drop, or to cut_start or cut_end, which leave out whole turns"
            )
        messages = cut
    lead = np.full(room.lead, tokenizer.eot, np.int32)
    answer = messages[-1]["content"]
    marks = np.concatenate([np.zeros(room.lead, bool), learned])
    return Example(
        row.where,
        np.concatenate([lead, ids]),
        marks,
        room.lead + last,
        (answer,),
        source=messages[-2]["content"],
        cut=messages is not whole,
        fields=row.fields,
    )


def _join(turns: Sequence[tuple[list[int], bool]]) -> tuple[np.ndarray, np.ndarray, int]:
    """(ids, learned, where the last learned span begins)."""
    ids = np.array([i for span, _ in turns for i in span], np.int32)
    learned = np.repeat([mark for _, mark in turns], [len(span) for span, _ in turns])
    starts = np.cumsum([0, *(len(span) for span, _ in turns)])
    return ids, learned, int(max(at for at, (_, mark) in zip(starts, turns, strict=False) if mark))


def judge(
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    answers: Sequence[Answer],
) -> dict[str, Metric]:
    """BLEU, chrF and ROUGE-L against the reference; distinct n-grams and repetition of what was written."""
    rouge, texts = (
        summarization.judge(config, labels, examples, answers)["rougeL"],
        [a.text for a in answers],
    )
    alone = {name: corpus_metric(value) for name, value in text_metrics.distinct(texts).items()}
    return {
        **translation.judge(config, labels, examples, answers),
        "rougeL": rouge,
        **alone,
        **text_metrics.diversity(texts),
    }


def _baselines(examples: Sequence[Example], train: Sequence[Example]) -> dict[str, list[Answer]]:
    return {**most_frequent(examples, train), **copied(examples, train)}


CHAT = Task(
    "", "", "bleu", judge, _baselines, "sacrebleu"
)  # as the field reports; chrF's recall rewards the copying of long turns
