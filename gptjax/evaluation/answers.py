"""TODO docstring."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import TaskConfig
from gptjax.core import cli
from gptjax.generation.language_model import LanguageModel
from gptjax.tasks import classification, qa
from gptjax.tasks.base import Answer, Example
from gptjax.tokenizer.base import Tokenizer

_BATCH = 16  # texts that are written at once


def answer_examples(
    lm: LanguageModel, config: TaskConfig, labels: Sequence[str], examples: Sequence[Example]
) -> list[Answer]:
    """The model's answers: what its head says, the likeliest label, or greedy (or beam-searched) text. Raises UserError where it lacks the head."""
    if config.name == "preference":
        return _by_preference(lm, examples)
    prompts = [e.ids[: e.prompt].tolist() for e in examples]
    with cli.progress("examples answered", len(examples)) as advance:
        if labels and config.method == "head":
            return _by_head(lm, labels, prompts, advance)
        if labels:
            return _by_likelihood(lm, config, labels, prompts, advance)
        found = _by_writing(lm, config, prompts, advance)
    return qa.extracted(examples, found) if config.name == "qa" and config.extract else found


def _by_head(
    lm: LanguageModel,
    labels: Sequence[str],
    prompts: list[list[int]],
    advance: Callable[[int], None],
) -> list[Answer]:
    names = lm.config.labels
    if not names or (len(names) == 1) != (len(labels) == 1):
        raise UserError(f"the checkpoint has no head for {', '.join(labels)}: fine-tune it first")
    if (
        len(labels) > 1
        and set(names) != set(labels)
        and names != tuple(f"LABEL_{i}" for i in range(len(labels)))
    ):  # Hugging Face's for unnamed ones
        raise UserError(
            f"the checkpoint tells {', '.join(names)} apart and the task {', '.join(labels)}: set task.labels and the data to one of them"
        )
    found = lm.classify(prompts)
    advance(len(prompts))
    if len(labels) == 1:
        return [Answer(value=float(row[0])) for row in found]
    found = found[:, [names.index(name) for name in labels]] if set(names) == set(labels) else found
    return [
        Answer(labels[int(row.argmax())], float(row.argmax()), tuple(map(float, row)))
        for row in found
    ]


def _by_likelihood(
    lm: LanguageModel,
    config: TaskConfig,
    labels: Sequence[str],
    prompts: list[list[int]],
    advance: Callable[[int], None],
) -> list[Answer]:
    """The label whose text with its end is likeliest after the prompt."""
    words, found = label_ids(lm, config, labels), []
    for i in range(0, len(prompts), _BATCH):
        part = prompts[i : i + _BATCH]
        scored = lm.score([p for p in part for _ in words], [w for _ in part for w in words])
        logits = np.array([score for score, _ in scored]).reshape(len(part), len(words))
        odds = np.exp(logits - logits.max(1, keepdims=True))
        for row in odds / odds.sum(1, keepdims=True):
            found.append(
                Answer(labels[int(row.argmax())], float(row.argmax()), tuple(map(float, row)))
            )
        advance(len(part))
    return found


def label_ids(lm: LanguageModel, config: TaskConfig, labels: Sequence[str]) -> list[list[int]]:
    """Each label as a model writes it, with its end."""
    tokenizer, lead = lm.text_tokenizer, " " * (config.template == "plain")
    return [
        [*tokenizer.encode(lead + word), tokenizer.ends[0]]
        for word in classification.words_of(config, labels)
    ]


def _by_preference(lm: LanguageModel, examples: Sequence[Example]) -> list[Answer]:
    """1 where the chosen answer is likelier than the rejected one, per token."""
    parts = [
        slice(at, at + size)
        for e in examples
        for at, size in ((0, e.parts[0]), (e.parts[0], e.parts[1]))
    ]
    owners = [e for e in examples for _ in range(2)]
    found = lm.token_logprobs([e.ids[part].tolist() for e, part in zip(owners, parts, strict=True)])
    means = [
        float(logprobs[e.learned[part][1:]].mean())
        for e, part, (logprobs, _) in zip(owners, parts, found, strict=True)
    ]
    return [
        Answer(value=float(chosen > rejected))
        for chosen, rejected in zip(means[::2], means[1::2], strict=True)
    ]


def _by_writing(
    lm: LanguageModel, config: TaskConfig, prompts: list[list[int]], advance: Callable[[int], None]
) -> list[Answer]:
    """Batches of prompts of similar length. What an answer may have depends on its own prompt, not on what is beside it."""
    result: list[Any] = [None] * len(prompts)
    rooms = [max(min(config.max_new_tokens, lm.config.context + 1 - len(p)), 1) for p in prompts]
    if short := sum(room < config.max_new_tokens for room in rooms):
        cli.say(
            f"{short:,} prompts leave room for less than task.max_new_tokens = {config.max_new_tokens}, so their answers may be cut"
        )
    for room, members in itertools.groupby(
        sorted(range(len(prompts)), key=lambda i: len(prompts[i])), key=lambda i: rooms[i]
    ):
        same = list(members)
        for group in (same[first : first + _BATCH] for first in range(0, len(same), _BATCH)):
            found = lm.generate(
                [prompts[i] for i in group],
                max_new_tokens=room,
                num_beams=config.num_beams,
                stop=config.stop,
            )
            for i, one in zip(group, found, strict=True):
                result[i] = Answer(one.text.strip(), ids=tuple(one.tokens))
            advance(len(group))
    return result


def format_answer(
    tokenizer: Tokenizer, labels: Sequence[str], example: Example, found: Answer
) -> str:
    """An example and its answer, to read."""
    given = tokenizer.decode(example.ids[: example.prompt].tolist())
    text = found.text or (f"{found.value:.4g}" if not found.ids else "")
    return f"[{example.where}]\n{given[-500:]}\n-> {text}\n   ({' | '.join(example.references)})"


def record(example: Example, found: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    """One line of predictions."""
    row: dict[str, Any] = {
        "where": example.where,
        "prompt": tokenizer.decode(example.ids[: example.prompt].tolist()),
        "references": example.references,
    }
    row |= {"prediction": found.text} if found.text or not found.probabilities else {}
    if example.label is not None or not (found.text or found.ids):
        row |= {
            "value": found.value,
            "label": example.label,
            "probabilities": [round(p, 6) for p in found.probabilities],
        }
    return row
