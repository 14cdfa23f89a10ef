"""The examples of a task: rows rendered, with what was dropped or cut counted, and packed.

In: a config with a task and perhaps the tokenizer of a checkpoint. Out: `Examples` of both splits.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gptjax.config.errors import UserError
from gptjax.config.schema import Config
from gptjax.core import cli
from gptjax.data import selection
from gptjax.data.packing import PackedExample
from gptjax.data.records import Record
from gptjax.data.selection import Selection
from gptjax.tasks.base import Example, Rendering, TokenBudget
from gptjax.tasks.rendering import template_texts
from gptjax.tasks.splits import read_splits
from gptjax.tasks.table import task_of
from gptjax.tokenizer import chat_template
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.kinds import create_tokenizer


@dataclasses.dataclass(frozen=True)
class Examples:
    """Both splits, rendered. fingerprint: of the rows and of how they became examples.

    selections: what the rows were taken from.
    """

    train: list[Example]
    eval: list[Example]
    labels: tuple[str, ...]
    tokenizer: Tokenizer
    fingerprint: str
    selections: dict[str, Selection] = dataclasses.field(default_factory=dict)

    def summary(self) -> str:
        """A line that says how many examples and tokens there are."""
        parts = []
        for name, examples in (("training", self.train), ("held out", self.eval)):
            tokens = sum(len(example.ids) for example in examples)
            parts.append(
                f"{name} {tokens:,} tokens ({selection.counted(len(examples), 'example')})"
            )
        return "; ".join(parts)


def load_examples(
    config: Config, tokenizer: Tokenizer | None = None, *, resumed: str = ""
) -> Examples:
    """The examples that the config names.

    Without a tokenizer, the one that data.tokenizer names is made of the training split. resumed:
    the fingerprint of a run that goes on, see `read_splits`. Raises UserError.
    """
    task = task_of(config.task)
    if config.task.eval_samples:
        task.check_package()
    splits = read_splits(config, resumed)
    selection.say(splits.selections)
    if tokenizer is None:
        every_row = [*splits.train, *splits.eval]
        tokenizer = create_tokenizer(
            config.data, _texts(config, splits.train), _texts(config, every_row)
        )
    labels = task.labels(config.task, splits.train)
    train = render(config, tokenizer, splits.train, labels, "training")
    held_out = render(config, tokenizer, splits.eval, labels, "held-out")
    return Examples(train, held_out, labels, tokenizer, splits.fingerprint, splits.selections)


def _texts(config: Config, rows: Iterable[Record]) -> Iterator[str]:
    """What a tokenizer learns from: prompts and completions as they will be read."""
    task = task_of(config.task)
    task_config = task.with_templates(config.task)
    if _uses_chat_template(config):
        # the names that `chat_template.plain_template` writes
        yield f"System:\nUser:\nTool:\nAssistant:\n{config.task.system}"
    for row in rows:
        if task.texts:
            yield from task.texts(task_config, row)
        else:
            has_head = task.has_head(task_config)
            yield from template_texts(task_config, row, has_head=has_head)


def _uses_chat_template(config: Config) -> bool:
    return task_of(config.task).chat or config.task.template == "chat"


def render(
    config: Config,
    tokenizer: Tokenizer,
    rows: Sequence[Record],
    labels: Sequence[str],
    split: str,
    *,
    answer: int = 0,
) -> list[Example]:
    """Rows to examples; how many were dropped or cut is said.

    answer: places for what a model writes, see `TokenBudget`. Raises UserError where no example
    is left. A tokenizer without a chat template gets a plain one where the task needs it.
    """
    task = task_of(config.task)
    if config.task.chat_template:
        chat_template.choose(tokenizer, config.task.chat_template)
    if _uses_chat_template(config) and not (tokenizer.chat_template or tokenizer.templates):
        # the run keeps it with the vocabulary
        tokenizer.chat_template = chat_template.plain_template(tokenizer)
        cli.say(
            "the vocabulary has no chat template: "
            "turns are written as 'User:' or 'Assistant:', the text, and its end token"
        )
    budget = TokenBudget(config.length, config.task.truncation, config.lora.prompt_tokens, answer)
    rendering = Rendering(task.with_templates(config.task), tokenizer, budget, tuple(labels))
    examples: list[Example] = []
    dropped, several = 0, 0
    with cli.progress(f"{split} examples rendered", len(rows)) as advance:
        for row in rows:
            rendered = task.make_example(rendering, row)
            if not isinstance(rendered, list):
                rendered = [rendered] if rendered else []
            examples += rendered
            dropped += not rendered
            several += len(rendered) > 1
            advance(1)
    if several:
        cli.say(
            f"{split}: the chat template rewrites earlier turns, so {several:,} conversations are "
            "several examples each: every answer after the prompt that generation would give it"
        )
    cut = sum(example.cut for example in examples)
    if dropped or cut:
        cli.say(
            f"{split}: {len(examples):,} examples; {dropped:,} longer than {budget.length} tokens "
            f"dropped, {cut:,} cut (task.truncation = {budget.policy!r})"
        )
    examples = task.finish(config, examples)
    if rows and not examples:
        raise UserError(
            f"{split}: all {len(rows):,} examples are longer than {budget.length} tokens: "
            "raise data.length, or cut them (task.truncation)"
        )
    return examples


def has_head(config: Config) -> bool:
    """Whether the task reads a class or a number off the last token instead of writing text."""
    return task_of(config.task).has_head(config.task)


def packed_example(config: Config, example: Example) -> PackedExample:
    """An example as it is packed: its learned ids as targets, or the last token's label."""
    if has_head(config):
        is_last = np.arange(len(example.ids)) == len(example.ids) - 1
        labels = np.where(is_last, example.label or 0, 0)
        return PackedExample(
            example.ids,
            labels.astype(task_of(config.task).label_dtype),
            is_last.astype(np.float32),
            (len(example.ids),),
        )
    ends = np.cumsum([0, *(example.parts or (len(example.ids),))])
    tokens, targets, weights, lengths = [], [], [], []
    for start, end in itertools.pairwise(ends):
        tokens.append(example.ids[start : end - 1])
        targets.append(example.ids[start + 1 : end])
        weights.append(example.learned[start + 1 : end])
        lengths.append(int(end - start) - 1)
    return PackedExample(
        np.concatenate(tokens),
        np.concatenate(targets),
        np.concatenate(weights).astype(np.float32),
        tuple(lengths),
    )
