"""Machines by name, and the table of devices behind them."""

import math

import jax
import pytest

from gptjax.config.errors import UserError
from gptjax.planning.targets import parse
from gptjax.runtime import devices

TARGETS = {  # name: (device, devices, hosts, topology)
    "v5e-1": ("v5e", 1, 1, "v5e:1x1"),
    "v5e-16": ("v5e", 16, 4, "v5e:4x4"),
    "v5p-64": ("v5p", 64, 16, "v5p:4x4x4"),
    "v5p-256": ("v5p", 256, 64, "v5p:4x8x8"),
    "v6e-256": ("v6e", 256, 64, "v6e:16x16"),
    "v4-8": ("v4", 8, 2, ""),
    "h100-8": ("h100", 8, 1, "1x1x8"),
    "h100-8x4": ("h100", 32, 4, "1x4x8"),
    "h100-64": ("h100", 64, 8, "1x8x8"),
    "h100-1": ("h100", 1, 1, "1x1x1"),
    "a100-8": ("a100", 8, 1, "1x1x8"),
    "a100-40gb-8": ("a100-40gb", 8, 1, "1x1x8"),
    "h100": ("h100", 1, 1, "1x1x1"),
    "cpu": ("cpu", 1, 1, ""),
    "cpu-8": ("cpu", 8, 1, ""),
}


@pytest.mark.parametrize("name", TARGETS)
def test_names_of_targets(name):
    target = parse(name)
    got = (target.device.name, target.count, target.hosts, target.topology)
    assert got == TARGETS[name]
    if target.device.platform == "tpu" and target.topology:  # as many as the shape has
        assert math.prod(int(n) for n in target.topology.split(":")[1].split("x")) == target.count


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "v5x-16": "did you mean v5p?",
        "h10-8": "did you mean h100?",
        "v5e-12": "slices of v5e have 1, 4, 8, 16, 32, 64, 128, 256 chips",
        "v5e-8x2": "slices of v5e have",
        "h100-12": "nodes of 8 do not make 12 devices; such as h100-8x2",
        "h100-16x2": "a node has at most 8 devices",
        "h100-0": "no devices",
        "cpu-4x2": "cpu-8",
        "": "There are v4, v5e",
        "Here!": "There are v4, v5e",
    }.items(),
)
def test_names_of_no_target_are_refused_with_the_choices(name, words):
    with pytest.raises(UserError, match=f"^--target={name}: ") as error:
        parse(name)
    assert words in str(error.value)


def test_here_is_the_devices_of_this_machine():
    target = parse("here")
    assert target.device.name == "cpu"
    assert target.count == len(jax.devices())


def test_every_row_states_its_numbers_and_their_source():
    assert len({row.name for row in devices.DEVICES}) == len(devices.DEVICES)
    for row in devices.DEVICES:
        assert row.memory * 0.9 < row.usable < row.memory * 1.08, row.name
        assert row.peak >= row.peak_float32 > 1e12, row.name
        assert row.bandwidth > 1e11, row.name
        assert row.source.endswith("read 2026-11-28"), row.name
        assert ("price:" in row.source) == (row.price is not None), row.name


def test_a_device_is_known_by_the_longest_kind_that_fits():
    class Chip:
        platform = "tpu"

        def __init__(self, device_kind):
            self.device_kind = device_kind

    names = {
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v6 lite": "v6e",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA H100 80GB HBM3": "h100",
    }
    for kind, name in names.items():
        assert devices.describe(Chip(kind)).name == name
    assert devices.peak_flops(Chip("TPU v5 lite")) == 197e12
    assert devices.peak_flops(Chip("NVIDIA H100 80GB HBM3")) == 989e12
    assert devices.describe(Chip("Abacus")) is None
    assert devices.peak_flops(Chip("Abacus")) is None
    assert devices.peak_flops(jax.devices()[0]) is None  # of a CPU: no MFU is printed
