"""The checkpoints in a run's workdir, read: which steps are complete, and what they hold.

`store.py` writes them. A step is a folder `checkpoints/<step>/` with `params`, `optimizer`
({"step", "rng", "opt_state": {path: array}}) and `meta` (JSON), all plain dicts of arrays on disk.
`checksums.json` in it has the size and the sha256 of each file; a step whose files do not match is
never read. What orbax writes after that (commit time, commit marker) holds no state.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from gptjax.config.build import from_stored
from gptjax.config.errors import UserError
from gptjax.config.schema import Config
from gptjax.core import cli, files
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.kinds import load_tokenizer

CHECKSUMS = "checksums.json"

# Of the layout above; goes up when it changes.
FORMAT = 1

# The items of a step that readers of its parameters need.
_FOR_READERS = ("params/", "meta/")


class Run(NamedTuple):
    """What a step of a run holds for whoever uses the model.

    params: the model's, or the adapters of a run that trained some. base: `params_digest` of the
    checkpoint that those were trained on, or "".
    """

    config: Config
    params: Any
    tokenizer: Tokenizer
    base: str


def steps_in(folder: Path) -> list[int]:
    """Steps that were written to their end, damaged since or not, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir())


def fault(step: Path, parts: tuple[str, ...] = ()) -> str:
    """What is wrong with a step's folder, or "". parts: look only at files below these items."""
    try:
        sums = json.loads((step / CHECKSUMS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (ValueError, OSError):
        return f"{CHECKSUMS} is damaged"
    if not isinstance(sums, dict):
        return f"{CHECKSUMS} is damaged"
    if sums.get("self") != files.digest(json.dumps(sums.get("files"), sort_keys=True)):
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
    """The JSON that `Checkpoints.save` was given, with `format` and `step`. Raises UserError."""
    meta = json.loads((step / "meta" / "metadata").read_text(encoding="utf-8"))
    if meta["format"] != FORMAT:
        raise UserError(
            f"{step} is a checkpoint of format {meta['format']}, this version reads {FORMAT}"
        )
    return meta


def newest_step(folder: Path) -> Path:
    """The newest step whose parameters are complete; skipped ones are named on stderr.

    Raises UserError where there is none.
    """
    for step in reversed(steps_in(folder)):
        if not (problem := fault(folder / str(step), _FOR_READERS)):
            return folder / str(step)
        cli.say(f"warning: skipped the checkpoint of step {step}: {problem}")
    raise UserError(
        f"{folder} holds no complete checkpoint; "
        "train first, or point --checkpoint at a run's workdir"
    )


def workdir_of(path: Path) -> tuple[Path, Path | None]:
    """(workdir, the step's folder or None) of a path that is a workdir or a step in one."""
    is_step = path.name.isdigit() and (path / "meta").is_dir()
    return (path.parent.parent, path) if is_step else (path, None)


def load_run(path: Path) -> Run:
    """A workdir's newest complete step, or the step whose folder `path` is. Raises UserError."""
    path = path.expanduser().resolve()  # under a relative path orbax finds nothing, in silence
    workdir, step = workdir_of(path)
    if not (workdir / "config.json").is_file():
        raise UserError(
            f"--checkpoint={path}: no config.json, so this is no workdir of gptjax.train "
            "(or the run has not started)"
        )
    if step is None:
        step = newest_step(workdir / "checkpoints")
    elif problem := fault(step, _FOR_READERS):
        raise UserError(f"--checkpoint={path}: {problem}; pick another step")
    meta = read_meta(step)
    config, tokenizer = from_stored(meta["config"]), load_tokenizer(workdir / "tokenizer")
    return Run(config, load_params(step), tokenizer, meta.get("base", ""))


def stored_shapes(item: Path) -> Any:
    """Shapes and dtypes of an item of a step, as a nested dict."""
    return ocp.StandardCheckpointer().metadata(item).item_metadata.tree


def load_params(step: Path) -> Any:
    """The parameters of a step on the default device, without the optimizer's state."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device),
        stored_shapes(step / "params"),
    )
    return ocp.StandardCheckpointer().restore(step / "params", target)
