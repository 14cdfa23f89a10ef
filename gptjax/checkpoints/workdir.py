"""Checkpoints of a run: saved asynchronously by orbax, proven whole before anything trains from them.

A step holds `params`, `optimizer` ({"step", "rng", "opt_state": {path: array}}) and `meta` (JSON), plain dicts of arrays on disk.
Before orbax renames a finished step into place, `checksums.json` with size and sha256 of each file is written into it;
a step whose files do not match is never read. What orbax writes after that (commit time, commit marker) holds no state.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gptjax.config.build import from_stored
from gptjax.config.errors import UserError
from gptjax.config.schema import Config
from gptjax.core import cli, files
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.kinds import load_tokenizer

CHECKSUMS = "checksums.json"


FORMAT = 1


def steps_in(folder: Path) -> list[int]:
    """Committed steps, whole or not, oldest first."""
    return (
        sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir())
        if folder.is_dir()
        else []
    )


def fault(step: Path, parts: tuple[str, ...] = ()) -> str:
    """What is wrong with a committed step, or "". With `parts`, only the files below those items are read."""
    try:
        sums = json.loads((step / CHECKSUMS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (ValueError, OSError):
        return f"{CHECKSUMS} is damaged"
    expected = (
        files.digest(json.dumps(sums.get("files"), sort_keys=True))
        if isinstance(sums, dict)
        else ""
    )
    if not expected or sums.get("self") != expected:
        return f"{CHECKSUMS} is damaged"
    for name, (size, checksum) in sums["files"].items():
        path = step / name
        if parts and not name.startswith(parts):
            continue
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
        if files.sha256(path) != checksum:
            return f"{name} differs from its checksum"
    return ""


def read_meta(step: Path) -> dict[str, Any]:
    """The JSON that `save` was given, with `format` and `step`."""
    meta = json.loads((step / "meta" / "metadata").read_text(encoding="utf-8"))
    if meta["format"] != FORMAT:
        raise UserError(
            f"{step} is a checkpoint of format {meta['format']}, this version reads {FORMAT}"
        )
    return meta


def newest_step(folder: Path) -> Path:
    """The newest step whose parameters are whole, for readers; skipped ones are named on stderr."""
    for step in reversed(steps_in(folder)):
        if not (problem := fault(folder / str(step), ("params/", "meta/"))):
            return folder / str(step)
        cli.say(f"warning: skipped the checkpoint of step {step}: {problem}")
    raise UserError(
        f"{folder} holds no whole checkpoint; train first, or point --checkpoint at a run's workdir"
    )


def workdir_of(path: Path) -> tuple[Path, Path | None]:
    """(workdir, the step's folder where the path is one) of what names a run: its workdir or one of its steps."""
    is_step = path.name.isdigit() and (path / "meta").is_dir()
    return (path.parent.parent, path) if is_step else (path, None)


def load_run(path: Path) -> tuple[Config, Any, Tokenizer, str]:
    """(config, parameters, tokenizer, `convert.digest` of what its adapters stand on) of a run's workdir (its newest whole step) or of one step's folder."""
    path = (
        path.expanduser().resolve()
    )  # orbax finds nothing under a relative path, and says nothing
    workdir, step = workdir_of(path)
    if not (workdir / "config.json").is_file():
        raise UserError(
            f"--checkpoint={path}: no config.json, so this is no workdir of gptjax.train (or the run has not started)"
        )
    if step is None:
        step = newest_step(workdir / "checkpoints")
    elif problem := fault(step, ("params/", "meta/")):
        raise UserError(f"--checkpoint={path}: {problem}; pick another step")
    meta = read_meta(step)
    return (
        from_stored(meta["config"]),
        load_params(step),
        load_tokenizer(workdir / "tokenizer"),
        meta.get("base", ""),
    )


def stored_shapes(item: Path) -> Any:
    """Shapes and dtypes of an item on disk, as a nested dict."""
    return ocp.StandardCheckpointer().metadata(item).item_metadata.tree


def load_params(step: Path) -> Any:
    """The parameters of a step as host arrays on the default device, without its optimizer state."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=place),
        stored_shapes(step / "params"),
    )
    return ocp.StandardCheckpointer().restore(step / "params", target)
