"""Collectives of compiled programs against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax.planning.collectives import collectives
from gptjax.runtime.sharding import AXES

KIB = 1024


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2, 1), AXES)


def compiled(mesh, function, specs, *shapes):
    """The optimised HLO of a function of every device's own float32 arrays."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def facts(one):
    return one.kind, one.axes, one.devices, one.size, one.count, one.sent


def test_kinds_axes_bytes_and_what_a_ring_sends(mesh):
    def function(x):  # [32, 8]: 1 KiB on each device
        whole = lax.all_gather(x, "fsdp", tiled=True)  # 2 KiB
        swapped = lax.all_to_all(x, ("fsdp", "tensor"), 0, 0, tiled=True)
        part = lax.psum_scatter(x * 2, "tensor", tiled=True)
        moved = lax.ppermute(x * 3, "data", [(0, 1), (1, 0)])
        each = [jnp.sum(jnp.sin(a)) for a in (whole, swapped, part, moved)]
        return lax.psum(x * sum(each), ("data", "fsdp", "tensor"))

    found = collectives(compiled(mesh, function, P("fsdp"), (64, 8)), mesh)
    assert sorted(facts(one) for one in found) == [
        ("all-gather", ("fsdp",), 2, 2 * KIB, 1, KIB),
        ("all-reduce", ("data", "fsdp", "tensor"), 8, KIB, 1, 2 * KIB * 7 / 8),
        ("all-to-all", ("fsdp", "tensor"), 4, KIB, 1, KIB * 3 / 4),
        ("collective-permute", ("data",), 2, KIB, 1, KIB),
        ("reduce-scatter", ("tensor",), 2, KIB, 1, KIB / 2),
    ]
    assert all(one.dtypes == ("f32",) and one.exact for one in found)


def test_loops_in_loops_are_multiplied_out(mesh):
    def layer(x, w):
        return jnp.tanh(x @ lax.all_gather(w, "fsdp", tiled=True)), None

    def micro_batch(sums, weights):
        y, _ = lax.scan(layer, sums, weights)
        return lax.psum_scatter(jnp.tile(y, (2, 1)), "fsdp", tiled=True), None

    def function(x, w):  # 5 micro-batches of 3 layers of [16, 16]
        y, _ = lax.scan(lambda y, _: micro_batch(y, w), x, length=5)
        return lax.psum(y, "data")

    hlo = compiled(mesh, function, (P(), P(None, "fsdp")), (16, 16), (3, 16, 16))
    found = {one.kind: one for one in collectives(hlo, mesh)}
    assert (found["all-gather"].count, len(found["all-gather"].loops)) == (15, 2)
    assert found["all-gather"].total == 15 * KIB
    assert (found["reduce-scatter"].count, found["reduce-scatter"].total) == (5, 5 * 2 * KIB)
    assert (found["all-reduce"].count, found["all-reduce"].loops) == (1, ())


def test_a_loop_that_ends_by_its_data_counts_once_and_says_so(mesh):
    def function(x):
        return lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: lax.psum(x, "tensor"), x)

    (one,) = collectives(compiled(mesh, function, P(), (16, 16)), mesh)
    assert (one.count, one.exact, one.axes) == (1, False, ("tensor",))


TPU = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[64,16]) -> bf16[8,16] {
  %input = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,16]{1,0} all-reduce(%input), replica_groups=GROUPS, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = bf16[8,16]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero)
}

%body (state: (s32[], bf16[64,16], s32[])) -> (s32[], bf16[64,16], s32[]) {
  %state = (s32[]{:T(128)}, bf16[64,16]{1,0}, /*index=2*/s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %n = s32[] get-tuple-element(%state), index=2
  %x = bf16[64,16]{1,0} get-tuple-element(%state), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %kernel.1 = bf16[64,16]{1,0} custom-call(%x), frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="kernel"}
  %part = bf16[8,16]{1,0} fusion(%kernel.1), kind=kCustom, calls=%all-reduce-scatter.1
  %start = (bf16[8,16]{1,0}, bf16[64,16]{1,0}) all-gather-start(%part), replica_groups=GROUPS
  %y = bf16[64,16]{1,0} all-gather-done(%start)
  ROOT %new = (s32[]{:T(128)}, bf16[64,16]{1,0}, s32[]) tuple(%next, %y, %n)
}

