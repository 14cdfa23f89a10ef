"""The whole command: a run, its files, its refusals, its text."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, command

from gptjax import generate, metrics, model, report
from gptjax.config import UserError

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
    text.write_text("".join(f"Line {i}: the quick brown fox jumps over {i % 7} lazy dogs.\n" for i in range(400)))
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
    records = metrics.read_jsonl(workdir / "metrics.jsonl")
    assert all({"step", "time"} <= set(r) for r in records)
    names = set().union(*records)
    assert {"train/loss", "train/grad_norm", "train/lr", "train/tokens", "eval/loss", "eval/perplexity", "eval/bits_per_byte"} <= names
    assert {"perf/tokens_per_sec", "perf/step_time", "perf/data_wait", "perf/compile_seconds", "perf/compiles", "mem/peak_gib"} <= names
    assert "perf/mfu" not in names  # the peak of a CPU is unknown
    assert [r["step"] for r in records if "train/loss" in r] == [2, 3, 4, 6]
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert "tokens/s" in stderr
    assert "ETA" in stderr
    run = json.loads((workdir / "run.json").read_text())
    assert run["status"] == "finished"
    assert set(run["baselines"]) == {"xz -9", "token bigram model"}


def test_the_report_is_one_file_with_curves_and_baselines(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count("<svg") >= 3
    for part in ("xz -9", "token bigram model", "this model", "Sample at step 6", "model.layers"):
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
        (f"--config.data.path={text} --config.data.tokenizer=chars", "tokenizer: the vocabulary changed"),
        (f"--config.data.path={changed}", "data: the text or its split changed"),
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


def test_generate_continues_greedily_and_by_seed(finished):
    workdir = finished[0]
    ask = lambda *flags: (
        command("gptjax.generate", f"--checkpoint={os.path.relpath(workdir, ROOT)}", "--prompt=the ", "--max_new_tokens=8", *flags).stdout
    )
    greedy = ask("--temperature=0")
    assert greedy.startswith("the ")
    assert greedy == ask("--temperature=0", "--seed=5")
    assert ask("--seed=1") == ask("--seed=1")
    answer = json.loads(
        command("gptjax.generate", f"--checkpoint={workdir / 'checkpoints' / '3'}", "--prompt=x", "--max_new_tokens=30", "--rolling", "--json").stdout
    )
    assert len(answer["tokens"]) <= 30


def test_cached_generation_equals_recomputing(finished):
    """Greedy tokens with the cache are those of a full forward pass for every token."""
    import jax.numpy as jnp

    from gptjax import checkpoint

    config, params, tokenizer = checkpoint.load_run(finished[0])
    prompt = tokenizer.encode("the qui")
    made = list(generate.stream(config.model, params, prompt, 8, generate.Sampling(temperature=0.0), eot=tokenizer.eot))
    ids = list(prompt)
    for token in made:
        x, _ = model.apply(config.model, params, jnp.asarray([ids]))
        assert token == int(model.unembed(config.model, params, x)[0, -1].argmax())
        ids.append(token)
    with pytest.raises(UserError, match="--rolling"):
        next(generate.stream(config.model, params, prompt, 100, generate.Sampling(), eot=tokenizer.eot))


def test_sampling_follows_the_distribution():
    """Chi-square of 4,000 draws against softmax after temperature, top-k and top-p."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    logits = jnp.log(jnp.array([0.4, 0.3, 0.15, 0.1, 0.05]))
    draw = jax.jit(jax.vmap(lambda key, t, k, p: generate.sample(logits, key, t, k, p), in_axes=(0, None, None, None)))
    keys = jax.random.split(jax.random.key(0), 4000)
    for (t, k, p), expected in {
        (1.0, 0, 1.0): [0.4, 0.3, 0.15, 0.1, 0.05],
        (1.0, 2, 1.0): [4 / 7, 3 / 7, 0, 0, 0],
        (1.0, 0, 0.8): [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0],
        (0.5, 0, 1.0): list(np.array([0.16, 0.09, 0.0225, 0.01, 0.0025]) / 0.285),
    }.items():
        counts = np.bincount(np.asarray(draw(keys, jnp.float32(t), jnp.int32(k), jnp.float32(p))), minlength=5)
        wanted = np.array(expected) * 4000
        assert (counts[wanted == 0] == 0).all()
        seen = wanted > 0
        assert ((counts[seen] - wanted[seen]) ** 2 / wanted[seen]).sum() < 18.5  # 99.9 % point at 4 degrees of freedom
    assert int(generate.sample(logits, keys[0], jnp.float32(0), jnp.int32(0), jnp.float32(1))) == 0


