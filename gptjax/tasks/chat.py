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
from gptjax.tasks.rendering import naming
from gptjax.tokenizer import chat_template
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.messages import from_share_gpt, texts_in

Message = dict[str, Any]

# Which roles may follow a role; "" is the start.
_NEXT_ROLES = {
    "": ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_ROW_VARIABLES = "chat_template_kwargs"  # TRL's name for what a row gives its chat template
_LOST_FIELDS = {
    "system": 'write it as the first message: {"role": "system", "content": ...}',
    "system_prompt": 'write it as the first message: {"role": "system", "content": ...}',
    "functions": 'this older form is now "tools"',
}


def messages_of(config: TaskConfig, row: Record) -> list[Message]:
    """The row's messages, behind task.system where they bring no system message.

    Raises UserError for roles out of order.
    """
    messages = row.value(config.messages, setting="task.messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"{row.where} has no messages under task.messages = {config.messages!r}; "
            f"fields are {', '.join(map(str, row.fields))}{_other_form(row.fields)}"
        )
    messages = [from_share_gpt(message, f"message {i}") for i, message in enumerate(messages)]
    previous = ""
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            text = str(dict(message) if isinstance(message, Mapping) else message)
            raise UserError(
                f"message {i} is {text[:60]!r}: each is {{'role': ..., 'content': text}}"
            )
        role = message["role"]
        if role not in _NEXT_ROLES.get(previous, ()):
            place = f"after {previous!r}" if previous else "first"
            raise UserError(
                f"message {i} has role {role!r} {place}; "
                "roles go system (at most once, first), user, assistant, user, ..."
            )
        previous = role
    if previous != "assistant":
        raise UserError(
            f"the last message is the {previous}'s, so its answer is missing: "
            "end with the assistant, or drop the row"
        )
    messages = [dict(message) for message in messages]
    if config.system and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": config.system})
    return messages


def _other_form(fields: Mapping[str, Any]) -> str:
    """Advice where the fields are those of another usual form of fine-tuning data."""
    if isinstance(fields.get("conversations"), list):
        return ":\nfor ShareGPT's conversations set --config.task.messages=conversations"
    if {"instruction", "output"} <= fields.keys():
        return (
            ":\nfor Alpaca's instructions set --config.task.name=text "
            "--config.task.prompt='{instruction}' --config.task.completion='{output}' "
            "--config.task.template=chat"
        )
    if isinstance(fields.get("messages"), list):
        return ":\nset --config.task.messages=messages"
    return ""


def variables_of(row: Record) -> dict[str, Any]:
    """What the row gives the template besides its messages: tools, and chat_template_kwargs.

    Raises UserError for a field that would be lost.
    """
    for name, advice in _LOST_FIELDS.items():
        if row.fields.get(name):
            raise UserError(f"its field {name!r} is not read: {advice}, or drop it")
    variables = row.fields.get(_ROW_VARIABLES) or {}
    if not isinstance(variables, Mapping):
        raise UserError(f"its {_ROW_VARIABLES} is no object")
    tools = row.fields.get("tools") or variables.get("tools")
    return {**variables, **({"tools": tools} if tools else {})}


def make_example(rendering: Rendering, row: Record) -> list[Example]:
    """All turns that fit; with a policy that cuts, the first or the last ones are left out.

    Several examples where the template rewrites earlier turns (`chat_template.split_texts`); in
    evaluation, that of the last answer. None where it is too long and dropped.
    """
    with naming(row):
        messages, variables = messages_of(rendering.config, row), variables_of(row)
        texts = chat_template.split_texts(rendering.tokenizer, messages, **variables)
        if not texts:
            raise UserError("every answer has weight 0: there is nothing to learn from")
        if rendering.budget.answer:
            texts = texts[-1:]
        examples = []
        for text in texts:
            visible = messages
            if len(texts) > 1 or rendering.budget.answer:
                visible = _learning_only(messages, text.answers)
            example = _make_one(rendering, row, visible, variables)
            examples += [example] if example else []
        return examples


def _learning_only(messages: list[Message], answers: Sequence[int]) -> list[Message]:
    """The messages through the last of the answers, of which only those are learned."""
    visible = []
    for i, message in enumerate(messages[: answers[-1] + 1]):
        is_other = message["role"] == "assistant" and i not in answers
        visible.append({**message, "weight": 0} if is_other else message)
    return visible


def _make_one(
    rendering: Rendering, row: Record, messages: list[Message], variables: dict[str, Any]
) -> Example | None:
    """The example of messages whose learned answers are one text. None where it is dropped."""
    budget, tokenizer = rendering.budget, rendering.tokenizer
    all_messages = messages
    while True:
        text = chat_template.split_texts(tokenizer, messages, **variables)[-1]
        turns = _join_turns(text.spans)
        tokens = turns.last_answer + budget.answer if budget.answer else len(turns.ids)
        needed = budget.lead + tokens - 1  # the last one is only a target
        if needed <= budget.length:
            break
        if budget.policy == "drop":
            return None
        # a learned answer must stay; in evaluation it is the last one, which the model writes
        from_end = budget.policy == "cut_end" and not budget.answer and len(text.answers) > 1
        shorter = _without_a_turn(messages, from_end=from_end)
        if budget.policy == "refuse" or not _has_answer(shorter):
            raise UserError(
                f"{row.where} needs {needed} tokens and a row holds {budget.length}:\n"
                "raise data.length or model.context, or set task.truncation to drop, "
                "or to cut_start or cut_end, which leave out complete turns"
            )
        messages = shorter
    lead_ids = np.full(budget.lead, tokenizer.eot, np.int32)
    last = messages[text.answers[-1]]
    answer = [span.ids for span in text.spans if span.learned][-1]
    return Example(
        row.where,
        ids=np.concatenate([lead_ids, turns.ids]),
        learned=np.concatenate([np.zeros(budget.lead, bool), turns.learned]),
        prompt=budget.lead + turns.last_answer,
        references=(_reference(tokenizer, last, answer),),
        source=_text_of(messages[text.answers[-1] - 1]),
        cut=messages is not all_messages,
        fields=row.fields,
    )


def _reference(tokenizer: Tokenizer, message: Message, answer: Sequence[int]) -> str:
    """What the model is to write: the content or, where the template writes more, all of it."""
    written = tokenizer.decode(answer[:-1])
    content = _text_of(message)
    return content if written.strip() == content.strip() else written.strip()


def _text_of(message: Message) -> str:
    return " ".join(texts_in(message.get("content")))


def _has_answer(messages: Sequence[Message]) -> bool:
    return any(m["role"] == "assistant" and m.get("weight", 1) for m in messages)


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
    with naming(row):
        return [_text_of(message) for message in messages_of(config, row)]


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
