"""Settings to a `Config` and back: strict reading of config files, overrides from the command line, JSON.

In: a `ConfigDict` from a file in `configs/` plus `--config.a.b=value` overrides. Out: one frozen `Config`, or one message with all faults.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import ml_collections

from gptjax.config import ROW_SOURCES, SECTIONS, Config, UserError, knobs, nearest, to_dict


def from_json(text: str) -> Config:
    return build(json.loads(text))


def to_config_dict(config: Config, *, locked: bool = True) -> ml_collections.ConfigDict:
    """The same settings as a `ConfigDict`. Unlocked ones collect misspelt names, so that `build` can report all at once."""
    result = ml_collections.ConfigDict(to_dict(config), type_safe=False)
    return result.lock() if locked else result


def parse(text: str, kind: Any) -> Any:
    """A command-line string as `kind`; what cannot be read is returned unchanged and faulted by `build`."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
        if kind is int:
            number = float(text)
            return int(text) if text.lstrip("+-").isdigit() else int(number) if number.is_integer() else text
        if kind is float:
            return float(text)
        if get_origin(kind) is tuple:
            return tuple(part for part in text.split(",") if part)
    except (ValueError, OverflowError):
        return text
    return text


def _typed(path: str, value: Any, kind: Any, field: dataclasses.Field, faults: list[str]) -> Any:
    """Checks one value against its knob; returns it in its exact type."""
    meta, shown = field.metadata, f"{path} = {value!r}"
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if isinstance(value, list | tuple) and all(isinstance(v, item) for v in value):
            return tuple(value)
        faults.append(f"{shown}: must be a list of {item.__name__}, such as {field.default!r}")
        return field.default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        faults.append(f"{shown}: must be {kind.__name__}, such as {field.default!r}")
        return field.default
    if kind is float and not math.isfinite(value):
        faults.append(f"{shown}: must be finite, such as {field.default!r}")
        return field.default
    if meta["choices"] and value not in meta["choices"]:
        near = nearest(value, list(meta["choices"]))
        faults.append(f"{shown}: must be one of {', '.join(meta['choices'])}" + (f"; did you mean {near!r}?" if near else ""))
        return field.default
    for bound, bad, word in ((meta["low"], lambda v, b: v < b, "least"), (meta["high"], lambda v, b: v > b, "most")):
        if bound is not None and bad(value, bound):
            faults.append(f"{shown}: must be at {word} {bound:g}")
            return field.default
    return value


