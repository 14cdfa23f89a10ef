"""Forecasts and their advice: what fits, what to change, and the command that prints them."""

import json
import resource

import pytest
from conftest import ROOT, command, make_config

from gptjax.config import build
from gptjax.config.errors import UserError
from gptjax.planning import advice, summary
from gptjax.planning.advice import advise, legal_meshes
from gptjax.planning.cost import ASSUMED_MFU, cost, read_mfu
from gptjax.planning.forecast import config_without_data, forecast, rates_of, shapes_of
from gptjax.planning.targets import parse
from gptjax.runtime.mesh import mesh_faults
from gptjax.training.memory import RECOMPUTED


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def plan_of(file, target, **overrides):
    settings = build.load_file(f"configs/{file}.py")
    build.override(settings, {name.replace("__", "."): str(v) for name, v in overrides.items()})
    config, target = config_without_data(settings), parse(target)
    shapes = shapes_of(config)
    plan = forecast(config, shapes, target, rates_of(config, target, None, target.device.price))
    return plan, advise(plan, shapes)


def with_flags(file, target, flags, **overrides):
    """The plan after a suggested override."""
    pairs = (flag.removeprefix("--config.").split("=") for flag in flags)
    suggested = {name.replace(".", "__"): value for name, value in pairs}
    return plan_of(file, target, **{**overrides, **suggested})[0]


def test_what_it_proposes_for_a_run_that_does_not_fit_fits():
    too_much = dict(train__grad_accum_steps=1, model__remat="none")
    plan, help = plan_of("llama_1b", "v5e-16", **too_much)
    assert not plan.fits
    assert len(help.fitting) == 3
    assert len(set(help.fitting)) == 3
    for flags in [*help.fitting, help.best.flags]:
        assert 1 <= len(flags) <= 4
        assert with_flags("llama_1b", "v5e-16", flags, **too_much).fits, flags
    text = "\n".join(summary.advice_lines(plan, help))
    over = (plan.memory.total - plan.usable) / 2**30
    assert f"It does not fit: {over:,.2f} GiB too much" in text
    assert text.count("  it fits with  --config.") == 3


def test_it_names_the_smallest_target_that_is_enough():
    plan, help = plan_of("llama_8b", "v5e-4")
    assert not plan.fits
    assert help.best is None
    assert help.fitting == []
    target, *flags = help.larger
    assert target in ("--target=v5e-16", "--target=v5e-32")
    assert with_flags("llama_8b", target.removeprefix("--target="), flags).fits


def test_the_suggestion_is_as_it_is_where_nothing_is_better():
    plan, help = plan_of("gpt2_124m", "h100-8")
    again = with_flags("gpt2_124m", "h100-8", help.best.flags)
    assert again.fits
    assert again.cost.step_seconds <= plan.cost.step_seconds


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    plan, help = plan_of("llama_1b", "v5e-16", model__remat="none")
    rows = help.largest_rows
    assert rows >= 1

    def at(rows):
        count = plan.config.train.batch_size // 16 // rows
        changes = dict(model__remat="none", train__grad_accum_steps=count)
        return plan_of("llama_1b", "v5e-16", **changes)[0]

    assert at(rows).fits
    assert rows == 16 or not at(2 * rows).fits


def test_suggested_meshes_are_legal():
    config = make_config(model=dict(kv_heads=2), train=dict(batch_size=4, grad_accum_steps=1))
    meshes = legal_meshes(config, 8)
    assert meshes
    for sizes in meshes:
        assert not mesh_faults(config, sizes)
        assert sizes["tensor"] <= 2  # the key/value heads
        assert sizes["data"] * sizes["fsdp"] <= 4  # the rows
    everything = list(advice._factorizations(8))
    assert len(everything) == 20  # 2^3 to four axes
    assert all(mesh_faults(config, sizes) for sizes in everything if sizes not in meshes)


def test_an_illegal_mesh_is_refused_by_name():
    with pytest.raises(UserError, match=r"mesh.tensor = 16 does not divide model.kv_heads = 8"):
        plan_of("llama_1b", "v5e-16", mesh__tensor=16, mesh__fsdp=1)
    with pytest.raises(UserError, match=r"there are 8"):
        plan_of("llama_1b", "h100-8", mesh__fsdp=16)


def test_an_illegal_mesh_comes_with_legal_ones():
    flags = ("--config=configs/llama_1b.py", "--target=v5e-16", "--config.mesh.fsdp=1")
    done = command("gptjax.plan", *flags, "--config.mesh.tensor=16", check=False)
    assert done.returncode == 2
    assert "mesh.tensor = 16 does not divide model.kv_heads = 8" in done.stderr
    shown = [line for line in done.stderr.splitlines() if line.startswith("legal on 16 devices")]
    axes = dict(flag.removeprefix("--config.mesh.").split("=") for flag in shown[0].split()[6:])
    sizes = {axis: int(count) for axis, count in axes.items()}
    settings = build.load_file("configs/llama_1b.py")
    assert not mesh_faults(config_without_data(settings), sizes)


def test_a_vocabulary_that_follows_from_data_is_asked_for():
    settings = build.load_file("configs/shakespeare_char.py")
    settings.data.tokenizer = "chars"
    with pytest.raises(UserError, match=r"--config.model.vocab_size"):
        config_without_data(settings)
    settings.model.vocab_size = 65
    assert config_without_data(settings).model.vocab_size == 65
    settings.update(model=dict(vocab_size=0), data=dict(tokenizer="gpt2"))
    assert config_without_data(settings).model.vocab_size == 50257


