"""TensorBoard: event files in the workdir's `tb/`. To see them: `tensorboard --logdir runs`."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from gptjax.tracking.base import TrackedRun

PACKAGE, INSTALL = "tensorboardX", "pip install tensorboardX"
_FLUSH_SECONDS = 2.0  # a flush waits for the disk


class TensorBoardTracker:
    """A scalar for each value. Events past the start of a resumed run are purged.

    The file is written here and not by the `SummaryWriter` of tensorboardX, whose own thread dies
    on a full disk, after which its callers wait for ever.
    """

    def __init__(self, run: TrackedRun) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        folder = run.workdir / "tb"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter(str(folder / name))
        self._flushed = 0.0
        start = SessionLog(status=SessionLog.START)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=run.start + 1, file_version="brain.Event:2"))
        self._write(Event(step=run.start + 1, session_log=start))

    def log(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._write(Event(step=step, summary=scalar(name, value)))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())

    def close(self) -> None:
        self._writer.close()


def start(run: TrackedRun) -> TensorBoardTracker:
    return TensorBoardTracker(run)
