"""The formulas of communication against counts by hand, and the links that carry it."""

import dataclasses
import math

import pytest
from conftest import make_config

from gptjax.planning import communication
from gptjax.planning.communication import Transfer
from gptjax.planning.forecast import shapes_of
from gptjax.planning.targets import parse
from gptjax.runtime.sharding import AXES
from gptjax.training.memory import Work

LLAMA = dict(
    layers=3,
    width=64,
    heads=8,
    kv_heads=4,
    head_dim=8,
    mlp_dim=96,
    vocab_size=256,
    context=32,
    positions="rope",
    norm="rmsnorm",
    mlp="swiglu",
    bias="none",
    tie_embeddings=False,
    dtype="bfloat16",
)


def make_work(remat="none", micro_batches=2, **sizes):
    config = make_config(model=LLAMA, train=dict(batch_size=32))
    return config, Work.of(config, mesh(**sizes), micro_batches, remat, "tpu")


def mesh(**sizes):
    return {axis: sizes.get(axis, 1) for axis in AXES}


def total(transfers):
    return sum(transfer.sent for transfer in transfers)


def test_over_fsdp_by_hand():
    _, work = make_work(fsdp=4, tensor=2)
    qkv, out, gate_up, down = 64 * 4 * (2 + 2) * 8, 8 * 8 * 64, 64 * 2 * 96, 96 * 64
    layer = 2 * (qkv + out + gate_up + down) / 2  # bfloat16, and half of each matrix
    table = 2 * 256 * 64 / 2
    rows = 32 // 2 // 4
    tokens = 2 * rows * 32 * 64 / 2
    by_hand = 2 * 3 / 4 * (3 * layer * 2 + 3 * layer + 2 * table + 2 * tokens)
    assert total(communication.over_fsdp(work)) == by_hand


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("full", 3)])
def test_over_tensor_by_hand(remat, again):
    _, work = make_work(remat, data=2, tensor=4)
    stream = 2 * (32 // 2 // 2) * 32 * 64  # bfloat16 [rows, T, D]
    # in each layer a gather and a scatter for attention and for the MLP, and the transposes
    by_hand = 2 * 3 / 4 * stream * (3 * (4 + 4 + again) + 4)
    assert total(communication.over_tensor(work)) == by_hand


@pytest.mark.parametrize(("remat", "passes"), [("none", 2), ("full", 3)])
def test_over_context_by_hand(remat, passes):
    _, work = make_work(remat, context=4, tensor=2)
    part = 2 * 16 * (32 // 4) * (4 // 2) * 8  # bfloat16 keys of a device [rows, T / 4, K / 2, C]
    by_hand = 2 * 3 * passes * 2 * (4 - 1) * part  # keys and values to the three others
    assert total(communication.over_context(work)) == by_hand


def test_once_a_step_by_hand():
    config, work = make_work(data=2, fsdp=2, context=2)
    sums = communication.once_a_step(shapes_of(config), work.sizes)
    matrices = 3 * (64 * 16 * 8 + 64 * 64 + 64 * 192 + 96 * 64) + 2 * 256 * 64
    norms = 64 * (2 * 3 + 1)
    expected = {
        ("data", "context"): 2 * 3 / 4 * 4 * matrices / 2,
        ("data", "fsdp", "context"): 2 * 7 / 8 * 4 * norms,
    }
    assert {transfer.axes: transfer.sent for transfer in sums} == expected


def test_nothing_over_data_grows_with_the_number_of_micro_batches():
    config, one = make_work(micro_batches=1, data=2, fsdp=4)
    _, eight = make_work(micro_batches=4, data=2, fsdp=4)
    shapes = shapes_of(config)

    def over(work, axis):
        return total(t for t in communication.transfers(shapes, work) if axis in t.axes)

    assert over(eight, "data") == over(one, "data")
    assert over(eight, "fsdp") > 2 * over(one, "fsdp")


def test_one_device_sends_nothing():
    config, work = make_work()
    assert communication.transfers(shapes_of(config), work) == []


def test_links_inside_a_node_and_across_nodes():
    target = parse("h100-8x4")
    link, network = target.device.link, target.device.network
    sizes = mesh(data=4, fsdp=4, tensor=2)
    rate = {axis: communication.bandwidth(target, sizes, (axis,)) for axis in AXES[:3]}
    assert rate == {"data": network, "fsdp": link, "tensor": link}
    # all 32 in one axis: each node's eight adapters share what leaves it
    whole = mesh(fsdp=32)
    assert communication.bandwidth(target, whole, ("fsdp",)) == min(link, 8 * network)
    across = mesh(fsdp=16, tensor=2)
    assert communication.bandwidth(target, across, ("fsdp",)) == 4 * network
    # the chips of a slice are on one network
    chips = parse("v5p-64")
    assert communication.bandwidth(chips, mesh(data=64), ("data",)) == chips.device.link


def test_time_of_the_links_is_unknown_where_a_rate_is():
    transfers = [Transfer(("data",), "gradients", 3e9)]
    sizes = mesh(data=8)
    assert communication.seconds(transfers, parse("cpu-8"), sizes) is None
    seconds = communication.seconds(transfers, parse("v5e-8"), sizes)
    assert math.isclose(seconds, 3e9 / parse("v5e-8").device.link)
    no_network = dataclasses.replace(parse("l4-8x2"), count=16)
    assert communication.seconds(transfers, no_network, mesh(data=16)) is None