def test_recomputation_lowers_an_assumed_mfu_but_not_a_stated_one():
    settings = build.load_file("configs/llama_1b.py")
    build.override(settings, {"model.remat": "full", "train.grad_accum_steps": "16"})
    config, target = config_without_data(settings), parse("v5e-16")
    shapes = shapes_of(config)
    assumed = forecast(config, shapes, target, rates_of(config, target, None, None)).cost
    stated = forecast(config, shapes, target, rates_of(config, target, 0.4, None)).cost
    assert stated.mfu == ASSUMED_MFU
    assert assumed.mfu == pytest.approx(ASSUMED_MFU / (1 + RECOMPUTED["full"].flops / 3))
    assert stated.usd is None


def test_a_step_takes_as_long_as_the_slower_of_links_and_arithmetic():
    sizes = dict(flops_per_token=1e9, tokens_of_step=1000, steps=10)
    target = parse("v5e-8")
    fast = cost(**sizes, target=target, rate=1e12, mfu=0.5, links=0.1)
    assert fast.bound == "arithmetic"
    assert fast.step_seconds == 1e12 / (8 * 0.5e12)
    slow = cost(**sizes, target=target, rate=1e12, mfu=0.5, links=2.0, price=3.0)
    assert slow.bound == "links"
    assert slow.seconds == 20.0
    assert slow.usd == pytest.approx(8 * 20 / 3600 * 3)


def test_mfu_is_a_number_or_a_workdir_that_measured_it(tmp_path):
    assert read_mfu("0.45") == 0.45
    lines = ['{"step": 1, "perf/mfu": 0.1}', '{"perf/mfu": 0.3}', '{"perf/mfu": 0.4}', '{"torn']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_mfu(str(tmp_path)) == 0.3
    for wrong, words in {"45": "above 0 and at most 1", "x": "neither a number"}.items():
        with pytest.raises(UserError, match=words):
            read_mfu(wrong)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="no perf/mfu"):
        read_mfu(str(tmp_path))


def test_the_command_plans_70_billion_parameters_from_shapes_alone(tmp_path):
    file = tmp_path / "configs" / "llama_70b.py"
    file.parent.mkdir()
    file.write_text(
        "from configs import base, sizes\n\n\ndef get_config():\n    c = base.get_config()\n"
        "    c.model.update(**sizes.LLAMA3_70B, dtype='bfloat16')\n"
        "    c.data.update(source='shards', path='/nowhere')\n"
        "    c.train.update(batch_size=256)\n    c.mesh.update(data=1, fsdp=-1)\n    return c\n"
    )
    flags = (f"--config={file}", "--target=v5p-256", "--json")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = json.loads(command("gptjax.plan", *flags).stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    numbers = {number["name"]: number["value"] for number in out["numbers"]}
    assert numbers["parameters"] == pytest.approx(70.55e9, rel=1e-3)
    assert out["mesh"] == {"data": 1, "fsdp": 256, "tensor": 1, "context": 1}
    assert out["fits"]
    assert out["memory"]["total"] == pytest.approx(
        sum(size for name, size in out["memory"].items() if name != "total")
    )
    assert out["target"]["topology"] == "v5p:4x8x8"
    assert {transfer["axes"][0] for transfer in out["traffic"]} == {"fsdp"}


def test_the_command_prints_a_plan_and_refuses_unknown_targets():
    flags = ("--config=configs/gpt2_124m.py", "--mfu=0.5", "--price=2")
    done = command("gptjax.plan", *flags, "--target=a100-40gb-8")
    lines = done.stdout.splitlines()
    assert any(line.startswith("memory of a device") and "it fits" in line for line in lines)
    assert any(line.startswith("cost") and "2.00 USD an hour" in line for line in lines)
    assert any("bound by arithmetic" in line for line in lines)
    assert lines[-1].startswith("Suggested: ")
    done = command("gptjax.plan", *flags, "--target=a1000-8", check=False)
    assert done.returncode == 2
    assert "did you mean a100?" in done.stderr


def test_the_plan_of_devices_whose_links_are_not_known_is_json_without_gaps():
    settings = build.load_file("configs/debug.py")
    build.override(settings, {"model.vocab_size": "300", "train.batch_size": "16"})
    config, target = config_without_data(settings), parse("cpu-8")
    shapes = shapes_of(config)
    plan = forecast(config, shapes, target, rates_of(config, target, 0.5, None))
    written = json.dumps(summary.to_json(plan, advise(plan, shapes)), allow_nan=False)
    assert json.loads(written)["cost"]["links"] is None
    (step,) = (row for row in summary.rows(plan) if row.name == "time of a step")
    assert step.reason == "MFU 50%, links not counted"


def test_flags_about_devices_need_a_target_and_prices_are_not_negative():
    for flag in ("--mfu=0.5", "--price=1", "--compile"):
        done = command("gptjax.plan", "--config=configs/debug.py", flag, check=False)
        assert done.returncode == 2
        assert "name them, such as --target=v5e-16" in done.stderr
    flags = ("--config=configs/gpt2_124m.py", "--target=v5e-8", "--price=-1")
    done = command("gptjax.plan", *flags, check=False)
    assert done.returncode == 2
    assert "--price=-1: must be 0 or more" in done.stderr
