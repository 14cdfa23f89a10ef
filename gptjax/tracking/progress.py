"""What a run tells while it goes: `metrics.jsonl` always, TensorBoard where it is installed, a progress bar or plain lines.

Every record has `step` and `time`; names are `group/name` (train, eval, perf, mem). Rates count from the first step after compilation.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax

from gptjax import cli, files
from gptjax.config import Config, UserError

# Dense bfloat16 peak in FLOP/s: Google Cloud TPU documentation and NVIDIA data sheets (without sparsity).
PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA L4": 121e12, "Tesla T4": 65e12, "Tesla V100": 125e12,
}  # fmt: skip


def peak_flops(device: jax.Device) -> float | None:
    """Peak of one device, or None for an unknown one: then no MFU is printed."""
    names = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def flops_per_token(config: Config, params: int) -> float:
    """Training FLOPs per token: 6 per weight that multiplies (4 where it is frozen under adapters), plus attention 12 L H C T (Chowdhery et al.
    2022, appendix B). params: of the whole model."""
    m = config.model
    lookups = 0 if m.tied else m.vocab_size * m.width
    lookups += m.context * m.width if m.positions == "learned" else 0
    return (4 if config.lora.on else 6) * (params - lookups) + 12 * m.layers * m.heads * m.head_width * config.length


class Compiles:
    """Counts XLA compilations and their seconds, and hits and misses of the cache on disk, from jax.monitoring."""

    def __init__(self) -> None:
        self.count, self.seconds, self.hits, self.misses = 0, 0.0, 0, 0
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)

    def _duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += duration_secs

    def _event(self, event: str, **_: Any) -> None:
        self.hits += event == "/jax/compilation_cache/cache_hits"
        self.misses += event == "/jax/compilation_cache/cache_misses"


def enable_compile_cache() -> None:
    """Programs compiled once are read from disk afterwards; JAX_COMPILATION_CACHE_DIR is honoured."""
    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        jax.config.update("jax_compilation_cache_dir", str(files.cache_dir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


JUDGED = ("eval/", "answers/")  # names of scores: over the whole held-out split, and of the answers written to some of it


def shown(name: str) -> str:
    """The name of a score as people read it."""
    return name.removeprefix("eval/").replace("answers/", "answers: ")


def keep_freed_memory() -> None:
    """XLA's CPU buffers of one step become those of the next: glibc keeps freed blocks instead of handing each back to the kernel, which would
    fault fresh pages in every time (measured in experiments/LOG.md). Call it before the first array; elsewhere a no-op."""
    if _mallopt({-4: 0, -1: 2**31 - 1}):  # <malloc.h>: M_MMAP_MAX, M_TRIM_THRESHOLD
        # steps run in the thread that asks for them: the heap of any other ends at 64 MB, and a larger block would be mapped anew all the same
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def return_freed_memory() -> None:
    """The contrary: blocks of a MiB and more go back as soon as they are freed, so that memory holds what is in use."""
    _mallopt({-3: 1 << 20, -8: 1})  # M_MMAP_THRESHOLD, which would grow with the blocks freed; M_ARENA_MAX: one heap for all threads


def _mallopt(options: dict[int, int]) -> bool:
    """Whether this C library has such options; not all do."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:
        return False
    for name, value in options.items():
        mallopt(name, value)
    return True


class Tracker:
    """Appends records to `metrics.jsonl` and TensorBoard. Records past `start` (of a killed run) are dropped when a run goes on."""

    def __init__(self, workdir: Path, *, start: int):
        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in read_jsonl(self.path) if line["step"] <= start]
            files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - held for the run
        self._board = None
        if importlib.util.find_spec("tensorboardX"):
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(str(workdir / "tb"), purge_step=start + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        record = {"step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps({k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in record.items()}) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


class StepMetrics:
    """Metrics of the steps since the last log line; still on the device until `flush`, so that steps overlap with the host (not on a CPU)."""

    def __init__(self, positions: int) -> None:
        """positions: B x T of a step, which is what it computes however many of them are learned."""
        self._positions = positions
        self._pending: list[dict[str, jax.Array]] = []
        self._since, self._waited = time.monotonic(), 0.0

    def add(self, step_metrics: dict[str, jax.Array], waited: float) -> None:
        self._pending.append(step_metrics)
        self._waited += waited

    def restart_clock(self) -> None:
        self._since, self._waited = time.monotonic(), 0.0

    def flush(self, last_step: int) -> dict[str, float]:
        """Token-weighted means and rates. Raises UserError at the first step with a non-finite loss or gradient."""
        rows = [{k: float(v) for k, v in row.items()} for row in jax.device_get(self._pending)]
        self._pending = []
        if not rows:
            return {}
        for offset, row in enumerate(rows, 1):
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                step = last_step - len(rows) + offset
                raise UserError(
                    f"step {step}: the loss is {row['loss']} and the gradient norm {row['grad_norm']}; the run stops and keeps the last checkpoint.\n"
                    "Lower optim.lr, lengthen optim.warmup_steps, or set optim.clip = 1.0, in a new --workdir."
                )
        tokens = sum(row["tokens"] for row in rows)
        seconds = time.monotonic() - self._since
        values = {
            "train/loss": sum(row["loss"] * row["tokens"] for row in rows) / tokens,
            "train/grad_norm": rows[-1]["grad_norm"],
            "train/lr": rows[-1]["lr"],
            "perf/tokens_per_sec": self._positions * len(rows) / seconds,
            "perf/step_time": seconds / len(rows),
            "perf/data_wait": self._waited / len(rows),
        }
        values |= {f"train/{name}": sum(row[name] for row in rows) / len(rows) for name in ("reward", "answer_tokens") if name in rows[0]}
        self.restart_clock()
        return values


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file; a last line that a killed process left half-written is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def memory() -> dict[str, float]:
    """Peak memory in GiB: of the first device where the backend tells, else of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"mem/peak_gib": peak / 2**30}


class Progress:
    """A bar with loss, tokens/s and ETA on a terminal; elsewhere a line whenever `show` is called."""

    def __init__(self, *, start: int, steps: int):
        self.steps, self._start, self._began = steps, start, time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("train", total=steps, completed=start, text="")
            self._bar.start()

    def begin(self) -> None:
        """The clock of the ETA starts: compilation is over."""
        self._began = time.monotonic()

    def show(self, step: int, values: dict[str, float]) -> None:
        done, elapsed = step - self._start, time.monotonic() - self._began
        eta = elapsed / max(done, 1) * (self.steps - step)
        parts = [f"reward {values['train/reward']:.3f}"] if "train/reward" in values else [f"loss {values['train/loss']:.4f}"]
        parts += [f"lr {values['train/lr']:.2e}"]
        if "perf/tokens_per_sec" in values:
            parts.append(f"{values['perf/tokens_per_sec']:,.0f} tokens/s")
        parts.append(f"ETA {duration(eta)}")
        self._say(step, "  ".join(parts))

    def note(self, step: int, text: str) -> None:
        """A line that stays, such as an evaluation."""
        if self._bar:
            self._bar.console.print(f"step {step}: {text}", highlight=False)
        else:
            cli.say(f"step {step}: {text}")

    def _say(self, step: int, text: str) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        else:
            cli.say(f"step {step}/{self.steps}  {text}")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s` or `12 s`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
