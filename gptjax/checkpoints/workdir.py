"""Checkpoints of a run: saved asynchronously by orbax, proven whole before anything trains from them.

A step holds `params`, `optimizer` ({"step", "rng", "opt_state": {path: array}}) and `meta` (JSON), plain dicts of arrays on disk.
Before orbax renames a finished step into place, `checksums.json` with size and sha256 of each file is written into it;
a step whose files do not match is never read. What orbax writes after that (commit time, commit marker) holds no state.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gptjax import cli, files, tokenizer, tree
from gptjax.config import Config, UserError, to_dict, to_json
from gptjax.settings import build, changes
from gptjax.steps import TrainState

_SUMS = "checksums.json"
_AFTER = {_SUMS, "_CHECKPOINT_METADATA", "commit_success.txt"}  # written after the checksums, by orbax or as them
FORMAT = 1


def steps_in(folder: Path) -> list[int]:
    """Committed steps, whole or not, oldest first."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir()) if folder.is_dir() else []


def fault(step: Path, parts: tuple[str, ...] = ()) -> str:
    """What is wrong with a committed step, or "". With `parts`, only the files below those items are read."""
    try:
        sums = json.loads((step / _SUMS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{_SUMS} is missing"
    except (ValueError, OSError):
        return f"{_SUMS} is damaged"
    expected = files.digest(json.dumps(sums.get("files"), sort_keys=True)) if isinstance(sums, dict) else ""
    if not expected or sums.get("self") != expected:
        return f"{_SUMS} is damaged"
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


def _write_sums(folder: Path) -> None:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    sums = {name: ((folder / name).stat().st_size, files.sha256(folder / name)) for name in names if name not in _AFTER}
    text = json.dumps(sums, sort_keys=True)
    files.write_text(folder / _SUMS, json.dumps({"self": files.digest(text), "files": sums}))


_other_unraisable = sys.unraisablehook


def _unraisable(problem: Any) -> None:
    """When one write of a save fails, as on a full disk, orbax closes the loop that its other writes, tens of them, report to: each would print a traceback."""
    if not (isinstance(problem.exc_value, RuntimeError) and str(problem.exc_value) == "Event loop is closed"):
        _other_unraisable(problem)


class Checkpoints:
    """The steps under one folder, for the process that writes them (readers use `newest` and `load_params`)."""

    def __init__(self, folder: Path, *, keep: int):
        self.folder = folder.resolve()
        self.failures = 0
        self._pending: int | None = None
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
        for name in ("absl", "asyncio"):  # a failed save is reported here, once, not as a traceback
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sys.unraisablehook = _unraisable
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # in the main thread: a folder that cannot be made must raise here, not hang the process at its exit
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False, post_finalization_callback=self._sign),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def _sign(self) -> None:
        if jax.process_index() == 0:
            for temporary in self.folder.glob(f"{self._pending}.orbax-checkpoint-tmp*"):
                _write_sums(temporary)

    def save(self, state: TrainState, meta: dict[str, Any], *, wait: bool = False) -> bool:
        """Starts saving; a failure of this or the previous save is reported, counted and does not stop the run. True: no failure seen."""
        step = int(state.step)
        before = self.failures
        self._collect()
        if step not in steps_in(self.folder):
            self._pending = step
            optimizer = {"step": state.step, "rng": state.rng, "opt_state": tree.flatten(state.opt_state)}
            args = ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(optimizer),
                meta=ocp.args.JsonSave({**meta, "format": FORMAT, "step": step}),
            )
            try:
                self._manager.save(step, args=args, force=True)
            except (OSError, ValueError) as error:
                self._failed(error)
        if wait:
            self._collect()
        return self.failures == before

    def save_params(self, params: Any, meta: dict[str, Any]) -> None:
        """Parameters alone as step 0, waited for."""
        self._pending = 0
        items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave({**meta, "format": FORMAT, "step": 0})}
        self._manager.save(0, args=ocp.args.Composite(**items), force=True)
        self._manager.wait_until_finished()

    def _collect(self) -> None:
        """Waits for the save under way and reports its failure."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax passes on whatever its writer thread met: OSError, ValueError RESOURCE_EXHAUSTED, ...
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        cli.say(f"warning: the checkpoint of step {self._pending} could not be written: {(str(error) or repr(error)).splitlines()[0][:300]}")
        for leftover in self.folder.glob(f"{self._pending}.orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._manager.reload()

    def restore(self, target: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole step onto `shardings`, or None in an empty folder. Damaged steps are named and moved aside, never deleted.

        target: shapes and dtypes. Raises UserError when there are steps and none is whole, or when shapes differ.
        """
        steps = steps_in(self.folder)
        if not steps:
            return None
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            if not (problem := fault(self.folder / str(step))):
                self._set_aside(damaged)
                meta = read_meta(self.folder / str(step))
                return self._restore(step, target, shardings), meta
            damaged[step] = problem
        listed = "; ".join(f"step {s}: {p}" for s, p in list(damaged.items())[:3])
        raise UserError(f"{self.folder}: no checkpoint is whole ({listed})\nRestore one from a copy, or start over in another --workdir.")

    def _set_aside(self, damaged: dict[int, str]) -> None:
        for step, problem in damaged.items():
            target = self.folder.parent / "damaged" / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**6}"
            cli.say(f"warning: skipped the checkpoint of step {step}: {problem}; moved to {target}")
            if jax.process_index() == 0:
                target.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(target)
        if damaged:
            self._manager.reload()

    def _restore(self, step: int, target: TrainState, shardings: TrainState) -> TrainState:
        moments = tree.flatten(target.opt_state)
        places = tree.flatten(shardings.opt_state)
        wanted = {
            "params": _abstract(target.params, shardings.params),
            "optimizer": _abstract(
                {"step": target.step, "rng": target.rng, "opt_state": moments},
                {"step": shardings.step, "rng": shardings.rng, "opt_state": places},
            ),
        }
        for name, shapes in wanted.items():
            if rows := tree.difference(shapes, _stored(self.folder / str(step) / name)):
                raise UserError(f"{self.folder}/{step} is of another model or optimizer: {'; '.join(rows[:4])}")
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(shapes) for name, shapes in wanted.items()})
        found = self._manager.restore(step, args=args)
        rest = found["optimizer"]
        opt_state = tree.map_with_path(lambda path, _: rest["opt_state"][path], target.opt_state)
        return TrainState(rest["step"], found["params"], opt_state, rest["rng"])

    def close(self) -> None:
        self._collect()
        self._manager.close()


