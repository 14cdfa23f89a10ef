"""The pack of `experiments/accelerator`: its rehearsal, and that what it says can be trusted."""

import importlib.util
import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments" / "benchmarks"))
sys.path.insert(0, str(ROOT / "experiments" / "accelerator"))

import attention
import contenders
import decode
import run
import shapes
import suite
import table
import train
import turns

from gptjax.checkpoints import mapping
from gptjax.ops.attention import backends
from gptjax.ops.attention.mask import Mask
from gptjax.ops.attention.reference import reference

EXPERIMENTS = ROOT / "experiments"
HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def forgets_documents(q, k, v, mask, **options):
    return reference(q, k, v, Mask(mask.q_index, window=mask.window), softcap=options["softcap"])


def gives_nan(q, k, v, mask, **options):
    return q * np.nan


def refuses(q, k, v, mask, **options):
    raise ValueError("no kernel for this: set another backend")


def test_a_backend_that_is_wrong_is_told_from_one_that_refuses(monkeypatch):
    rows = {"wrong": forgets_documents, "nan": gives_nan, "no": refuses, "right": reference}
    monkeypatch.setattr(backends, "BACKENDS", {n: {"": f} for n, f in rows.items()})
    inputs = attention.make_inputs("float32", b=1, t=8, k=1, g=1, c=4, packed=True)
    monkeypatch.setitem(backends.BACKENDS, "reference", {"": reference})
    expected = attention.values_and_gradients("reference", "float32", "cpu", inputs)
    results = {n: attention.compare(n, "float32", "cpu", inputs, expected) for n in rows}
    assert results["right"] == {"error": 0.0, "fault": ""}
    assert results["wrong"]["fault"] == results["nan"]["fault"] == "wrong"
    assert results["no"] == {"refused": "ValueError: no kernel for this: set another backend"}
    text = table.attention({"rows": [{"backend": n, "dtype": "", "case": "packed"} | r
                                     for n, r in results.items()]})  # fmt: skip
    assert "| wrong |  | 0 of 1 |  |  | packed: wrong |" in text
    assert "| no |  | 0 of 1 |  | all |  |" in text


LATE = """
import json, os, sys, time
out = [a for a in sys.argv if a.startswith("--out=")][0][6:]
name = [a for a in sys.argv if a.startswith("--part=")][0][7:]
open(out + ".new", "w").write(json.dumps({"measured": name}))
os.replace(out + ".new", out)
time.sleep(600 if name == "gpt2" else 0)
sys.exit(3 if name == "tests" else 0)
"""


def test_a_part_that_fails_or_is_late_costs_only_itself(tmp_path, monkeypatch):
    stub = tmp_path / "stub.py"
    stub.write_text(LATE)
    monkeypatch.setattr(run, "__file__", str(stub))
    wait_for = run.wait_for

    def wait_for_less(process, seconds, limit):
        """No time at all for what would take ten minutes, once it has saved something."""
        if "--part=gpt2" in process.args:
            while not (tmp_path / "gpt2.json").exists():
                time.sleep(0.01)
            seconds = 0
        return wait_for(process, seconds, limit)

    monkeypatch.setattr(run, "wait_for", wait_for_less)
    names = ["attention", "tests", "gpt2"]
    results = run.run_group(names, False, 300, {}, tmp_path)
    assert [result["measured"] for result in results.values()] == names
    faults = [result.get("fault", "") for result in results.values()]
    assert faults == ["", "ended with 3", "stopped after 300 s"]
    said = table.markdown({"started": "2026-11-28T", "rehearsal": False, "parts": results})
    assert "- tests: ended with 3" in said and "- gpt2: stopped after 300 s" in said
    assert run.what_failed({"parts": results}) == ["tests", "gpt2"]
    wrong = {"attention": {"rows": [{"fault": "wrong"}]}, "tests": {"failed": 1}, "gpt2": {}}
    assert run.what_failed({"parts": wrong}) == ["attention", "tests"]


def test_contenders_answer_through_noise_and_say_why_they_died():
    noisy = (
        "import turns; print('hello'); turns.serve(lambda n: print('noise', flush=True) or 2 * n)"
    )
    dies = "import turns; turns.serve(lambda n: 1 / n)"
    env = {"PYTHONPATH": str(EXPERIMENTS / "benchmarks")}
    processes = [turns.Contender([sys.executable, "-c", code], env) for code in (noisy, dies)]
    try:
        for process in processes:
            process.wait_until_ready()
        assert [process.ask(4) for process in processes] == [8, 0.25]
        with pytest.raises(turns.ContenderError, match="division by zero"):
            processes[1].ask(0)
    finally:
        for process in processes:
            process.close()


