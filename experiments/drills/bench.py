"""What the drills use: a run as a process with a watchdog, its outcome, and a checker of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptjax.checkpoints.workdir import fault, steps_in

ROOT = Path(__file__).parents[2]
WATCHDOG_SECONDS = 120
_WITHOUT_RIGHTS = """
import ctypes, os, sys
for right in (1, 2):  # root's rights over any file, dropped from the bounding set (24)
    ctypes.CDLL(None).prctl(24, right, 0, 0, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""  # a program, for preexec_fn forks this process, which holds JAX's threads
FLAGS = (
    "--config=configs/debug.py",
    "--config.model.layers=1",
    "--config.model.width=16",
    "--config.model.heads=2",
    "--config.model.context=16",
    "--config.data.source=text",
    "--config.data.eval_fraction=0.1",
    "--config.train.grad_accum_steps=1",
    "--config.train.eval_every=0",
    "--config.train.save_every=0",
    "--config.train.sample_tokens=4",
)


class HangError(Exception):
    """The watchdog had to end a process."""


class Running:
    """A command under way. lines: what it has written to stderr, where that is a pipe of ours."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self.process = process
        self.lines: list[str] = []
        self.hung = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._watchdog = threading.Timer(seconds, self._bite)
        self._watchdog.daemon = True
        self._watchdog.start()

    def _read(self) -> None:
        if self.process.stderr:
            with self.process.stderr as stderr:
                for line in stderr:
                    self.lines.append(line)

    def _bite(self) -> None:
        self.hung = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str) -> None:
        """Until stderr has the text, or the process has ended."""
        while text not in self.text and self.process.poll() is None:
            time.sleep(0.01)

    def end(self) -> int:
        """Waits for the end. Returns the exit code; raises HangError."""
        code = self.process.wait()
        self._watchdog.cancel()
        self._reader.join(5)
        if self.hung:
            raise HangError(self.text[-2000:])
        return code


class Bench:
    """A folder for one drill, with a corpus, and a cache of its own or the shared one."""

    def __init__(self, folder: Path, shared_cache: Path) -> None:
        self.folder, self.shared_cache = folder, shared_cache
        folder.mkdir(parents=True)
        self.run = folder / "run"
        self.corpus = folder / "corpus.txt"
        self.corpus.write_text("the people saw the winter in a small town\n" * 800)
        self.env: dict[str, str] = {"GPTJAX_CACHE": str(shared_cache)}
        self.python_path = str(ROOT)

    def own_cache(self) -> Path:
        """A copy of the shared cache, for a drill that damages it."""
        cache = self.folder / "cache"
        shutil.copytree(self.shared_cache, cache, ignore=shutil.ignore_patterns("damaged"))
        self.env["GPTJAX_CACHE"] = str(cache)
        return cache

    def start(
        self,
        command: str,
        *flags: str,
        shell: str = "{}",
        seconds: float = WATCHDOG_SECONDS,
        powerless: bool = False,
        **options: Any,
    ) -> Running:
        """A command of the package under way. shell: what bash runs, with {} for the command.

        powerless: without root's rights over any file.
        """
        words = [sys.executable, "-m", f"gptjax.{command}", *flags]
        quoted = " ".join(f"'{word}'" for word in words)
        drops = powerless and os.geteuid() == 0
        under = [sys.executable, "-c", _WITHOUT_RIGHTS] if drops else []
        options = {"stderr": subprocess.PIPE} | options
        environment = {**os.environ, "PYTHONPATH": self.python_path, "JAX_PLATFORMS": "cpu"}
        for name in ("JAX_COMPILATION_CACHE_DIR", "PYTHONUNBUFFERED", "XLA_FLAGS"):
            environment.pop(name, None)
        with open(self.folder / "stdout", "w") as stdout:
            process = subprocess.Popen(
                [*under, "bash", "-c", shell.replace("{}", quoted)],
                cwd=ROOT,
                env=environment | self.env,
                stdin=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
                **({"stdout": stdout} | options),
            )
        return Running(process, seconds)

    def train(self, *flags: str, steps: int = 60, **options: Any) -> Running:
        """`gptjax.train` under way, in the drill's workdir."""
        return self.start(
            "train",
            *FLAGS,
            f"--config.data.path={self.corpus}",
            f"--workdir={self.run}",
            "--config.data.tokenizer=bytes",
            f"--config.train.steps={steps}",
            "--config.train.log_every=5",
            *flags,
            **options,
        )

    def begin(self, *, steps: int = 60) -> None:
        """A run that stopped after 20 of its steps."""
        running = self.train("--config.train.stop_at=20", steps=steps)
        code = running.end()
        assert code == 0 and self.saved() == 20, running.text

    def saved(self) -> int:
        """The newest step whose checkpoint is whole; 0 where there is none."""
        folder = self.run / "checkpoints"
        whole = [step for step in steps_in(folder) if not fault(folder / str(step))]
        return max(whole, default=0)

    def record(self) -> dict[str, Any]:
        return json.loads((self.run / "run.json").read_text())

    def logged(self) -> list[int]:
        """Steps of metrics.jsonl, each line of which must be whole."""
        lines = (self.run / "metrics.jsonl").read_bytes().splitlines()
        return [json.loads(line)["step"] for line in lines]

    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()


@contextlib.contextmanager
def small_disk(at: Path, mebibytes: float) -> Iterator[Path]:
    """A tmpfs of that size, mounted at the folder (root)."""
    at.mkdir(parents=True, exist_ok=True)
    size = f"size={int(mebibytes * 1024)}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def can_mount() -> bool:
    """Whether small disks can be made here: as root, where the system allows it."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    probe = Path("/tmp") / f"gptjax-mount-{os.getpid()}"
    try:
        with small_disk(probe, 0.1):
            return True
    except (subprocess.CalledProcessError, OSError):
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.rmdir()


def fill(disk: Path) -> Path:
    """Takes all the space that is left, in a file that is returned."""
    path = disk / "filler"
    with open(path, "ab", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 16, 1 << 10):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size) == size:
                    pass
    return path


Drill = Callable[[Bench], str]
