"""Weights & Biases: the extra `gptjax[wandb]`.

Its own environment variables hold: WANDB_MODE (online, offline, disabled), WANDB_PROJECT (here
`gptjax` where it is not set), WANDB_ENTITY, WANDB_API_KEY. Without a key the run is recorded
offline in the workdir's `wandb/`, and `wandb sync FOLDER` uploads it later.
"""

from __future__ import annotations

import os
import secrets

from gptjax.tracking.base import TrackedRun, stored_run_id

PACKAGE, INSTALL = "wandb", "pip install 'gptjax[wandb]'"


class WandbTracker:
    """A run of W&B, whose id is in the workdir's `wandb/run_id`: a resumed run continues it.

    Steps that were logged before a kill and are done again carry the same numbers (resume is
    exact); W&B keeps the first of them.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        mode = None
        if not os.environ.get("WANDB_MODE") and not wandb.login(prompt=False):
            mode = "offline"  # it would ask for a key and wait for the answer
        self._run = wandb.init(
            dir=str(run.workdir),
            id=stored_run_id(run.workdir / "wandb", lambda: secrets.token_hex(4)),
            resume="allow",
            project=os.environ.get("WANDB_PROJECT") or "gptjax",
            name=run.workdir.resolve().name,
            config=run.config,
            allow_val_change=True,  # a resumed run may change settings that only report
            mode=mode,
            settings=wandb.Settings(console="off"),  # our output stays as it is
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def start(run: TrackedRun) -> WandbTracker:
    return WandbTracker(run)