def test_figures_of_training_and_decoding_by_hand():
    entry = {"seconds": [0.3, 0.1, 0.2], "flops_per_token": 1e9, "data_sheet_flops": 1e13}
    sections = {"train": dict(batch_size=2), "model": dict(context=500)}
    record = {"sections": sections, "contenders": {"gptjax": entry}}
    record["contenders"]["torch"] = {"seconds": [0.3, 0.2, 0.3]}
    record = train.summary(record)
    assert entry["ms"] == 200 and entry["tokens_per_second"] == 5000 and entry["mfu"] == 0.5
    assert record["contenders"]["torch"]["mfu"] == pytest.approx(1 / 3)
    assert record["times_torch"] == pytest.approx(1.5)
    # a step reads 12 D^2 + V D + 13 D + 2 D weights, and keys and values of 4 + 8 / 2 positions
    shape = shapes.Decoded("", shapes.TOY_DECODED[0].model | dict(layers=1), (2,), 4, 8)
    weights = 12 * 64**2 + 500 * 64 + 15 * 64
    assert decode.step_bytes(shape, 2) == 2 * (weights + 2 * 8 * 2 * 64)


def test_what_is_named_is_there(capsys):
    assert all((ROOT / name).is_file() for name in suite.FILES)
    assert set(run.PARTS) == {name for group in run.GROUPS for name in group}
    assert sum(max(run.PARTS[n].seconds for n in g) for g in run.GROUPS) <= run.SECONDS
    assert run.main(["--rehearse", "--parts=gpt3"]) == 2
    assert "--parts=gpt3: there are machine, attention" in capsys.readouterr().err


@pytest.mark.slow
def test_the_rehearsal_runs_every_part(tmp_path):
    command = [sys.executable, str(EXPERIMENTS / "accelerator" / "run.py"), "--rehearse"]
    done = subprocess.run(
        [*command, f"--out={tmp_path}", "--seconds=1200"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert list(parts) == list(run.PARTS)
    assert {row["backend"] for row in parts["attention"]["rows"]} == set(backends.BACKENDS)
    assert parts["tests"]["passed"] and not parts["tests"]["failed"]
    contenders_here = {"gptjax", "torch"} if HAS_TORCH else {"gptjax"}
    for name in ("gpt2", "llama"):
        entries = parts[name]["contenders"]
        assert set(entries) == contenders_here
        assert entries["gptjax"]["planner_bytes"] > entries["gptjax"]["parameters"] * 12
        assert set(parts[name]["left_out"]) == {"gptjax", "torch"} - contenders_here
        # random tokens, so the logarithm of the vocabulary; learned by heart by both at one rate
        for entry in entries.values():
            assert entry["first_loss"] == pytest.approx(np.log(500), rel=0.02)
            assert entry["loss"] < entry["first_loss"]
    assert {row["contender"] for row in parts["decode"]["rows"]} == contenders_here
    text = (tmp_path / "table.md").read_text()
    assert "rehearsal at toy size" in text and text == done.stdout.removesuffix("\n")


@pytest.mark.parity
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_both_contenders_train_the_same_thing(name):
    if not HAS_TORCH:
        pytest.skip("torch and transformers are not installed: pip install 'gptjax[parity]'")
    import torch

    shape = shapes.TOY_TRAINED[name]
    model = shape.model | dict(dtype="float32")
    ours = contenders.GptjaxTrainer(shape.sections | {"model": model})
    theirs = contenders.TorchTrainer(
        contenders.torch_config(model),
        contenders.random_rows(model["vocab_size"], shape.rows, model["context"]),
        backend="eager",
        micro_batches=shape.micro_batches,
        attention="sdpa_causal",
    )
    params = jax.tree.map(np.asarray, ours.state.params)
    weights = {
        name: torch.tensor(np.array(make()))
        for name, _, make in mapping.from_params(ours.plan.config.model, params)
    }
    left = theirs.net.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}
    losses = []
    for _ in range(4):
        ours.step()
        theirs.step()
        losses.append((ours.loss(), theirs.loss()))
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-4)
