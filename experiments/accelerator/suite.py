"""The part `tests`: a tenth of the test suite, on the device.

The files that compute with one device and compare numbers. `GPTJAX_TEST_PLATFORM` tells
tests/conftest.py where; XLA's float32 products are asked for in float32, as the tests' tolerances
expect, rather than in TF32.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

from part import ROOT, Save, Settings

FILES = (
    "tests/ops/test_attention.py",
    "tests/ops/test_cached_attention.py",
    "tests/ops/test_cross_entropy.py",
    "tests/ops/test_implementations.py",
    "tests/model/test_transformer.py",
    "tests/generation/test_engine.py",
    "tests/generation/test_scoring.py",
    "tests/generation/test_speculative.py",
    "tests/training/test_optim.py",
)
TOY_FILES = ("tests/ops/test_cached_attention.py",)
SECONDS_TO_REPORT = 10.0
PROCESSES = 8  # of 16 cores; most of the time goes into compiling


def measure(settings: Settings, save: Save) -> None:
    files = TOY_FILES if settings.rehearse else FILES
    several = ["-n", str(PROCESSES)] if importlib.util.find_spec("xdist") else []
    env = dict(os.environ, JAX_DEFAULT_MATMUL_PRECISION="highest", XLA_FLAGS="")
    if settings.rehearse:
        several = []
        del env["XLA_FLAGS"]
    else:
        env["GPTJAX_TEST_PLATFORM"] = "cuda"
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.05"
    with tempfile.TemporaryDirectory() as folder:
        result, output = Path(folder) / "tests.xml", Path(folder) / "output"
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-W", "default", "-m", "not slow and not parity and not notebook"),
            *(f"--junitxml={result}", *several, *files),
        ]
        with output.open("w") as out:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
            in_time = wait_or_interrupt(process, settings.seconds - SECONDS_TO_REPORT)
        record: dict[str, Any] = {"files": files, "in_time": in_time}
        if result.exists():
            record |= read_result(result)
        else:
            record["fault"] = output.read_text().strip()[-2000:]
        save(record)


def wait_or_interrupt(process: subprocess.Popen, seconds: float) -> bool:
    """Whether it ended by itself. Interrupted, pytest still reports what it has run."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(SECONDS_TO_REPORT / 2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return False


def read_result(path: Path) -> dict[str, Any]:
    """Counts, and the first line of what each failing test says."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, {}
    for case in xml.etree.ElementTree.parse(path).getroot().iter("testcase"):
        bad = [*case.findall("failure"), *case.findall("error")]
        if bad:
            counts["failed"] += 1
            name = f"{case.get('classname')}::{case.get('name')}"
            failures[name] = (bad[0].get("message") or "").splitlines()[0][:200]
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    return counts | {"failures": failures}
