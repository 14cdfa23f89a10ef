"""Faults that concern several settings at once, section by section.

Each function takes a config whose settings are valid one by one, and returns a sentence for each
fault: the settings, their values, and a way to fix it. To add a check, add it to the function of
the section that a user would change.
"""

from __future__ import annotations

import dataclasses
import re

from gptjax.config.schema import SOURCE_TABLE, TASK_TABLE, Config
from gptjax.config.setting import load_table


def cross_checks(c: Config) -> list[str]:
    """Every fault that concerns several settings at once."""
    return [
        *_model_checks(c),
        *_train_checks(c),
        *_pattern_checks(c),
        *_mesh_checks(c),
        *_data_checks(c),
        *_task_checks(c),
        *_lora_checks(c),
    ]


def _model_checks(c: Config) -> list[str]:
    m, faults = c.model, []
    if not m.head_dim and m.width % m.heads:
        faults.append(
            f"model.heads = {m.heads} does not divide model.width = {m.width}: "
            "pick a divisor or set model.head_dim"
        )
    if m.heads % m.kv:
        faults.append(
            f"model.kv_heads = {m.kv} does not divide model.heads = {m.heads}: pick a divisor"
        )
    if m.positions == "rope" and (m.rotary_width % 2 or not m.rotary_width):
        faults.append(
            f"RoPE rotates pairs of dimensions, and model.head_dim = {m.head_width} with "
            f"model.rotary_fraction = {m.rotary_fraction} gives {m.rotary_width}: "
            "pick an even number"
        )
    if m.problem_type and not m.labels:
        faults.append(
            f"model.problem_type = {m.problem_type!r} follows from the task: leave it out "
            "(several labels a text are task.name = 'multi_label')"
        )
    if m.problem_type == "single_label_classification" and len(m.labels) == 1:
        faults.append(
            "model.problem_type = 'single_label_classification' needs two labels at least: one "
            "class of one would always be certain (a number is problem_type = 'regression')"
        )
    if m.alternate_windows and not m.sliding_window:
        faults.append("model.alternate_windows needs a window: set model.sliding_window")
    if m.rope_scaling != "none" and m.positions != "rope":
        faults.append(f"model.rope_scaling = {m.rope_scaling!r} needs model.positions = 'rope'")
    if m.rope_scaling == "llama3" and m.rope_high_freq_factor <= m.rope_low_freq_factor:
        faults.append(
            f"model.rope_high_freq_factor = {m.rope_high_freq_factor} must exceed "
            f"model.rope_low_freq_factor = {m.rope_low_freq_factor}"
        )
    if m.dropout and m.attention in ("blockwise", "splash", "cudnn"):
        faults.append(
            f"model.dropout = {m.dropout} needs model.attention = 'xla': "
            f"{m.attention} attention has no dropout on its weights"
        )
    if m.attention == "cudnn" and m.dtype == "float32":
        faults.append(
            "model.attention = 'cudnn' computes in 16 bits: set model.dtype = 'bfloat16', or "
            "model.attention = 'auto'"
        )
    if m.attention == "cudnn" and m.attention_softcap:
        faults.append(
            f"model.attention = 'cudnn' has no soft cap (model.attention_softcap = "
            f"{m.attention_softcap}): set model.attention = 'auto'"
        )
    return faults


def _train_checks(c: Config) -> list[str]:
    """Steps, batches and rows."""
    t, faults = c.train, []
    if t.grad_accum_steps and t.batch_size % t.grad_accum_steps:
        faults.append(
            f"train.grad_accum_steps = {t.grad_accum_steps} does not divide "
            f"train.batch_size = {t.batch_size}: pick a divisor"
        )
    # with train.epochs, the data decide the number of steps, and this is checked again then
    by_epochs = t.epochs and c.task.name
    if c.optim.warmup_steps > t.steps and not by_epochs:
        faults.append(
            f"optim.warmup_steps = {c.optim.warmup_steps} exceeds train.steps = {t.steps}: "
            "warm up for fewer steps"
        )
    if t.loss_chunk and c.length % t.loss_chunk:
        faults.append(
            f"train.loss_chunk = {t.loss_chunk} does not divide the row of {c.length} tokens: "
            "pick a divisor or 0"
        )
    if c.data.length > c.model.context:
        faults.append(
            f"data.length = {c.data.length} exceeds model.context = {c.model.context}: "
            "shorten the rows"
        )
    if t.profile_steps and profile_range(c) is None:
        faults.append(
            f"train.profile_steps = {t.profile_steps!r}: must be first:last, such as '10:15'"
        )
    return faults