def _abstract(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings)


def read_meta(step: Path) -> dict[str, Any]:
    """The JSON that `save` was given, with `format` and `step`."""
    meta = json.loads((step / "meta" / "metadata").read_text(encoding="utf-8"))
    if meta["format"] != FORMAT:
        raise UserError(f"{step} is a checkpoint of format {meta['format']}, this version reads {FORMAT}")
    return meta


def newest(folder: Path) -> Path:
    """The newest step whose parameters are whole, for readers; skipped ones are named on stderr."""
    for step in reversed(steps_in(folder)):
        if not (problem := fault(folder / str(step), ("params/", "meta/"))):
            return folder / str(step)
        cli.say(f"warning: skipped the checkpoint of step {step}: {problem}")
    raise UserError(f"{folder} holds no whole checkpoint; train first, or point --checkpoint at a run's workdir")


def check_same_run(workdir: Path, config: Config, fingerprints: dict[str, str]) -> None:
    """Refuses to continue a run whose numbers would change, and names each difference."""
    for step in reversed(steps_in(workdir / "checkpoints")):
        if fault(workdir / "checkpoints" / str(step), ("meta/",)):
            continue  # `restore` will name it
        meta = read_meta(workdir / "checkpoints" / str(step))
        rows = changes(build(meta["config"]), config)
        rows += [
            f"{name}: the {what} changed since the run began" for name, what in _FINGERPRINTS.items() if meta.get(name, "") != fingerprints[name]
        ]
        if not rows:
            return
        shown = "\n  ".join(rows if len(rows) <= 4 else [*rows[:3], f"and {len(rows) - 3} more"])
        raise UserError(f"{workdir} holds a run with other settings (old -> new):\n  {shown}\nUse the old ones, or another --workdir.")


_FINGERPRINTS = {"data": "text or its split", "tokenizer": "vocabulary", "base": "checkpoint under the adapters"}


def workdir_of(path: Path) -> tuple[Path, Path | None]:
    """(workdir, the step's folder where the path is one) of what names a run: its workdir or one of its steps."""
    is_step = path.name.isdigit() and (path / "meta").is_dir()
    return (path.parent.parent, path) if is_step else (path, None)


def load_run(path: Path) -> tuple[Config, Any, tokenizer.Tokenizer, str]:
    """(config, parameters, tokenizer, `convert.digest` of what its adapters stand on) of a run's workdir (its newest whole step) or of one step's folder."""
    path = path.expanduser().resolve()  # orbax finds nothing under a relative path, and says nothing
    workdir, step = workdir_of(path)
    if not (workdir / "config.json").is_file():
        raise UserError(f"--checkpoint={path}: no config.json, so this is no workdir of gptjax.train (or the run has not started)")
    if step is None:
        step = newest(workdir / "checkpoints")
    elif problem := fault(step, ("params/", "meta/")):
        raise UserError(f"--checkpoint={path}: {problem}; pick another step")
    meta = read_meta(step)
    return build(meta["config"]), load_params(step), tokenizer.load(workdir / "tokenizer"), meta.get("base", "")


def _stored(item: Path) -> Any:
    """Shapes and dtypes of an item on disk, as a nested dict."""
    return ocp.StandardCheckpointer().metadata(item).item_metadata.tree


def load_params(step: Path) -> Any:
    """The parameters of a step as host arrays on the default device, without its optimizer state."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=place), _stored(step / "params"))
    return ocp.StandardCheckpointer().restore(step / "params", target)


def write_run(workdir: Path, config: Config, params: Any, text_tokenizer: tokenizer.Tokenizer) -> None:
    """A workdir that holds these parameters as step 0, without an optimizer's state: `load_run` reads it."""
    tokens = text_tokenizer.fingerprint
    manager = Checkpoints(workdir / "checkpoints", keep=1)
    manager.save_params(params, {"config": to_dict(config), "data": "", "tokenizer": tokens})
    manager.close()
    files.write_text(workdir / "config.json", to_json(config))
    text_tokenizer.save(workdir / "tokenizer")
