"""Checkpoints written: steps under a folder, saved by orbax while the run goes on, with checksums.

Before orbax renames a finished step into its place, `checksums.json` is written into it; no step
without matching checksums is ever read (`workdir.py` describes the layout and reads it).
`Checkpoints` serves a run, `write_run` makes a workdir of parameters from elsewhere.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
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

# Files of a step that have no checksum: orbax writes them later, or they are the checksums.
_WITHOUT_CHECKSUM = {CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt"}


def _write_checksums(folder: Path) -> None:
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in _WITHOUT_CHECKSUM:
            sums[name] = (path.stat().st_size, files.sha256(path))
    text = json.dumps(sums, sort_keys=True)
    files.write_text(folder / CHECKSUMS, json.dumps({"self": files.digest(text), "files": sums}))


_default_unraisablehook = sys.unraisablehook


def _hide_closed_loops(problem: Any) -> None:
    """Hides what follows a failed save.

    When one write fails, as where the disk is full, orbax closes the loop that its other writes,
    tens of them, report to, and each would print a traceback.
    """
    error = problem.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        _default_unraisablehook(problem)


def _reason(error: Exception, folder: Path) -> str:
    """Why a save failed, in a line. The libraries below say it at the end of long sentences."""
    if match := re.search(r"os_error_code='(\d+)'", str(error)):
        number = int(match[1])
        error = OSError(number, os.strerror(number), str(folder))
    elif isinstance(error, OSError) and not error.filename:
        error = OSError(error.errno, error.strerror, str(folder))
    if isinstance(error, OSError):
        return files.explain(error).splitlines()[0]
    return files.reason(error)


class Checkpoints:
    """The steps under one folder, for the process that writes them.

    keep: how many of the newest stay. A save that fails is reported, counted in `failures` and
    does not stop the run. (Readers use `newest_step` and `load_params` of workdir.py.)
    """

    def __init__(self, folder: Path, *, keep: int):
        self.folder = folder.resolve()
        self.failures = 0
        self._pending: int | None = None
        if jax.process_index() == 0:
            files.make_folder(self.folder)
            self._remove_unfinished("*")
        # a failed save is reported here, once, and not as a traceback
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sys.unraisablehook = _hide_closed_loops
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # folders are made in the main thread: one that cannot be made must raise here, and
            # not hang the process at its exit
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False,
                post_finalization_callback=self._add_checksums,
            ),
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def _unfinished(self, step: int | str | None) -> list[Path]:
        return list(self.folder.glob(f"{step}.orbax-checkpoint-tmp*"))

    def _remove_unfinished(self, step: int | str | None) -> None:
        for folder in self._unfinished(step):
            shutil.rmtree(folder, ignore_errors=True)

    def _add_checksums(self) -> None:
        if jax.process_index() == 0:
            for folder in self._unfinished(self._pending):
                _write_checksums(folder)

    def save(self, state: TrainState, meta: dict[str, Any], *, wait: bool = False) -> bool:
        """Starts to save the state, after the save before it has ended.

        meta: JSON for `read_meta`. wait: until it is on disk. Returns False where this save or
        the one before was seen to fail.
        """
        step = int(state.step)
        failures_before = self.failures
        self._finish_pending()
        if step not in steps_in(self.folder):
            self._pending = step
            optimizer = {
                "step": state.step,
                "rng": state.rng,
                "opt_state": tree.flatten(state.opt_state),
            }
            items = {
                "params": ocp.args.StandardSave(state.params),
                "optimizer": ocp.args.StandardSave(optimizer),
                "meta": ocp.args.JsonSave({**meta, "format": FORMAT, "step": step}),
            }
            try:
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            except (OSError, ValueError) as error:
                self._report_failure(error)
        if wait:
            self._finish_pending()
        return self.failures == failures_before

    def save_params(self, params: Any, meta: dict[str, Any]) -> None:
        """Saves parameters without an optimizer's state as step 0, and waits for it."""
        self._pending = 0
        items = {
            "params": ocp.args.StandardSave(params),
            "meta": ocp.args.JsonSave({**meta, "format": FORMAT, "step": 0}),
        }
        self._manager.save(0, args=ocp.args.Composite(**items), force=True)
        self._manager.wait_until_finished()

    def _finish_pending(self) -> None:
        """Waits for the save under way and reports its failure."""
        try:
            self._manager.wait_until_finished()
        # orbax passes on whatever its writer thread raised: OSError, ValueError, ...
        except Exception as error:
            self._report_failure(error)

    def _report_failure(self, error: Exception) -> None:
        self.failures += 1
        reason = _reason(error, self.folder)
        cli.say(f"warning: the checkpoint of step {self._pending} could not be written: {reason}")
        self._remove_unfinished(self._pending)
        self._manager.reload()

    def restore(
        self, target: TrainState, shardings: TrainState
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest complete step, placed by `shardings`, and its meta; None in an empty folder.

        target: shapes and dtypes. Damaged steps are named and moved aside, never deleted. Raises
        UserError when there are steps and none is complete, or when shapes differ.
        """
        steps = steps_in(self.folder)
        if not steps:
            return None
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            problem = fault(self.folder / str(step))
            if not problem:
                self._set_aside(damaged)
                meta = read_meta(self.folder / str(step))
                return self._restore(step, target, shardings), meta
            damaged[step] = problem
        listed = "; ".join(f"step {s}: {p}" for s, p in list(damaged.items())[:3])
        raise UserError(
            f"{self.folder}: no checkpoint is complete ({listed})\n"
            "Restore one from a copy, or start over in another --workdir."
        )

    def _set_aside(self, damaged: dict[int, str]) -> None:
        for step, problem in damaged.items():
            target = files.place_for_damaged(self.folder.parent, str(step))
            cli.say(f"warning: skipped the checkpoint of step {step}: {problem}; moved to {target}")
            if jax.process_index() == 0:
                target.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(target)
        if damaged:
            self._manager.reload()

    def _restore(self, step: int, target: TrainState, shardings: TrainState) -> TrainState:
        optimizer = {
            "step": target.step,
            "rng": target.rng,
            "opt_state": tree.flatten(target.opt_state),
        }
        optimizer_shardings = {
            "step": shardings.step,
            "rng": shardings.rng,
            "opt_state": tree.flatten(shardings.opt_state),
        }
        items = {
            "params": _placed_shapes(target.params, shardings.params),
            "optimizer": _placed_shapes(optimizer, optimizer_shardings),
        }
        for name, shapes in items.items():
            stored = stored_shapes(self.folder / str(step) / name)
            if differences := tree.difference(shapes, stored):
                raise UserError(
                    f"{self.folder}/{step} is of another model or optimizer: "
                    f"{'; '.join(differences[:4])}"
                )
        args = {name: ocp.args.StandardRestore(shapes) for name, shapes in items.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        rest = restored["optimizer"]
        opt_state = tree.map_with_path(lambda path, _: rest["opt_state"][path], target.opt_state)
        return TrainState(rest["step"], restored["params"], opt_state, rest["rng"])

    def close(self) -> None:
        """Waits for the save under way; nothing can be saved after that."""
        self._finish_pending()
        try:
            self._manager.close()
        except Exception as error:  # orbax raises once more what stopped an earlier save
            if not self.failures:
                cli.say(f"warning: at the end of saving: {_reason(error, self.folder)}")


def _placed_shapes(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def write_run(workdir: Path, config: Config, params: Any, text_tokenizer: Tokenizer) -> None:
    """A workdir with these parameters as step 0, without an optimizer's state, for `load_run`."""
    tokens = text_tokenizer.fingerprint
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    checkpoints.save_params(params, {"config": to_dict(config), "data": "", "tokenizer": tokens})
    checkpoints.close()
    files.write_text(workdir / "config.json", to_json(config))
    text_tokenizer.save(workdir / "tokenizer")