def _pattern_checks(c: Config) -> list[str]:
    """Settings that hold regular expressions."""
    faults = []
    patterns_by_setting = {
        "optim.no_decay": c.optim.no_decay,
        "optim.freeze": c.optim.freeze,
        "lora.targets": c.lora.targets,
    }
    for name, patterns in patterns_by_setting.items():
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                faults.append(
                    f"{name}: {pattern!r} is not a valid regular expression ({error}); "
                    "paths look like blocks/mlp/up/bias, so try '.*/bias'"
                )
    return faults


def _mesh_checks(c: Config) -> list[str]:
    faults, sizes = [], dataclasses.asdict(c.mesh)
    if list(sizes.values()).count(-1) > 1:
        faults.append("mesh: only one axis may be -1, the others need a number")
    for axis, size in sizes.items():
        if size == 0:
            faults.append(f"mesh.{axis} = 0: must be 1 or more, or -1 for all devices left")
    return faults


def _data_checks(c: Config) -> list[str]:
    data, source = c.data, load_table(SOURCE_TABLE)[c.data.source]
    fault = source.check(data)
    faults = [fault] if fault else []
    if data.separator and data.source != "text":
        faults.append(
            f"data.separator = {data.separator!r} cuts files of data.source = 'text', and "
            f"data.source = {data.source!r} has documents already: leave it out"
        )
    if not source.split_names:
        if data.train_split != "train":
            faults.append(
                f"data.train_split = {data.train_split!r} names a split of tfds or datasets, and "
                f"data.source = {data.source!r} has none: leave it out"
            )
        if data.eval_split:
            faults.append(
                f"data.eval_split = {data.eval_split!r} names a split of tfds or datasets, and "
                f"data.source = {data.source!r} has none: name held-out files with data.eval_path"
            )
    return faults


def _task_checks(c: Config) -> list[str]:
    task, faults = c.task, []
    sources = load_table(SOURCE_TABLE)
    if task.name and sources[c.data.source].read_records is None:
        with_records = [name for name, source in sources.items() if source.read_records]
        faults.append(
            f"task.name = {task.name!r} needs records with named fields and "
            f"data.source = {c.data.source!r} has none: one of {', '.join(with_records)}"
        )
    for_tasks = {
        "data.mixture": c.data.mixture,
        "train.epochs": c.train.epochs,
        "data.train_limit": c.data.train_limit,
    }
    for name, value in for_tasks.items():
        if value and not task.name:
            faults.append(f"{name} = {value!r} is for tasks: set task.name, or leave it out")
    if task.words and len(task.words) != len(task.labels):
        faults.append(
            f"task.words = {list(task.words)} must give one text for each of "
            f"task.labels = {list(task.labels)}"
        )
    if len(set(task.labels)) < len(task.labels):
        faults.append(f"task.labels = {list(task.labels)} names one twice")
    if task.stop and task.num_beams > 1:
        faults.append(
            f"task.stop = {list(task.stop)} does not go with "
            f"task.num_beams = {task.num_beams}: leave one out"
        )
    if task.name:  # what the task itself asks of the config
        faults += load_table(TASK_TABLE)[task.name].check(c)
    return faults


def _lora_checks(c: Config) -> list[str]:
    lora, faults = c.lora, []
    if lora.rank and not lora.targets:
        faults.append(
            "lora.targets is empty, so no kernel gets an adapter: "
            "name patterns such as '.*/attn/.*', or set lora.rank = 0"
        )
    if lora.on and not c.train.init_from:
        faults.append("lora adapts a checkpoint: name one in train.init_from")
    if lora.on and c.optim.freeze:
        faults.append(
            "optim.freeze does nothing together with lora, which freezes all that it does not "
            "add: leave it out"
        )
    if lora.dora and (not lora.rank or lora.base != "float32"):
        faults.append("lora.dora needs lora.rank above 0 and lora.base = 'float32'")
    if lora.prompt_tokens and not c.task.name:
        faults.append("lora.prompt_tokens come before the examples of a task: set task.name")
    return faults


def profile_range(config: Config) -> tuple[int, int] | None:
    """(first, last) step to trace, or None where the text is not `first:last`."""
    first, _, last = config.train.profile_steps.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        return None
    return int(first), int(last)
