"""The command from end to end: a run, its files, its refusals, its text."""

import json
import os
import platform
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, command

from gptjax.tracking.jsonl import read_jsonl

ALL_TEXT = "bigram model of all training text"
TOKENS_READ = "bigram model of the tokens that the GPT has read"
QUICK = (
    "--config.train.steps=6",
    "--config.train.eval_every=3",
    "--config.train.save_every=3",
    "--config.train.log_every=2",
    "--config.train.batch_size=8",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run: (workdir, its stdout, its stderr, the text it learned from)."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "corpus.txt"
    text.write_text(
        "".join(
            f"Line {i}: the quick brown fox jumps over {i % 7} lazy dogs.\n" for i in range(400)
        )
    )
    done = command(
        "gptjax.train",
        *TINY,
        *QUICK,
        f"--config.data.path={text}",
        f"--workdir={folder / 'run'}",
        "--json",
        "--config.train.profile_steps=2:3",
        "--config.train.keep_best=true",
    )
    return folder / "run", json.loads(done.stdout), done.stderr, text


def test_a_run_leaves_what_the_contract_says(finished):
    workdir, summary, stderr, _ = finished
    assert summary["status"] == "finished"
    for name in (
        "config.json",
        "overrides.json",
        "run.json",
        "tokenizer",
        "metrics.jsonl",
        "tb",
        "checkpoints/6",
        "best",
        "samples/6.txt",
        "report.html",
        "profile",
    ):
        assert (workdir / name).exists(), name
    records = read_jsonl(workdir / "metrics.jsonl")
    assert all({"step", "time"} <= set(r) for r in records)
    names = set().union(*records)
    assert {
        "train/loss",
        "train/grad_norm",
        "train/lr",
        "train/tokens",
        "eval/loss",
        "eval/perplexity",
        "eval/bits_per_byte",
    } <= names
    assert {
        "perf/tokens_per_sec",
        "perf/step_time",
        "perf/data_wait",
        "perf/compile_seconds",
        "perf/compiles",
        "mem/peak_gib",
    } <= names
    assert "perf/mfu" not in names  # the peak of a CPU is unknown
    assert [r["step"] for r in records if "train/loss" in r] == [2, 3, 4, 6]
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert "tokens/s" in stderr
    assert "ETA" in stderr
    run = json.loads((workdir / "run.json").read_text())
    assert run["status"] == "finished"
    assert set(run["baselines"]) == {"xz -9", ALL_TEXT, TOKENS_READ}


def test_the_report_is_one_file_with_curves_and_baselines(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count("<svg") >= 3
    names = ("xz -9", ALL_TEXT, TOKENS_READ, "this model")
    for part in (*names, "Sample at step 6", "model.layers"):
        assert part in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched


def test_the_same_command_on_a_finished_run_changes_nothing(finished):
    workdir, _, _, text = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    done = command(
        "gptjax.train",
        *TINY,
        *QUICK,
        f"--config.data.path={text}",
        f"--workdir={workdir}",
        "--config.train.profile_steps=2:3",
        "--config.train.keep_best=true",
    )
    assert "continue after step 6" in done.stderr
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_resume_refuses_what_would_change_the_run(finished, tmp_path):
    workdir, _, _, text = finished
    args = ("gptjax.train", *TINY, *QUICK, f"--workdir={workdir}")
    changed = tmp_path / "other.txt"
    changed.write_text(text.read_text().replace("fox", "cat"))
    for extra, part in (
        (f"--config.data.path={text} --config.train.seed=1", "train.seed: 0 -> 1"),
        (f"--config.data.path={text} --config.train.batch_size=16", "train.batch_size: 8 -> 16"),
        (
            f"--config.data.path={text} --config.data.tokenizer=chars",
            "tokenizer: the vocabulary changed",
        ),
        (f"--config.data.path={changed}", "data: the text or its split changed since the run "),
        (f"--config.data.path={changed}", f"  data.path: {str(text)!r} -> {str(changed)!r}"),
    ):
        done = command(*args, *extra.split(), check=False)
        assert done.returncode == 2, done.stderr
        assert part in done.stderr
        assert "Traceback" not in done.stderr
    before = text.read_text()
    text.write_text(before + "one more line\n")
    done = command(*args, f"--config.data.path={text}", check=False)
    text.write_text(before)
    assert done.returncode == 2
    assert "data: the text or its split changed" in done.stderr


def test_text_that_only_moved_continues_the_run(finished, tmp_path):
    workdir, _, _, text = finished
    (tmp_path / "elsewhere.txt").write_bytes(text.read_bytes())
    shutil.copytree(workdir, tmp_path / "run", symlinks=True)
    done = command(
        "gptjax.train",
        *TINY,
        *QUICK,
        f"--config.data.path={tmp_path / 'elsewhere.txt'}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert "continue after step 6" in done.stderr


def test_generate_continues_greedily_and_by_seed(finished):
    workdir = finished[0]
    ask = lambda *flags: (
        command(
            "gptjax.generate",
            f"--checkpoint={os.path.relpath(workdir, ROOT)}",
            "--prompt=the ",
            "--max_new_tokens=8",
            *flags,
        ).stdout
    )
    greedy = ask("--temperature=0")
    assert greedy.startswith("the ")
    assert greedy == ask("--temperature=0", "--seed=5")
    assert ask("--seed=1") == ask("--seed=1")
    answer = json.loads(
        command(
            "gptjax.generate",
            f"--checkpoint={workdir / 'checkpoints' / '3'}",
            "--prompt=x",
            "--max_new_tokens=30",
            "--context_shift",
            "--json",
        ).stdout
    )
    assert len(answer["tokens"]) <= 30


MEMORY = """
import resource
from gptjax.runtime.memory import keep_freed_memory
keep_freed_memory()
import jax, jax.numpy as jnp
rows, barrier = jnp.arange(24.0)[:, None], jax.lax.optimization_barrier
# temporaries of 192 MiB
step = jax.jit(lambda x: barrier(barrier(x + rows)[::-1] * 2).sum(0) / 24, donate_argnums=0)
x = jnp.zeros(1 << 20)
for _ in range(20):
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = jax.block_until_ready(step(x))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the heap is not that of the GNU C library"
)
def test_most_steps_compute_in_the_memory_of_the_one_before():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    new_pages = [int(line) for line in done.stdout.splitlines()]
    assert (
        sum(new_pages) < 0.6 * len(new_pages) * new_pages[0]
    )  # 0.1 to 0.4, and 1.0 where each step maps its own