def test_a_non_finite_loss_stops_and_keeps_the_last_checkpoint(corpus, tmp_path):
    args = ("gptjax.train", *TINY, f"--config.data.path={corpus}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=40", "--config.train.save_every=1",
            "--config.optim.lr=1e30", "--config.optim.clip=0", "--config.train.eval_every=0", "--config.optim.warmup_steps=0")  # fmt: skip
    done = command(*args, check=False)
    assert done.returncode == 2
    assert "the loss is" in done.stderr
    assert "keeps the last checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    from gptjax import checkpoint

    params = checkpoint.load_params(checkpoint.newest(tmp_path / "run" / "checkpoints"))
    import numpy as np

    assert all(np.isfinite(p).all() for p in params["embed"].values())


def test_bigram_baseline_against_the_formula():
    import numpy as np

    train, held_out = np.array([0, 1, 0, 1, 0, 2]), np.array([0, 1, 2])
    unigram = np.array([4, 3, 2]) / 9
    after_0 = (2 - 0.75) / 3 + 0.75 * 2 / 3 * unigram[1]  # 0 1 seen twice of three, two kinds of successor
    after_1 = 0.75 * 1 / 2 * unigram[2]  # 1 2 never seen
    assert report.bigram_bits(train, held_out, 3) == pytest.approx(-np.log2(after_0) - np.log2(after_1))


def test_a_trace_that_outlives_the_run_ends_with_it(corpus, tmp_path):
    args = ("gptjax.train", *TINY, *QUICK, f"--config.data.path={corpus}", f"--workdir={tmp_path / 'run'}", "--profile_steps=2:100")
    assert "finished" in command(*args, "--config.train.steps=3", "--config.optim.warmup_steps=1").stdout
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_a_flipped_bit_in_the_newest_meta_falls_back(corpus, tmp_path):
    args = ("gptjax.train", *TINY, *QUICK, f"--config.data.path={corpus}", f"--workdir={tmp_path / 'run'}")
    command(*args, "--config.train.stop_at=6")
    meta = tmp_path / "run" / "checkpoints" / "6" / "meta" / "metadata"
    data = bytearray(meta.read_bytes())
    data[len(data) // 2] ^= 0x80
    meta.write_bytes(data)
    done = command(*args)
    assert "skipped the checkpoint of step 6: meta/metadata differs" in done.stderr
    assert "continue after step 3" in done.stderr


def test_a_model_that_knows_more_tokens_than_the_tokenizer(corpus, tmp_path):
    args = ("gptjax.train", *TINY, *QUICK, f"--config.data.path={corpus}", f"--workdir={tmp_path / 'run'}", "--config.model.vocab_size=2000")
    assert "finished" in command(*args, "--config.train.steps=1", "--config.optim.warmup_steps=0", "--config.train.sample_tokens=15").stdout


def test_print_config_and_explain_train_nothing(corpus, tmp_path):
    shown = json.loads(command("gptjax.train", *TINY, f"--config.data.path={corpus}", "--print_config").stdout)
    assert shown["model"]["layers"] == 1
    text = command("gptjax.train", *TINY, f"--config.data.path={corpus}", "--explain").stdout
    for part in ("parameters", "tokens per step", "epochs", "head width", "embedding rows"):
        assert part in text


def test_console_script_verbs():
    code = "import sys; sys.argv = ['gptjax', 'trian']; from gptjax.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean 'train'" in done.stderr
    assert "vocab_size" in command("gptjax.train", "--help").stdout
