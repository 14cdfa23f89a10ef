"""Faults that must not stop, block or hide a run: each is made for real, under a watchdog.

    python experiments/drills/faults.py [NAME ...] [--jobs=2]

Prints a line for each: what was broken, and how the run ended. A drill fails where a process hangs,
where it ends with 0 and its work is not done, or where whole checkpoints are not continued. About
5 s a drill. To add one, write a function with `@drill("what is broken")` below its like; small
disks need root and are skipped without.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import Bench, Drill, HangError, can_mount, fill, small_disk

_EVERY_STEP = ("--config.train.log_every=1",)
_SHORT_LIMIT = "ulimit -f 300; exec {}"  # KiB: above the checkpoint's files
DRILLS: dict[str, tuple[str, Drill, bool]] = {}  # name: (fault, function, needs a small disk)


def drill(what: str, *, disk: bool = False) -> Callable[[Drill], Drill]:
    """Enters a function into DRILLS. It returns how the run ended, or raises AssertionError."""

    def enter(function: Drill) -> Drill:
        DRILLS[function.__name__] = (what, function, disk)
        return function

    return enter


def trained(bench: Bench, running, *, code: int = 0, steps: int = 60, says: str = "") -> str:
    """Asserts that all steps are done and saved, whatever else failed."""
    ended = running.end()
    assert ended == code, f"exit code {ended}\n{running.text}"
    assert bench.saved() == steps, running.text
    assert says in running.text, f"{says!r} is not in\n{running.text}"
    assert "Traceback" not in running.text, running.text
    assert code or f"step: {steps}" in bench.stdout()
    return f"trained, {steps} steps saved, exit code {ended}" + (f": {says!r}" if says else "")


# --- standard streams


@drill("the reader of both streams goes away (| head -3)")
def both_streams_head(bench: Bench) -> str:
    shell = "set -o pipefail; {} 2>&1 | head -3"
    return trained(bench, bench.train(shell=shell), code=1)


@drill("the reader of stderr goes away")
def stderr_head(bench: Bench) -> str:
    shell = "{ {} 2>&1 >&3 | head -2 >/dev/null; exit ${PIPESTATUS[0]}; } 3>&1"
    return trained(bench, bench.train(shell=shell))


@drill("stderr on a full disk (/dev/full)")
def stderr_full(bench: Bench) -> str:
    return trained(bench, bench.train(shell="{} 2>/dev/full"))


@drill("stdout on a full disk (/dev/full)")
def stdout_full(bench: Bench) -> str:
    says = "the result could not be written to stdout: No space left on device"
    return trained(bench, bench.train(shell="{} >/dev/full"), code=1, says=says)


@drill("stderr closed at the start")
def stderr_closed(bench: Bench) -> str:
    return trained(bench, bench.train(shell="{} 2>&-"))


@drill("stdout closed at the start")
def stdout_closed(bench: Bench) -> str:
    says = "the result could not be written to stdout: stdout is closed"
    return trained(bench, bench.train(shell="{} >&-"), code=1, says=says)


@drill("all three streams closed at the start")
def all_closed(bench: Bench) -> str:
    return trained(bench, bench.train(shell="{} <&- >&- 2>&-"), code=1)


@drill("a reader of stderr that is there and reads nothing")
def stderr_stuck(bench: Bench) -> str:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, 1031, 4096)  # F_SETPIPE_SZ
    running = bench.train(*_EVERY_STEP, steps=400, stderr=writer)
    os.close(writer)
    outcome = trained(bench, running, steps=400)
    os.close(reader)
    return outcome


@drill("the terminal with the progress bar is closed")
def terminal_closed(bench: Bench) -> str:
    ours, theirs = pty.openpty()
    running = bench.train(*_EVERY_STEP, steps=3000, stderr=theirs)
    os.close(theirs)
    seen = b""
    while b"loss" not in seen:
        seen += os.read(ours, 1000)
    os.close(ours)
    return trained(bench, running, steps=3000)


@drill("the log on a small disk that is full", disk=True)
def log_on_full_disk(bench: Bench) -> str:
    with small_disk(bench.folder / "disk", 0.1) as disk:
        fill(disk)
        return trained(bench, bench.train(*_EVERY_STEP, shell="{} " + f"2>{disk}/log"))


@drill("the reader of generated text goes away")
def generate_head(bench: Bench) -> str:
    bench.begin()
    # so many that some are left to write once `head` has gone
    flags = (
        f"--checkpoint={bench.run}",
        "--prompt=the",
        "--max_new_tokens=5000",
        "--context_shift",
    )
    running = bench.start("generate", *flags, shell="set -o pipefail; {} | head -c 1")
    code = running.end()
    assert code == 141 and "Traceback" not in running.text, (code, running.text)
    return "ended quietly, exit code 141"


@drill("generated text onto a full disk")
def generate_full(bench: Bench) -> str:
    bench.begin()
    running = bench.start(
        "generate", f"--checkpoint={bench.run}", "--prompt=the", shell="{} >/dev/full"
    )
    code = running.end()
    assert code == 1 and "No space left on device" in running.text, (code, running.text)
    return "exit code 1: 'the result could not be written to stdout'"


# --- disks that fill up, trackers


@drill("a limit on the size of files, which TensorBoard's meets first")
def tensorboard_limit(bench: Bench) -> str:
    running = bench.train(*_EVERY_STEP, steps=1500, shell=_SHORT_LIMIT)
    return trained(bench, running, steps=1500, says="tracker tensorboard: OSError: File too large")


@drill("SIGTERM after TensorBoard's disk is full")
def sigterm_after_tensorboard(bench: Bench) -> str:
    running = bench.train(*_EVERY_STEP, steps=100_000, shell=_SHORT_LIMIT)
    running.wait_for("tracker tensorboard: ")
    running.process.send_signal(signal.SIGTERM)
    code = running.end()
    assert code == 130 and bench.saved() > 0, (code, running.text)
    return "saved, exit code 130"


@drill("a small disk under tb/ fills up", disk=True)
def tensorboard_disk(bench: Bench) -> str:
    with small_disk(bench.run / "tb", 0.1):
        running = bench.train(*_EVERY_STEP, steps=500)
        return trained(bench, running, steps=500, says="tracker tensorboard: OSError: No space")


@drill("the disk of the run fills up, and is freed for the next start", disk=True)
def run_disk(bench: Bench) -> str:
    with small_disk(bench.run, 4) as disk:
        bench.begin(steps=3000)
        running = bench.train(*_EVERY_STEP, steps=3000)
        running.wait_for("step 30/")
        filler = fill(disk)
        code = running.end()
        assert code == 2 and bench.saved() == 20, (code, running.text)
        assert "run the same command again" in running.text, running.text
        filler.unlink()
        outcome = trained(bench, bench.train(*_EVERY_STEP, steps=3000), steps=3000)
        return f"exit code 2, step 20 still whole; then {outcome}"


@drill("a full disk under metrics.jsonl that has space again", disk=True)
def metrics_disk_freed(bench: Bench) -> str:
    with small_disk(bench.run, 4) as disk:
        running = bench.train(*_EVERY_STEP, "--config.train.trackers=", steps=3000)
        running.wait_for("step 30/")
        filler = fill(disk)
        running.wait_for("wait in memory")
        filler.unlink()
        outcome = trained(bench, running, steps=3000, says="all records are written after all")
        assert sorted({*bench.logged()}) == list(range(1, 3001))
        return outcome


def _tracker(bench: Bench, body: str) -> None:
    """Puts a package `wandb` before the real one, if there is one."""
    folder = bench.folder / "packages"
    (folder / "wandb").mkdir(parents=True)
    start = "import atexit, sys, time, gptjax.tracking.background as b\nb.CLOSE_SECONDS = 2\n"
    (folder / "wandb" / "__init__.py").write_text(start + body)
    bench.python_path = f"{folder}:{bench.python_path}"


_WANDB = "--config.train.trackers=wandb"


@drill("a tracker that never starts, and holds up the process's end")
def tracker_never_starts(bench: Bench) -> str:
    _tracker(bench, "atexit.register(time.sleep, 1e6)\ntime.sleep(1e6)\n")
    return trained(bench, bench.train(_WANDB), says="tracker wandb: it does not end")


@drill("a tracker that takes a second for each record")
def tracker_slow(bench: Bench) -> str:
    _tracker(
        bench,
        "class R:\n    def log(self, *a, **k): time.sleep(1)\n    def finish(self): pass\n"
        "def login(**k): return True\ndef init(**k): return R()\ndef Settings(**k): return None\n",
    )
    says = "tracker wandb: it does not end; the run goes on without it (records of step"
    return trained(bench, bench.train(_WANDB, *_EVERY_STEP), says=says)


@drill("a tracker that ends the process")
def tracker_exits(bench: Bench) -> str:
    _tracker(bench, "def login(**k): sys.exit(0)\n")
    return trained(bench, bench.train(_WANDB), says="tracker wandb: SystemExit: 0")


# --- damaged records


def _continued(bench: Bench, says: str) -> str:
    """Asserts that the run is continued, and its records are whole again."""
    running = bench.train()
    outcome = trained(bench, running, says=says)
    assert "continue after step 20" in running.text, running.text
    assert bench.record()["status"] == "finished" and bench.logged()[-1] == 60
    assert (bench.run / "report.html").read_text().startswith("<")
    return f"continued; {outcome}"


@drill("run.json is empty")
def run_json_empty(bench: Bench) -> str:
    bench.begin()
    (bench.run / "run.json").write_text("")
    return _continued(bench, "run.json: damaged")


@drill("run.json, report.html and overrides.json are folders, config.json a link to itself")
def folders_for_files(bench: Bench) -> str:
    bench.begin()
    for name in ("run.json", "report.html", "overrides.json"):
        (bench.run / name).unlink()
        (bench.run / name / "full").mkdir(parents=True)
    (bench.run / "config.json").unlink()
    (bench.run / "config.json").symlink_to("config.json")
    return _continued(bench, "config.json: not a file; set aside")


@drill("metrics.jsonl ends in half a line and in bytes that are no UTF-8")
def metrics_bytes(bench: Bench) -> str:
    bench.begin()
    with open(bench.run / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n{"step": 20, "ti\xff')
    return _continued(bench, "2 damaged lines are left out")


@drill("metrics.jsonl is a named pipe, which nobody writes to")
def metrics_pipe(bench: Bench) -> str:
    bench.begin()
    (bench.run / "metrics.jsonl").unlink()
    os.mkfifo(bench.run / "metrics.jsonl")
    return _continued(bench, "metrics.jsonl: not a file; set aside")


@drill("tb/, samples/ and tokenizer/ are files, .lock a folder")
def files_for_folders(bench: Bench) -> str:
    bench.begin()
    for name in ("tb", "samples", "tokenizer"):
        shutil.rmtree(bench.run / name)
        (bench.run / name).write_text("")
    (bench.run / ".lock").unlink()
    (bench.run / ".lock").mkdir()
    return _continued(bench, "tb: not a folder; set aside")


@drill("records and folders of records that may not be written")
def records_without_rights(bench: Bench) -> str:
    bench.begin()
    for name in ("metrics.jsonl", "run.json", "report.html", "tb", "samples"):
        (bench.run / name).chmod(0)
    says = "tracker tensorboard: PermissionError: Permission denied"
    running = bench.train(powerless=True)
    outcome = trained(bench, running, says=says)
    assert bench.record()["status"] == "finished" and bench.logged()[-1] == 60
    for name in ("tb", "samples"):
        (bench.run / name).chmod(0o755)
    return f"continued; {outcome}"


# --- damaged caches


def _only(folder: Path) -> Path:
    (entry,) = (p for p in folder.iterdir() if p.name != "damaged" and p.name[0] != ".")
    return entry


@drill("a cached shard is cut short")
def shard_torn(bench: Bench) -> str:
    data = _only(bench.own_cache() / "data")
    os.truncate(data / "train-00000.tokens.npy", 1000)
    return trained(bench, bench.train(), says="it is prepared anew; set aside as")


@drill("the cached data's meta.json is empty")
def data_meta_empty(bench: Bench) -> str:
    (_only(bench.own_cache() / "data") / "meta.json").write_text("")
    return trained(bench, bench.train(), says="it is prepared anew; set aside as")


@drill("a half-made preparation whose records are damaged")
def data_half_made(bench: Bench) -> str:
    data = _only(bench.own_cache() / "data")
    (data / "meta.json").unlink()
    (data / "train-00000.json").write_text('{"name": "tr')
    return trained(bench, bench.train(), says="it is prepared anew; set aside as")


@drill("every compiled program in the cache is cut short")
def compile_cache_torn(bench: Bench) -> str:
    cache = bench.own_cache()
    bench.begin()  # before jax 0.12 an entry is of the folder that it lies in
    shutil.rmtree(bench.run)
    entries = list((cache / "xla").glob("*-cache"))
    assert entries
    for entry in entries:
        os.truncate(entry, entry.stat().st_size // 2)
    outcome = trained(bench, bench.train(), says="was damaged; it is made anew")
    again = bench.train("--config.train.seed=0", "--workdir=" + str(bench.folder / "again"))
    assert again.end() == 0 and "was damaged" not in again.text, again.text
    return outcome


@drill("a cached tokenizer is cut short")
def tokenizer_torn(bench: Bench) -> str:
    bench.own_cache()
    flags = ("--config.data.tokenizer=sentencepiece", "--config.data.tokenizer_vocab=300")
    assert bench.train(*flags, "--config.train.stop_at=20").end() == 0
    cached = _only(bench.folder / "cache" / "tokenizers")
    os.truncate(cached, 3000)
    shutil.rmtree(bench.run)  # which has its own
    return trained(bench, bench.train(*flags), says=": damaged; set aside as")


@drill("a kept executable of generation is cut short")
def executable_torn(bench: Bench) -> str:
    bench.begin()
    bench.own_cache()
    flags = (f"--checkpoint={bench.run}", "--prompt=the", "--max_new_tokens=4")
    texts = []
    for _ in range(2):
        running = bench.start("generate", *flags)
        assert running.end() == 0, running.text
        texts.append(bench.stdout())
        for kept in (bench.folder / "cache" / "executables").glob("*.executable"):
            os.truncate(kept, 1000)
    assert texts[0] == texts[1] and ".executable: damaged; set aside" in running.text
    return "generated the same text, exit code 0"


@drill("the cache folder may not be written, and holds nothing")
def cache_without_rights(bench: Bench) -> str:
    cache = bench.folder / "cache"
    cache.mkdir(mode=0o500)
    bench.env["GPTJAX_CACHE"] = str(cache)
    refused = bench.train(powerless=True)
    code = refused.end()
    assert code == 2 and "export GPTJAX_CACHE=FOLDER" in refused.text, (code, refused.text)
    bench.env["GPTJAX_CACHE"] = str(bench.folder / "elsewhere")
    return "exit code 2 with a way out; then " + trained(bench, bench.train(powerless=True))


@drill("the cache folder is a file, and the data is prepared already")
def cache_is_a_file(bench: Bench) -> str:
    prepared = bench.folder / "prepared"
    data = (f"--config.data.path={bench.corpus}", "--config.data.source=text")
    flags = ("--config=configs/debug.py", *data, f"--out={prepared}")
    assert bench.start("data.prepare", *flags).end() == 0
    (bench.folder / "cache").write_text("")
    bench.env["GPTJAX_CACHE"] = str(bench.folder / "cache")
    shards = ("--config.data.source=shards", f"--config.data.path={prepared}")
    return trained(bench, bench.train(*shards), says="it goes without this cache")


# --- killed while writing


@drill("killed in the middle of writing checkpoints, three times")
def killed_while_saving(bench: Bench) -> str:
    steps = 2000
    for number in range(3):
        running = bench.train(*_EVERY_STEP, "--config.train.save_every=10", steps=steps)
        running.wait_for(f"step {200 * (number + 1)}/")
        os.killpg(running.process.pid, signal.SIGKILL)
        with contextlib.suppress(HangError):
            running.end()
        assert bench.saved() > 0
    return trained(bench, bench.train(steps=steps), steps=steps, says="continue after step")


@drill("killed in the middle of preparing data")
def killed_while_preparing(bench: Bench) -> str:
    cache = bench.own_cache()
    shutil.rmtree(cache / "data")
    running = bench.train()
    while not list((cache / "data").glob("*/key")) and running.process.poll() is None:
        time.sleep(0.001)
    os.killpg(running.process.pid, signal.SIGKILL)
    running.end()
    assert not list((cache / "data").glob("*/meta.json"))
    return trained(bench, bench.train())


def run_drill(name: str, folder: Path, cache: Path) -> tuple[bool, str]:
    """(whether it went as it must, how it ended)."""
    bench = Bench(folder / name, cache)
    try:
        return True, DRILLS[name][1](bench)
    except HangError as hang:
        return False, f"HANGS: {hang}"
    except AssertionError as error:
        return False, f"FAILS: {str(error)[:200]} ... {str(error)[-1500:]}"


def run_all(names: list[str], *, jobs: int = 1) -> dict[str, tuple[bool, str]]:
    """Runs drills, prints a line for each; skips what this machine cannot do."""
    mounts = can_mount()
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="gptjax-drills-") as folder:
        cache = Path(folder) / "cache"
        Bench(Path(folder) / "first", cache).begin()  # what all drills compile and prepare
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            running = {}
            for name in names:
                if DRILLS[name][2] and not mounts:
                    print(f"skipped  {DRILLS[name][0]}: small disks need root", flush=True)
                    continue
                running[pool.submit(run_drill, name, Path(folder), cache)] = name
            for future in concurrent.futures.as_completed(running):
                went_well, outcome = outcomes[running[future]] = future.result()
                verdict = "ok" if went_well else "FAILED"
                print(f"{verdict:8} {DRILLS[running[future]][0]}: {outcome}", flush=True)
    return outcomes


def main() -> None:
    jobs = [arg.removeprefix("--jobs=") for arg in sys.argv[1:] if arg.startswith("--jobs=")]
    names = [arg for arg in sys.argv[1:] if not arg.startswith("--")] or list(DRILLS)
    outcomes = run_all(names, jobs=int(jobs[0]) if jobs else 1)
    failed = [name for name, (went_well, _) in outcomes.items() if not went_well]
    print(json.dumps({"drills": len(outcomes), "failed": failed}))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
