"""Settings to a `Config` and back: strict reading of config files, overrides from the command line, JSON.

In: a `ConfigDict` from a file in `configs/` plus `--config.a.b=value` overrides. Out: one frozen `Config`, or one message with all faults.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import ml_collections

from gptjax.config.checks import cross_checks
from gptjax.config.errors import UserError, nearest, unknown_name
from gptjax.config.schema import SECTIONS, Config, all_settings, to_dict

# Settings that had another name: a `config.json` written before reads through this table, and nothing else does.
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
    """The config that a run's files hold; old names of settings are read. Raises UserError."""
    current = {
        section: {RENAMED.get(f"{section}.{name}", name): value for name, value in values.items()}
        for section, values in content.items()
    }
    return build_config(current)


def from_json(text: str) -> Config:
    """The config of a `config.json`. Raises UserError."""
    return from_stored(json.loads(text))


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
            return (
                int(text)
                if text.lstrip("+-").isdigit()
                else int(number)
                if number.is_integer()
                else text
            )
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
            for unknown in (v for v in value if meta["choices"] and v not in meta["choices"]):
                faults.append(f"{path}: {unknown_name('choice', unknown, list(meta['choices']))}")
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
        faults.append(
            f"{shown}: must be one of {', '.join(meta['choices'])}"
            + (f"; did you mean {near!r}?" if near else "")
        )
        return field.default
    for bound, bad, word in (
        (meta["low"], lambda v, b: v < b, "least"),
        (meta["high"], lambda v, b: v > b, "most"),
    ):
        if bound is not None and bad(value, bound):
            faults.append(f"{shown}: must be at {word} {bound:g}")
            return field.default
    return value


def build_config(settings: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """The frozen `Config` of `settings`. Raises one `UserError` that lists every fault with path, value and a mend."""
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    faults: list[str] = []
    known = {path: (kind, field) for path, kind, field in all_settings()}
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, content in settings.items():
        if section not in SECTIONS or not isinstance(content, Mapping):
            near = nearest(str(section), list(SECTIONS)) or nearest(f"x.{section}", list(known))
            faults.append(
                f"{section} = {content!r}: no such section"
                + (f"; did you mean {near}?" if near else f"; there are {', '.join(SECTIONS)}")
            )
            continue
        for name, value in content.items():
            path = f"{section}.{name}"
            if path not in known:
                near = nearest(path, list(known))
                faults.append(
                    f"{path} = {value!r}: no such knob"
                    + (f"; did you mean {near}?" if near else "")
                )
                continue
            values[section][name] = _typed(path, value, *known[path], faults)
    config = Config(**{section: cls(**values[section]) for section, cls in SECTIONS.items()})
    faults += cross_checks(config) if not faults else []
    if faults:
        shown = (
            faults
            if len(faults) <= 5
            else [*faults[:4], f"and {len(faults) - 4} more; mend these first"]
        )
        head = "" if len(faults) == 1 else f"{len(faults)} faults in the configuration:\n  "
        raise UserError(head + "\n  ".join(shown))
    return config


def load_file(spec: str) -> ml_collections.ConfigDict:
    """Runs `get_config()` of `path.py` or `get_config(arg)` of `path.py:arg`."""
    name, _, arg = spec.partition(":")
    path = Path(name).resolve()
    if not path.is_file():
        here = (
            sorted(p.as_posix() for p in Path("configs").glob("*.py"))
            if Path("configs").is_dir()
            else []
        )
        near = nearest(name, here)
        raise UserError(
            f"--config={spec}: no such file"
            + (f"; did you mean {near}?" if near else f"; the working directory is {Path.cwd()}")
        )
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
            raise UserError(
                f"--config={spec}: get_config() returned {settings!r:.80}; it must return base.get_config() with changes"
            )
        return settings
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--config={spec}: {type(error).__name__}: {error}\nA config file defines get_config() and returns base.get_config() with changes."
        ) from error


def override(settings: ml_collections.ConfigDict, pairs: dict[str, str]) -> None:
    """Applies `{"model.width": "256"}` in place; names and values are judged by `build`, with everything else."""
    kinds = {path: kind for path, kind, _ in all_settings()}
    for path, text in pairs.items():
        section, _, name = path.partition(".")
        if section not in settings:
            settings[section] = {}
        target = settings[section]
        if not isinstance(target, ml_collections.ConfigDict) or not name:
            raise UserError(
                f"--config.{path}={text}: name a section and a knob, such as --config.train.steps=100"
            )
        target[name] = parse(text, kinds.get(path, str))


def changes(old: Config, new: Config, *, shaping_only: bool = True) -> list[str]:
    """`path: old -> new` of each knob that differs; by default only those that shape the run's numbers."""
    a, b = to_dict(old), to_dict(new)
    rows = []
    for path, _, field in all_settings():
        section, name = path.split(".")
        if a[section][name] != b[section][name] and (field.metadata["shapes"] or not shaping_only):
            rows.append(f"{path}: {a[section][name]!r} -> {b[section][name]!r}")
    return rows
