"""When a run may go on, and how it saves: the policy over `checkpoints.store.Checkpoints`.

A run is resumed only where its numbers would be those of the run never stopped. Parameters that
are not finite are never saved; a save that fails is tried once more; the state with the lowest
held-out loss is kept under best/.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.checkpoints.store import Checkpoints
from gptjax.checkpoints.workdir import fault, read_meta, steps_in
from gptjax.config.build import changes, from_stored
from gptjax.config.errors import UserError
from gptjax.config.schema import Config
from gptjax.core import cli, files
from gptjax.core.types import Array, Params, TrainState
from gptjax.tokenizer.base import Tokenizer
from gptjax.tokenizer.kinds import load_tokenizer

_FINGERPRINTS = {
    "data": "text or its split",
    "tokenizer": "vocabulary",
    "base": "checkpoint under the adapters",
}


def newest_meta(workdir: Path) -> dict[str, Any] | None:
    """What the newest checkpoint whose description is intact says of its run; None in a new one."""
    for step in reversed(steps_in(workdir / "checkpoints")):
        folder = workdir / "checkpoints" / str(step)
        if not fault(folder, ("meta/",)):  # else `restore` will name it
            return read_meta(folder)
    return None


def check_same_run(workdir: Path, config: Config, fingerprints: dict[str, str]) -> None:
    """Refuses to continue a run whose numbers would change. Raises UserError with each change."""
    meta = newest_meta(workdir)
    if meta is None:
        return
    stored = from_stored(meta["config"])
    differences = changes(stored, config)
    for name, what in _FINGERPRINTS.items():
        if meta.get(name, "") != fingerprints[name]:
            differences.append(f"{name}: the {what} changed since the run began")
            if name == "data":  # which of these did it
                every = changes(stored, config, shaping_only=False)
                listed = [line for line in every if line.startswith("data.")]
                differences += [line for line in listed if line not in differences]
    if not differences:
        return
    if len(differences) > 4:
        differences = [*differences[:3], f"and {len(differences) - 3} more"]
    lines = "\n  ".join(differences)
    raise UserError(
        f"{workdir} holds a run with other settings (old -> new):\n  {lines}\n"
        "Use the old ones (see config.json there) or another --workdir; to train further with "
        f"new ones,\nstart a new run with --config.train.init_from={workdir}."
    )


def kept_tokenizer(workdir: Path, config: Config) -> Tokenizer | None:
    """The tokenizer that a run trained on its text and keeps in its workdir, to go on with.

    None where none was trained, the settings differ, or it cannot be read: it is then made again,
    and `check_same_run` compares the two.
    """
    meta, data = newest_meta(workdir), config.data
    trains_one = data.tokenizer == "sentencepiece" and not data.tokenizer_path
    if meta is None or not trains_one or data.source == "shards":
        return None
    try:
        stored = from_stored(meta["config"]).data
        if (stored.tokenizer, stored.tokenizer_vocab) != (data.tokenizer, data.tokenizer_vocab):
            return None
        return load_tokenizer(workdir / "tokenizer")
    except (UserError, OSError, ValueError, KeyError) as error:
        cli.say(f"warning: the run's own tokenizer: {files.reason(error)}; it is made again")
        return None


def stored_fingerprint(workdir: Path) -> str:
    """The fingerprint of the data of the run in a workdir; "" in a new one."""
    return (newest_meta(workdir) or {}).get("data", "")


@jax.jit
def all_finite(params: Params) -> Array:
    """bool scalar: no parameter is NaN or infinite."""
    return jnp.all(jnp.stack([jnp.isfinite(p).all() for p in jax.tree.leaves(params)]))


class RunCheckpoints:
    """The checkpoints of a run that trains: checkpoints/ and best/ in its workdir.

    meta: stored with every checkpoint, and compared by `check_same_run`.
    """

    def __init__(self, workdir: Path, meta: dict[str, Any], *, max_to_keep: int) -> None:
        self._workdir, self._meta = workdir, meta
        self._checkpoints = Checkpoints(workdir / "checkpoints", keep=max_to_keep)

    def restore(self, shapes: TrainState, shardings: TrainState) -> TrainState | None:
        """The newest intact state, or None in a new run. Raises UserError where none is intact."""
        restored = self._checkpoints.restore(shapes, shardings)
        return restored[0] if restored else None

    def save(self, state: TrainState, *, wait: bool) -> bool:
        """Whether the state was written, or (without `wait`) its writing began.

        Raises UserError for parameters that are not finite.
        """
        if not bool(all_finite(state.params)):
            raise UserError(
                f"step {int(state.step)}: a parameter is not finite; the run stops and keeps the "
                "last checkpoint.\nLower optim.lr or raise optim.eps, in a new --workdir."
            )
        if self._checkpoints.save(state, self._meta, wait=wait) or not wait:
            return True
        # Once more, as a failure may pass; but where only some of several processes failed, a
        # retry would wait for the others forever.
        return jax.process_count() == 1 and self._checkpoints.save(state, self._meta, wait=True)

    def save_best(self, state: TrainState, loss: float) -> None:
        """Keeps the state under best/ where `loss` is the lowest so far, and only then.

        Where that cannot be written, this is said and the run goes on.
        """
        try:
            self._save_best(self._workdir / "best", state, loss)
        except OSError as error:  # such as a file in the place of the folder
            cli.say(
                f"warning: the best checkpoint, of step {int(state.step)}, could not be written: "
                f"{files.explain(error).splitlines()[0]}"
            )

    def _save_best(self, folder: Path, state: TrainState, loss: float) -> None:
        losses = [
            read_meta(folder / str(step))["eval_loss"]
            for step in steps_in(folder)
            if not fault(folder / str(step), ("meta/",))
        ]
        if loss < min(losses, default=math.inf):
            best = Checkpoints(folder, keep=1)
            best.save(state, {**self._meta, "eval_loss": loss}, wait=True)
            best.close()

    def close(self) -> None:
        self._checkpoints.close()
