"""TODO docstring."""

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

from gptjax.checkpoints.workdir import CHECKSUMS, FORMAT, fault, read_meta, steps_in, stored_shapes
from gptjax.config.errors import UserError
from gptjax.config.schema import Config, to_dict, to_json
from gptjax.core import cli, files, tree
from gptjax.core.types import TrainState
from gptjax.tokenizer.base import Tokenizer

_AFTER = {
    CHECKSUMS,
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
}  # written after the checksums, by orbax or as them


def _write_sums(folder: Path) -> None:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    sums = {
        name: ((folder / name).stat().st_size, files.sha256(folder / name))
        for name in names
        if name not in _AFTER
    }
    text = json.dumps(sums, sort_keys=True)
    files.write_text(folder / CHECKSUMS, json.dumps({"self": files.digest(text), "files": sums}))


_other_unraisable = sys.unraisablehook


def _unraisable(problem: Any) -> None:
    """When one write of a save fails, as on a full disk, orbax closes the loop that its other writes, tens of them, report to: each would print a traceback."""
    if not (
        isinstance(problem.exc_value, RuntimeError)
        and str(problem.exc_value) == "Event loop is closed"
    ):
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
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False, post_finalization_callback=self._sign
            ),
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
            optimizer = {
                "step": state.step,
                "rng": state.rng,
                "opt_state": tree.flatten(state.opt_state),
            }
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
        items = {
            "params": ocp.args.StandardSave(params),
            "meta": ocp.args.JsonSave({**meta, "format": FORMAT, "step": 0}),
        }
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
        cli.say(
            f"warning: the checkpoint of step {self._pending} could not be written: {(str(error) or repr(error)).splitlines()[0][:300]}"
        )
        for leftover in self.folder.glob(f"{self._pending}.orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._manager.reload()

    def restore(
        self, target: TrainState, shardings: TrainState
    ) -> tuple[TrainState, dict[str, Any]] | None:
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
        raise UserError(
            f"{self.folder}: no checkpoint is whole ({listed})\nRestore one from a copy, or start over in another --workdir."
        )

    def _set_aside(self, damaged: dict[int, str]) -> None:
        for step, problem in damaged.items():
            target = (
                self.folder.parent
                / "damaged"
                / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 10**6}"
            )
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
            if rows := tree.difference(shapes, stored_shapes(self.folder / str(step) / name)):
                raise UserError(
                    f"{self.folder}/{step} is of another model or optimizer: {'; '.join(rows[:4])}"
                )
        args = ocp.args.Composite(
            **{name: ocp.args.StandardRestore(shapes) for name, shapes in wanted.items()}
        )
        found = self._manager.restore(step, args=args)
        rest = found["optimizer"]
        opt_state = tree.map_with_path(lambda path, _: rest["opt_state"][path], target.opt_state)
        return TrainState(rest["step"], found["params"], opt_state, rest["rng"])

    def close(self) -> None:
        self._collect()
        self._manager.close()


def _abstract(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings
    )


def write_run(workdir: Path, config: Config, params: Any, text_tokenizer: Tokenizer) -> None:
    """A workdir that holds these parameters as step 0, without an optimizer's state: `load_run` reads it."""
    tokens = text_tokenizer.fingerprint
    manager = Checkpoints(workdir / "checkpoints", keep=1)
    manager.save_params(params, {"config": to_dict(config), "data": "", "tokenizer": tokens})
    manager.close()
    files.write_text(workdir / "config.json", to_json(config))
    text_tokenizer.save(workdir / "tokenizer")
