"""What runs leave on "auto": the choice follows memory, and is today's where there is enough."""

import dataclasses
import json

import jax
import pytest
from conftest import make_config
from helpers import run_steps

from gptjax.config import build
from gptjax.planning.forecast import shapes_of
from gptjax.runtime import devices
from gptjax.runtime.mesh import make_mesh
from gptjax.runtime.sharding import AXES
from gptjax.training import auto
from gptjax.training.memory import RECOMPUTED, Work, estimate
from gptjax.training.setup import make_plan

ONE = dict.fromkeys(AXES, 1)
BIG = dict(layers=8, width=512, heads=8, context=2048, vocab_size=1024, dtype="bfloat16")


def choose(config, usable, sizes=ONE, platform="tpu"):
    return auto.choose(config, shapes_of(config), sizes, platform, usable)


def held(config, choice, sizes=ONE):
    work = Work.of(config, sizes, choice.micro_batches, choice.remat, "tpu")
    return estimate(shapes_of(config), work).total


def test_on_one_cpu_device_auto_is_what_was_the_default(one_device):
    plan = make_plan(config := make_config(), make_mesh(config, one_device))
    assert (config.model.remat, config.model.scan_layers) == ("auto", "auto")
    assert config.train.grad_accum_steps == 0
    assert (plan.model.remat, plan.model.scan_layers, plan.micro_batches) == ("none", False, 1)
    stated = make_config(
        model=dict(remat="none", scan_layers=False), train=dict(grad_accum_steps=1)
    )
    losses = [run_steps(c, one_device)[0].tolist() for c in (config, stated)]
    assert losses[0] == losses[1]


def test_what_the_config_states_is_not_changed(one_device):
    config = make_config(model=dict(remat="full", scan_layers=True), train=dict(grad_accum_steps=4))
    plan = make_plan(config, make_mesh(config, one_device))
    assert (plan.model.remat, plan.model.scan_layers, plan.micro_batches) == ("full", True, 4)
    # also where it does not fit: a stated number is never overruled in silence
    assert choose(config, usable=1.0) == ("full", True, 4)


def test_less_memory_takes_more_micro_batches_then_more_recomputation():
    config = make_config(model=BIG, train=dict(batch_size=16))
    most = held(config, auto.Choice("none", True, 1))
    costs = []
    for usable in (most, most * 0.6, most * 0.3, most * 0.2, most * 0.13):
        choice = choose(config, usable / auto.ROOM)
        assert held(config, choice) <= usable
        costs.append((list(RECOMPUTED).index(choice.remat), choice.micro_batches))
    assert costs[0] == (0, 1)
    assert costs[1] == (0, 2)  # micro-batches are cheaper than computing again
    assert costs == sorted(costs)
    assert costs[-1][0] > 0


def test_where_nothing_fits_the_choice_holds_least():
    config = make_config(model=BIG, train=dict(batch_size=16))
    choice = choose(config, usable=1.0)
    others = [auto.Choice(remat, True, n) for remat in ("none", "dots", "full") for n in (1, 4, 16)]
    assert all(held(config, choice) <= held(config, other) for other in others)


def test_micro_batches_leave_whole_rows_to_every_device():
    config = make_config(model=BIG, train=dict(batch_size=24))
    sizes = {**ONE, "data": 2, "fsdp": 2}
    assert auto.micro_batch_counts(config, sizes) == [1, 2, 3, 6]
    assert choose(config, usable=1.0, sizes=sizes).micro_batches == 6


def test_the_loss_of_kto_is_not_cut():
    config = make_config(model=BIG, train=dict(batch_size=16))
    task = dataclasses.replace(config.task, loss="kto")
    assert auto.micro_batch_counts(dataclasses.replace(config, task=task), ONE) == [1]


def test_deep_models_are_scanned_on_accelerators_alone():
    config = make_config(model=dict(layers=12))
    for platform in ("gpu", "tpu", "METAL"):
        assert choose(config, None, platform=platform).scan_layers
    assert not choose(config, None, platform="cpu").scan_layers
    shallow = make_config(model=dict(layers=2))
    assert not choose(shallow, None, platform="gpu").scan_layers


def test_devices_of_a_processor_share_its_memory():
    config = make_config()
    eight = devices.usable_bytes(make_mesh(config, jax.devices()))
    one = devices.usable_bytes(make_mesh(config, jax.devices()[:1]))
    assert one == pytest.approx(8 * eight)


def test_auto_is_no_change_on_resume_and_a_stated_number_is():
    configs = {n: make_config(train=dict(grad_accum_steps=n)) for n in (0, 1, 2)}
    assert build.changes(configs[1], configs[0]) == []
    assert build.changes(configs[0], configs[2]) == []
    assert build.changes(configs[1], configs[2]) == ["train.grad_accum_steps: 1 -> 2"]


def test_booleans_and_names_of_scan_layers():
    assert build.parse("true", bool | str) is True
    assert build.parse("auto", bool | str) == "auto"
    assert make_config(model=dict(scan_layers=False)).model.scan_layers is False
    stored = json.loads('{"model": {"scan": true, "remat": "dots"}}')  # as older runs have it
    assert build.from_stored(stored).model.scan_layers is True
    for wrong in ("yes", 1, 0.5):
        with pytest.raises(build.UserError, match=r"model.scan_layers"):
            make_config(model=dict(scan_layers=wrong))
