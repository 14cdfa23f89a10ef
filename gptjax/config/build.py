"""Settings to a `Config` and back: strict reading of config files, overrides and JSON.

In: a `ConfigDict` from a file in `configs/`, with `--config.section.setting=value` overrides.
Out: one frozen `Config`, or one message with all faults.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import ml_collections

from gptjax.config.checks import cross_checks
from gptjax.config.errors import UserError, nearest, unknown_name
from gptjax.config.schema import SECTIONS, Config, all_settings, to_dict
from gptjax.config.setting import choices_of

# Settings that had another name: an older `config.json` is read through this table, and nothing
# else is.
RENAMED: dict[str, str] = {
    "model.hidden": "mlp_dim",
    "model.rope_base": "rope_theta",
    "model.rope_share": "rotary_fraction",
    "model.rope_low_freq": "rope_low_freq_factor",
    "model.rope_high_freq": "rope_high_freq_factor",
    "model.window": "sliding_window",
    "model.tied": "tie_embeddings",
    "model.scan": "scan_layers",
    "data.isolate": "mask_documents",
    "task.samples": "num_generations",
    "task.kl": "kl_coef",
    "task.overlong": "truncation",
    "task.answers": "eval_samples",
    "optim.final_lr": "min_lr_ratio",
    "optim.decay_share": "decay_fraction",
    "optim.clip": "max_grad_norm",
    "optim.matrix_lr": "muon_lr",
    "optim.layer_decay": "layerwise_lr_decay",
    "train.accumulate": "grad_accum_steps",
    "train.keep": "max_to_keep",
}


def from_stored(content: Mapping[str, Mapping[str, Any]]) -> Config:
    """The config in a run's files, whose settings may have their old names. Raises UserError."""
    current: dict[str, Any] = dict(content)
    for section, values in content.items():
        if isinstance(values, Mapping):  # else `build_config` refuses it
            current[section] = {
                RENAMED.get(f"{section}.{name}", name): value for name, value in values.items()
            }
            if section == "data" and values.get("eval_split") == "validation":
                current[section]["eval_split"] = ""  # as the former default was read
    return build_config(current)


def from_json(text: str) -> Config:
    """The config of a `config.json`. Raises UserError."""
    return from_stored(json.loads(text))


def to_config_dict(config: Config, *, locked: bool = True) -> ml_collections.ConfigDict:
    """The same settings as a `ConfigDict`.

    An unlocked one collects misspelt names, so that `build_config` can report all at once.
    """
    result = ml_collections.ConfigDict(to_dict(config), type_safe=False)
    return result.lock() if locked else result