%condition (state: (s32[], bf16[64,16], s32[])) -> pred[] {
  %state.1 = (s32[], bf16[64,16]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %n.1 = s32[] get-tuple-element(%state.1), index=2
  ROOT %less = pred[] compare(%i.1, %n.1), direction=LT
}

ENTRY %main (x: bf16[64,16]) -> bf16[64,16] {
  %x.1 = bf16[64,16]{1,0} parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %start.1 = s32[]{:T(128)S(6)} copy(%one)
  %end = s32[] constant(8)
  %tuple = (s32[], bf16[64,16]{1,0}, s32[]) tuple(%start.1, %x.1, /*index=2*/%end)
  %while = (s32[], bf16[64,16]{1,0}, s32[]) while(%tuple), condition=%condition, body=%body
  ROOT %result = bf16[64,16]{1,0} get-tuple-element(%while), index=1
}
"""


@pytest.mark.parametrize(
    ("groups", "axes", "devices"),
    [
        ("{{0,1,2,3,4,5,6,7}}", ("data", "fsdp", "tensor"), 8),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("fsdp",), 2),
        ("[4,2]<=[8]", ("tensor",), 2),
        ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "tensor"), 4),
        ("mesh['data'=2,'fsdp'=2,'tensor'=2,'context'=1] {'fsdp'}", ("fsdp",), 2),
        ("mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','tensor'}", ("data", "tensor"), 4),
        ("mesh['axis_0'=8] {'axis_0':(2)2}", ("fsdp",), 2),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]<=[2,4]T(1,0)) {'a'}", ("fsdp",), 2),
    ],
)
def test_programs_as_libtpu_writes_them(mesh, groups, axes, devices):
    """No `known_trip_count`; a reduce-scatter is a fused all-reduce; kernels take several lines."""
    scatter, gather = collectives(TPU.replace("GROUPS", groups), mesh)
    rounds = 4  # 1, 3, 5, 7
    whole = 64 * 16 * 2
    ring = (devices - 1) / devices
    assert facts(scatter) == ("reduce-scatter", axes, devices, whole, rounds, 4 * whole * ring)
    result = 8 * 16 * 2 * devices
    assert facts(gather) == ("all-gather", axes, devices, result, rounds, 4 * result * ring)
    assert (gather.dtypes, gather.loops, gather.exact) == (("bf16",), ("while",), True)


def test_groups_of_another_form_are_not_guessed(mesh):
    with pytest.raises(ValueError, match="not understood"):
        collectives(TPU.replace("GROUPS", "mesh[8] {all}"), mesh)
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("module @jit_step", mesh)


def test_a_gather_that_goes_on_beside_other_work_counts_once():
    """As libtpu writes it: the gather's start, and two fusions that it runs beside."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 4, 1, 1), AXES)
    computations = "\n".join(
        f"""%async_collective_fusion.{i} (p: bf16[2]) -> bf16[8] {{
  %p.{i} = bf16[2]{{0}} parameter(0)
  ROOT %g.{i} = bf16[8]{{0}} all-gather(%p.{i}), channel_id={channel}, replica_groups=[1,4]<=[4]
}}
"""
        for i, channel in enumerate([7, 7, 7, 8])
    )
    fusions = "\n".join(
        f"  %f.{i} = bf16[8]{{0}} fusion(%x), kind=kCustom, calls=%async_collective_fusion.{i}"
        for i in range(4)
    )
    hlo = f"{computations}\nENTRY %main (x: bf16[2]) -> bf16[8] {{\n{fusions}\n}}\n"
    assert [(one.name, one.size) for one in collectives(hlo, mesh)] == [("g.0", 16), ("g.3", 16)]


def test_gpus_start_collectives_apart_from_their_end():
    """As XLA:GPU writes them: several arrays at once, and wrapped in another computation."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 4, 1, 1), AXES)
    hlo = """
%wrapped (p: f32[8,4], q: bf16[4]) -> (f32[2,4], bf16[1]) {
  %p = f32[8,4]{1,0} parameter(0)
  %q = bf16[4]{0} parameter(1)
  ROOT %rs = (f32[2,4]{1,0}, bf16[1]{0}) reduce-scatter(%p, %q), replica_groups={{0,1,2,3}}
}

ENTRY %main (x: f32[8,4], y: bf16[4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = bf16[4]{0} parameter(1)
  %s = ((f32[8,4], bf16[4]), (f32[2,4], bf16[1])) async-start(%x, %y), calls=%wrapped
  %d = (f32[2,4], bf16[1]) async-done(%s), calls=%wrapped
  %s2 = f32[8,4]{1,0} all-reduce-start(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %d2 = f32[8,4]{1,0} all-reduce-done(%s2)
}
"""
    scatter, reduce = collectives(hlo, mesh)
    assert (scatter.size, scatter.count, scatter.dtypes) == (8 * 4 * 4 + 8, 1, ("bf16", "f32"))
    assert (reduce.kind, reduce.size, reduce.sent) == ("all-reduce", 128, 2 * 128 * 3 / 4)


def test_bytes_of_small_and_odd_types():
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2, 1, 1), AXES)
    body = "\n".join(
        f"  %p{i} = {t}[6]{{0}} parameter({i})\n"
        f"  %r{i} = {t}[12]{{0}} all-gather(%p{i}), replica_groups={{{{0,1}}}}, dimensions={{0}}"
        for i, t in enumerate(["pred", "s4", "f8e4m3fn", "bf16", "s64", "c64"])
    )
    found = collectives(f"ENTRY %main () -> f32[] {{\n{body}\n}}\n", mesh)
    assert [one.size for one in found] == [12, 6, 12, 24, 96, 96]