def build(settings: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """The frozen `Config` of `settings`. Raises one `UserError` that lists every fault with path, value and a mend."""
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    faults: list[str] = []
    known = {path: (kind, field) for path, kind, field in knobs()}
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, content in settings.items():
        if section not in SECTIONS or not isinstance(content, Mapping):
            near = nearest(str(section), list(SECTIONS)) or nearest(f"x.{section}", list(known))
            faults.append(f"{section} = {content!r}: no such section" + (f"; did you mean {near}?" if near else f"; there are {', '.join(SECTIONS)}"))
            continue
        for name, value in content.items():
            path = f"{section}.{name}"
            if path not in known:
                near = nearest(path, list(known))
                faults.append(f"{path} = {value!r}: no such knob" + (f"; did you mean {near}?" if near else ""))
                continue
            values[section][name] = _typed(path, value, *known[path], faults)
    config = Config(**{section: cls(**values[section]) for section, cls in SECTIONS.items()})
    faults += cross_checks(config) if not faults else []
    if faults:
        shown = faults if len(faults) <= 5 else [*faults[:4], f"and {len(faults) - 4} more; mend these first"]
        head = "" if len(faults) == 1 else f"{len(faults)} faults in the configuration:\n  "
        raise UserError(head + "\n  ".join(shown))
    return config


def cross_checks(c: Config) -> list[str]:
    """Faults that concern several knobs at once."""
    m, o, t, faults = c.model, c.optim, c.train, []
    if not m.head_dim and m.width % m.heads:
        faults.append(f"model.heads = {m.heads} does not divide model.width = {m.width}: pick a divisor or set model.head_dim")
    if m.heads % m.kv:
        faults.append(f"model.kv_heads = {m.kv} does not divide model.heads = {m.heads}: pick a divisor")
    if m.positions == "rope" and (m.rotary_width % 2 or not m.rotary_width):
        faults.append(
            f"RoPE turns pairs and model.head_dim = {m.head_width} with model.rope_share = {m.rope_share} has {m.rotary_width} dims: pick an even number"
        )
    if m.rope_scaling != "none" and m.positions != "rope":
        faults.append(f"model.rope_scaling = {m.rope_scaling!r} needs model.positions = 'rope'")
    if m.rope_scaling == "llama3" and m.rope_high_freq <= m.rope_low_freq:
        faults.append(f"model.rope_high_freq = {m.rope_high_freq} must exceed model.rope_low_freq = {m.rope_low_freq}")
    if m.dropout and m.attention == "blockwise":
        faults.append(f"model.dropout = {m.dropout} needs model.attention = 'xla': blockwise attention has no dropout on its weights")
    if t.batch_size % t.accumulate:
        faults.append(f"train.accumulate = {t.accumulate} does not divide train.batch_size = {t.batch_size}: pick a divisor")
    if o.warmup_steps > t.steps and not (t.epochs and c.task.name):  # then asked again, when the data have said how many
        faults.append(f"optim.warmup_steps = {o.warmup_steps} exceeds train.steps = {t.steps}: warm up for fewer steps")
    if t.loss_chunk and c.length % t.loss_chunk:
        faults.append(f"train.loss_chunk = {t.loss_chunk} does not divide the row of {c.length} tokens: pick a divisor or 0")
    if c.data.length > m.context:
        faults.append(f"data.length = {c.data.length} exceeds model.context = {m.context}: shorten the rows")
    if t.profile_steps and profile_range(c) is None:
        faults.append(f"train.profile_steps = {t.profile_steps!r}: must be first:last, such as '10:15'")
    for name, patterns in (("optim.no_decay", o.no_decay), ("optim.freeze", o.freeze), ("lora.targets", c.lora.targets)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                faults.append(f"{name}: {pattern!r} is no regular expression ({error}); paths look like blocks/mlp/up/bias, so try '.*/bias'")
    if [c.mesh.data, c.mesh.fsdp, c.mesh.tensor].count(-1) > 1:
        faults.append("mesh: only one axis may be -1, the others need a number")
    for axis in ("data", "fsdp", "tensor"):
        if getattr(c.mesh, axis) == 0:
            faults.append(f"mesh.{axis} = 0: must be 1 or more, or -1 for all devices left")
    if c.data.source in ("text", "shards", *ROW_SOURCES) and c.data.source not in ("tfds", "datasets") and not c.data.path:
        faults.append(f"data.path is empty and data.source = {c.data.source!r} needs it: --config.data.path=FILE_OR_FOLDER")
    if c.data.source == "tfds" and not c.data.name:
        faults.append("data.name is empty and data.source = 'tfds' needs it: --config.data.name=c4/en:3.1.0")
    if c.data.source == "datasets" and not (c.data.name or c.data.path):
        faults.append("data.source = 'datasets' needs data.name (a name on the hub) or data.path (what save_to_disk wrote)")
    return faults + _task_checks(c)


def _task_checks(c: Config) -> list[str]:
    """Faults of tasks and adapters."""
    task, faults = c.task, []
    if task.name and c.data.source not in (*ROW_SOURCES, "sotu"):
        faults.append(
            f"task.name = {task.name!r} reads rows of fields and data.source = {c.data.source!r} has none: one of sotu, {', '.join(ROW_SOURCES)}"
        )
    if not task.name:
        for name, given in (("data.mixture", c.data.mixture), ("train.epochs", c.train.epochs), ("data.train_limit", c.data.train_limit)):
            if given:
                faults.append(f"{name} = {given!r} is for tasks: set task.name, or leave it out")
    if task.words and len(task.words) != len(task.labels):
        faults.append(f"task.words = {list(task.words)} must give one text for each of task.labels = {list(task.labels)}")
    if len(set(task.labels)) < len(task.labels):
        faults.append(f"task.labels = {list(task.labels)} names one twice")
    if c.lora.rank and not c.lora.targets:
        faults.append("lora.targets is empty, so no kernel gets an adapter: name patterns such as '.*/attn/.*', or set lora.rank = 0")
    if task.name == "preference" and task.loss == "kto" and c.train.accumulate > 1:
        faults.append(f"train.accumulate = {c.train.accumulate} changes KTO's loss, which compares the answers of a batch with one another: set 1")
    if task.name == "regression" and task.method != "head":
        faults.append("task.method = 'text' is for classification: a number needs the head")
    if task.stop and task.num_beams > 1:
        faults.append(f"task.stop = {list(task.stop)} does not go with task.num_beams = {task.num_beams}: leave one out")
    if task.name in ("preference", "grpo") and not c.train.init_from:
        faults.append(f"task.name = {task.name!r} tunes a model that can answer: name its checkpoint in train.init_from")
    if task.name == "grpo" and task.kl and not c.lora.on:
        faults.append(f"task.kl = {task.kl} keeps near the frozen base of adapters: set lora.rank, or task.kl = 0")
    if task.name == "grpo" and c.train.batch_size % task.samples:
        faults.append(f"task.samples = {task.samples} does not divide train.batch_size = {c.train.batch_size}, which counts answers: pick a divisor")
    if c.lora.on and not c.train.init_from:
        faults.append("lora adapts a checkpoint: name one in train.init_from")
    if c.lora.on and c.optim.freeze:
        faults.append("optim.freeze does nothing beside lora, which freezes all that it does not add: leave it out")
    if c.lora.dora and (not c.lora.rank or c.lora.base != "float32"):
        faults.append("lora.dora needs lora.rank above 0 and lora.base = 'float32'")
    if c.lora.prompt_tokens and not task.name:
        faults.append("lora.prompt_tokens stand before the examples of a task: set task.name")
    if c.lora.on and (c.mesh.tensor not in (1, -1)) and c.lora.base == "int8":
        faults.append("lora.base = 'int8' is not split over mesh.tensor: set it to 1")
    return faults


def profile_range(config: Config) -> tuple[int, int] | None:
    """(first, last) step to trace, or None where the text is not `first:last`."""
    first, _, last = config.train.profile_steps.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        return None
    return int(first), int(last)


def load_file(spec: str) -> ml_collections.ConfigDict:
    """Runs `get_config()` of `path.py` or `get_config(arg)` of `path.py:arg`."""
    name, _, arg = spec.partition(":")
    path = Path(name).resolve()
    if not path.is_file():
        here = sorted(p.as_posix() for p in Path("configs").glob("*.py")) if Path("configs").is_dir() else []
        near = nearest(name, here)
        raise UserError(f"--config={spec}: no such file" + (f"; did you mean {near}?" if near else f"; the working directory is {Path.cwd()}"))
    root = str(path.parent.parent)
    if root not in sys.path:  # configs import one another as `from configs import base`
        sys.path.insert(0, root)
    module_spec = importlib.util.spec_from_file_location(f"gptjax_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={spec}: not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        settings = module.get_config(arg) if arg else module.get_config()
        if not isinstance(settings, ml_collections.ConfigDict):
            raise UserError(f"--config={spec}: get_config() returned {settings!r:.80}; it must return base.get_config() with changes")
        return settings
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--config={spec}: {type(error).__name__}: {error}\nA config file defines get_config() and returns base.get_config() with changes."
        ) from error


def override(settings: ml_collections.ConfigDict, pairs: dict[str, str]) -> None:
    """Applies `{"model.width": "256"}` in place; names and values are judged by `build`, with everything else."""
    kinds = {path: kind for path, kind, _ in knobs()}
    for path, text in pairs.items():
        section, _, name = path.partition(".")
        if section not in settings:
            settings[section] = {}
        target = settings[section]
        if not isinstance(target, ml_collections.ConfigDict) or not name:
            raise UserError(f"--config.{path}={text}: name a section and a knob, such as --config.train.steps=100")
        target[name] = parse(text, kinds.get(path, str))


def changes(old: Config, new: Config, *, shaping_only: bool = True) -> list[str]:
    """`path: old -> new` of each knob that differs; by default only those that shape the run's numbers."""
    a, b = to_dict(old), to_dict(new)
    rows = []
    for path, _, field in knobs():
        section, name = path.split(".")
        if a[section][name] != b[section][name] and (field.metadata["shapes"] or not shaping_only):
            rows.append(f"{path}: {a[section][name]!r} -> {b[section][name]!r}")
    return rows