def parse(text: str, kind: Any) -> Any:
    """A text from the command line as `kind`.

    A text that is no such value is returned unchanged, and `build_config` reports it.
    """
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    if get_origin(kind) is tuple:
        return tuple(part for part in text.split(",") if part)
    if isinstance(kind, types.UnionType):  # of bool and names
        return parse(text, bool)
    if kind not in (int, float):
        return text
    try:
        number = float(text)
        if kind is float:
            return number
        if text.lstrip("+-").isdigit():
            return int(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else text  # "1e3" is 1000


def _check_value(
    path: str, value: Any, kind: Any, field: dataclasses.Field, faults: list[str]
) -> Any:
    """The value of one setting in its exact type; what is wrong with it is added to `faults`."""
    if get_origin(kind) is tuple:
        return _check_list(path, value, kind, field, faults)
    fault = ""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        fault = f"must be {getattr(kind, '__name__', kind)}, such as {field.default!r}"
    elif kind is float and not math.isfinite(value):
        fault = f"must be finite, such as {field.default!r}"
    else:
        fault = _choice_fault(value, field) or _range_fault(value, field)
    if fault:
        faults.append(f"{path} = {value!r}: {fault}")
        return field.default
    return value


def _check_list(
    path: str, value: Any, kind: Any, field: dataclasses.Field, faults: list[str]
) -> Any:
    item, choices = get_args(kind)[0], choices_of(field)
    if not isinstance(value, list | tuple) or not all(isinstance(v, item) for v in value):
        faults.append(
            f"{path} = {value!r}: must be a list of {item.__name__}, such as {field.default!r}"
        )
        return field.default
    for name in value:
        if choices and name not in choices:
            faults.append(f"{path}: {unknown_name('choice', name, list(choices))}")
    return tuple(value)


def _choice_fault(value: Any, field: dataclasses.Field) -> str:
    """What is wrong with a value that is none of the choices, or ""."""
    if value == field.default:
        return ""  # without loading the table of the choices
    choices = choices_of(field)
    if not choices or value in choices:
        return ""
    names = [str(choice) for choice in choices]
    near = nearest(str(value), names)
    hint = f"; did you mean {near!r}?" if near else ""
    return f"must be one of {', '.join(names)}{hint}"


def _range_fault(value: Any, field: dataclasses.Field) -> str:
    """What is wrong with a value outside its range, or ""."""
    low, high = field.metadata["low"], field.metadata["high"]
    if low is not None and value < low:
        return f"must be at least {low:g}"
    if high is not None and value > high:
        return f"must be at most {high:g}"
    return ""


def build_config(settings: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """The frozen `Config` of `settings`.

    Raises one `UserError` that lists every fault with its path, its value and a way to fix it.
    """
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    faults: list[str] = []
    known = {path: (kind, field) for path, kind, field in all_settings()}
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, content in settings.items():
        if section not in SECTIONS or not isinstance(content, Mapping):
            faults.append(_section_fault(section, content, list(known)))
            continue
        for name, value in content.items():
            path = f"{section}.{name}"
            if path in known:
                values[section][name] = _check_value(path, value, *known[path], faults)
                continue
            near = nearest(path, list(known))
            hint = f"; did you mean {near}?" if near else ""
            faults.append(f"{path} = {value!r}: no such setting{hint}")
    config = Config(**{section: cls(**values[section]) for section, cls in SECTIONS.items()})
    if not faults:
        faults = cross_checks(config)
    if faults:
        raise UserError(_summary(faults))
    return config


def _section_fault(section: str, content: Any, known: list[str]) -> str:
    near = nearest(str(section), list(SECTIONS)) or nearest(f"x.{section}", known)
    hint = f"did you mean {near}?" if near else f"there are {', '.join(SECTIONS)}"
    return f"{section} = {content!r}: no such section; {hint}"


def _summary(faults: list[str]) -> str:
    """All faults, or the first four where there are more than five."""
    if len(faults) == 1:
        return faults[0]
    lines = faults
    if len(faults) > 5:
        lines = [*faults[:4], f"and {len(faults) - 4} more; fix these first"]
    return f"{len(faults)} faults in the configuration:\n  " + "\n  ".join(lines)


def load_file(spec: str) -> ml_collections.ConfigDict:
    """The settings of a config file: `path.py`, or `path.py:arg` for `get_config(arg)`.

    Raises UserError where there is no such file, or where it fails.
    """
    name, _, arg = spec.partition(":")
    path = Path(name).resolve()
    if not path.is_file():
        near = nearest(name, sorted(p.as_posix() for p in Path("configs").glob("*.py")))
        hint = f"did you mean {near}?" if near else f"the working directory is {Path.cwd()}"
        raise UserError(f"--config={spec}: no such file; {hint}")
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
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--config={spec}: {type(error).__name__}: {error}\n"
            "A config file defines get_config() and returns base.get_config() with changes."
        ) from error
    if not isinstance(settings, ml_collections.ConfigDict):
        raise UserError(
            f"--config={spec}: get_config() returned {settings!r:.80}; "
            "it must return base.get_config() with changes"
        )
    return settings


def override(settings: ml_collections.ConfigDict, pairs: dict[str, str]) -> None:
    """Applies `{"model.width": "256"}` in place; `build_config` checks the names and the values."""
    kinds = {path: kind for path, kind, _ in all_settings()}
    for path, text in pairs.items():
        section, _, name = path.partition(".")
        if section not in settings:
            settings[section] = {}
        target = settings[section]
        if not isinstance(target, ml_collections.ConfigDict) or not name:
            raise UserError(
                f"--config.{path}={text}: name a section and a setting, "
                "such as --config.train.steps=100"
            )
        target[name] = parse(text, kinds.get(path, str))


def changes(old: Config, new: Config, *, shaping_only: bool = True) -> list[str]:
    """`path: old -> new` of each setting that differs.

    By default only of those that shape the run's numbers.
    """
    before, after = to_dict(old), to_dict(new)
    lines = []
    for path, _, field in all_settings():
        section, name = path.split(".")
        if shaping_only and not field.metadata["shapes"]:
            continue
        pair, auto = (before[section][name], after[section][name]), field.metadata["auto"]
        if shaping_only and auto is not None and auto in pair:
            continue
        if before[section][name] != after[section][name]:
            lines.append(f"{path}: {before[section][name]!r} -> {after[section][name]!r}")
    return lines
