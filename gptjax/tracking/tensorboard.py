"""TensorBoard: event files in the workdir's `tb/`. To see them: `tensorboard --logdir runs`."""

from __future__ import annotations

from gptjax.tracking.base import TrackedRun

PACKAGE, INSTALL = "tensorboardX", "pip install tensorboardX"


class TensorBoardTracker:
    """A scalar for each value. Events past the start of a resumed run are purged."""

    def __init__(self, run: TrackedRun) -> None:
        import tensorboardX

        folder = str(run.workdir / "tb")
        self._writer = tensorboardX.SummaryWriter(folder, purge_step=run.start + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def start(run: TrackedRun) -> TensorBoardTracker:
    return TensorBoardTracker(run)
