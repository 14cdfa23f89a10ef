"""A model's answers to examples: by its head, by likelihood, by preference or by writing.

In: a `LanguageModel`, a task's config and rendered examples. Out: an `Answer` for each of them.
`Task.answered_by` names a row of ANSWERED_BY.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import ModelConfig, TaskConfig
from gptjax.core import cli
from gptjax.generation.language_model import LanguageModel
from gptjax.generation.meshes import groups
from gptjax.tasks import classification, multi_label
from gptjax.tasks.base import Answer, Example, Task
from gptjax.tasks.rendering import end_of_answer
from gptjax.tasks.table import task_of
from gptjax.tokenizer.base import Tokenizer

_BATCH = 16  # texts that are written at once, by each group of devices
_SHOWN_CHARACTERS = 500  # of a prompt, in the samples of a run

Advance = Callable[[int], None]


def answer_examples(
    lm: LanguageModel, config: TaskConfig, labels: Sequence[str], examples: Sequence[Example]
) -> list[Answer]:
    """The model's answers, one an example.

    They are what its head says, the likeliest label, or greedy (or beam-searched) text. Raises
    UserError where it lacks the head.
    """
    task = task_of(config)
    answer = ANSWERED_BY[task.answered_by(config)]
    with cli.progress("examples answered", len(examples)) as advance:
        answers = answer(lm, config, labels, examples, advance)
    return task.postprocess(config, examples, answers)


def _prompts(examples: Sequence[Example]) -> list[list[int]]:
    return [example.ids[: example.prompt].tolist() for example in examples]


def _answer_by_head(
    lm: LanguageModel,
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    advance: Advance,
) -> list[Answer]:
    """The likeliest class, or all that are likelier than not, or the number.

    Probabilities are in the order of `labels`.
    """
    _check_head(lm.config, task_of(config), labels)
    end = lm.classified_end
    outputs = lm.classify([[*ids, *end] for ids in _prompts(examples)])
    advance(len(examples))
    if lm.config.problem == "regression":
        return [Answer(value=float(row[0])) for row in outputs]
    names = lm.config.labels
    if set(names) == set(labels):
        outputs = outputs[:, [names.index(label) for label in labels]]
    if lm.config.problem == "multi_label_classification":
        return [multi_label.answer_of(row, labels) for row in outputs]
    return [_likeliest(row, labels) for row in outputs]


# {what a checkpoint's head gives: the task that evaluates it}
_TASK_OF_PROBLEM = {
    "single_label_classification": "classification",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}


def _check_head(model: ModelConfig, task: Task, labels: Sequence[str]) -> None:
    """Raises UserError where the checkpoint's head does not tell the task's labels apart."""
    names = model.labels
    if not names:
        raise UserError(f"the checkpoint has no head for {', '.join(labels)}: fine-tune it first")
    if model.problem != task.problem:
        raise UserError(
            f"the checkpoint's head is for {model.problem} and the task for {task.problem}: "
            f"evaluate it with task.name = {_TASK_OF_PROBLEM[model.problem]!r}, or fine-tune it"
        )
    is_number = model.problem == "regression"
    if is_number and len(names) > 1:
        raise UserError(
            f"the checkpoint gives {len(names)} numbers ({', '.join(names)}) and the task compares "
            "one: use classify"
        )
    # Hugging Face's names for unnamed classes
    unnamed = tuple(f"LABEL_{i}" for i in range(len(labels)))
    if not is_number and set(names) != set(labels) and names != unnamed:
        raise UserError(
            f"the checkpoint tells {', '.join(names)} apart and the task {', '.join(labels)}: "
            "set task.labels and the data to one of them"
        )


def _likeliest(probabilities: np.ndarray, labels: Sequence[str]) -> Answer:
    """The class of the highest of its probabilities [C]."""
    best = int(probabilities.argmax())
    return Answer(labels[best], float(best), tuple(map(float, probabilities)))


def _answer_by_likelihood(
    lm: LanguageModel,
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    advance: Advance,
) -> list[Answer]:
    """The label whose text with its end is likeliest after the prompt."""
    prompts, words = _prompts(examples), label_ids(lm, config, labels)
    size = _BATCH * groups(lm.mesh)
    answers = []
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        repeated_prompts = [prompt for prompt in batch for _ in words]
        scores = lm.score(repeated_prompts, words * len(batch))
        logprobs = np.array([logprob for logprob, _ in scores]).reshape(len(batch), len(words))
        odds = np.exp(logprobs - logprobs.max(1, keepdims=True))
        for probabilities in odds / odds.sum(1, keepdims=True):
            answers.append(_likeliest(probabilities, labels))
        advance(len(batch))
    return answers


def label_ids(lm: LanguageModel, config: TaskConfig, labels: Sequence[str]) -> list[list[int]]:
    """Each label as a model writes it, with its end."""
    tokenizer = lm.text_tokenizer
    space = " " if config.template == "plain" else ""
    return [
        [*tokenizer.encode(space + word), end_of_answer(config, tokenizer)]
        for word in classification.label_words(config, labels)
    ]


def _answer_by_preference(
    lm: LanguageModel,
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    advance: Advance,
) -> list[Answer]:
    """1 where the chosen answer is likelier than the rejected one, per token."""
    texts, learned = [], []
    for example in examples:
        chosen_length, rejected_length = example.parts[:2]
        end = chosen_length + rejected_length
        for part in (slice(0, chosen_length), slice(chosen_length, end)):
            texts.append(example.ids[part].tolist())
            learned.append(example.learned[part])
    means = []
    for (logprobs, _), mask in zip(lm.token_logprobs(texts), learned, strict=True):
        means.append(float(logprobs[mask[1:]].mean()))
    advance(len(examples))
    return [
        Answer(value=float(chosen > rejected))
        for chosen, rejected in zip(means[::2], means[1::2], strict=True)
    ]


def _answer_by_writing(
    lm: LanguageModel,
    config: TaskConfig,
    labels: Sequence[str],
    examples: Sequence[Example],
    advance: Advance,
) -> list[Answer]:
    """Texts, written in batches of prompts of similar length.

    The limit of an answer depends on its own prompt, not on the others of the batch.
    """
    prompts = _prompts(examples)
    limits = []
    for prompt in prompts:
        places = lm.config.context + 1 - len(prompt)  # the last token is never fed back
        limits.append(max(min(config.max_new_tokens, places), 1))
    short = sum(limit < config.max_new_tokens for limit in limits)
    if short:
        cli.say(
            f"{short:,} prompts leave space for less than task.max_new_tokens = "
            f"{config.max_new_tokens}, so their answers may be cut"
        )
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    members_of: dict[int, list[int]] = {}
    for i in by_length:
        members_of.setdefault(limits[i], []).append(i)
    answers: list[Any] = [None] * len(prompts)
    size = _BATCH * groups(lm.mesh)
    for limit, members in members_of.items():
        for first in range(0, len(members), size):
            batch = members[first : first + size]
            completions = lm.generate(
                [prompts[i] for i in batch],
                max_new_tokens=limit,
                num_beams=config.num_beams,
                stop=config.stop,
                regex=config.regex or None,
            )
            for i, completion in zip(batch, completions, strict=True):
                answers[i] = Answer(completion.text.strip(), ids=tuple(completion.tokens))
            advance(len(batch))
    return answers


ANSWERED_BY = {
    "head": _answer_by_head,
    "likelihood": _answer_by_likelihood,
    "preference": _answer_by_preference,
    "writing": _answer_by_writing,
}


def format_answer(tokenizer: Tokenizer, example: Example, answer: Answer) -> str:
    """An example and its answer, to read."""
    prompt = tokenizer.decode(example.ids[: example.prompt].tolist())
    text = answer.text or ("" if answer.ids else f"{answer.value:.4g}")
    return (
        f"[{example.where}]\n{prompt[-_SHOWN_CHARACTERS:]}\n"
        f"-> {text}\n   ({' | '.join(example.references)})"
    )


def prediction_row(tokenizer: Tokenizer, example: Example, answer: Answer) -> dict[str, Any]:
    """One line of a file of predictions: the text, or the number with its probabilities."""
    row: dict[str, Any] = {
        "where": example.where,
        "prompt": tokenizer.decode(example.ids[: example.prompt].tolist()),
        "references": example.references,
    }
    if answer.text or not answer.probabilities:
        row["prediction"] = answer.text
    if example.label is not None or not (answer.text or answer.ids):
        row["value"] = answer.value
        row["label"] = example.label
        row["probabilities"] = [round(p, 6) for p in answer.probabilities]
    return row
