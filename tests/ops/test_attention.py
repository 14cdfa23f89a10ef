"""Every attention backend, on every platform of its row, computes what the reference does.

The kernels for TPUs run here interpreted, and those for GPUs as the XLA form of the same call;
where a GPU is, as they are.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops.attention import backends, blockwise, splash
from gptjax.ops.attention.backends import BACKENDS, Call, choose
from gptjax.ops.attention.cudnn import cudnn
from gptjax.ops.attention.mask import SAVED_NAME, Mask
from gptjax.ops.attention.reference import reference

ELSEWHERE = {"splash on tpu", "splash on others", "cudnn on gpu", "cudnn on others"}
FUNCTIONS = {
    f"{name} on {platform or 'others'}": function
    for name, row in BACKENDS.items()
    for platform, function in row.items()
    if name != "auto"  # it runs one of the others, see below
}
FUNCTIONS = {name: function for name, function in FUNCTIONS.items() if name not in ELSEWHERE}
FUNCTIONS["cudnn's call on cpu"] = functools.partial(cudnn, implementation="xla")
MASKS = {
    "causal": {},
    "packed": {"segments": True},
    "window": {"window": 5},
    "packed window of some layers": {"segments": True, "window": 5, "alternating": True},
}
# [name, kind of mask, groups, soft-cap]; interpreted kernels take seconds to compile
CASES = [
    pytest.param(name, kind, groups, softcap, marks=[pytest.mark.slow] * ("splash" in name))
    for name in FUNCTIONS
    for kind in MASKS
    for groups, softcap in ((1, 0.0), (3, 0.0 if "cudnn" in name else 2.0))
]


def inputs(groups, dtype=jnp.float32):
    """The same numbers in every dtype: those of bfloat16."""
    generator = np.random.default_rng(0)
    shapes = (2, 24, 2, groups, 8), (2, 24, 2, 8), (2, 24, 2, 8), (2, 24, 2, groups, 8)
    return [jnp.asarray(generator.standard_normal(s), jnp.bfloat16).astype(dtype) for s in shapes]


def mask(window=0, segments=False, use_window=None):
    numbers = jnp.array([[1] * 10 + [2] * 14, [1] * 24]) if segments else None
    return Mask(jnp.arange(24)[None], numbers, numbers, window, use_window)


def value_and_grads(attend, q, k, v, cotangent):
    value, back = jax.vjp(attend, q, k, v)
    return value, *back(cotangent)


def results(attend, kind, groups, softcap, dtype=jnp.float32):
    """Outputs and gradients; with alternating windows, of a layer that has one and of another."""
    settings = dict(MASKS[kind])
    alternating = settings.pop("alternating", False)

    @jax.jit
    def run(use_window, *arrays):
        layer_mask = mask(**settings, use_window=use_window if alternating else None)
        bound = functools.partial(attend, mask=layer_mask, block=7, softcap=softcap)
        return value_and_grads(bound, *arrays)

    layers = (True, False) if alternating else (True,)
    return [np.asarray(x) for use in layers for x in run(np.asarray(use), *inputs(groups, dtype))]


EXPECTED = functools.cache(functools.partial(results, reference))


@pytest.mark.parametrize(("name", "kind", "groups", "softcap"), CASES)
def test_values_and_gradients_equal_the_reference(name, kind, groups, softcap):
    found = results(FUNCTIONS[name], kind, groups, softcap)
    for ours, theirs in zip(found, EXPECTED(kind, groups, softcap), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * ("splash" in name))
        for name in FUNCTIONS
        if "reference" not in name
    ],
)
def test_bfloat16_is_as_near_to_float32_as_the_reference_in_bfloat16(name):
    """Largest error of the outputs and of each gradient, over that of the reference: at most 2."""
    exact = EXPECTED("packed", 3, 0.0)
    found = results(FUNCTIONS[name], "packed", 3, 0.0, jnp.bfloat16)
    rounded = EXPECTED("packed", 3, 0.0, jnp.bfloat16)
    for ours, theirs, wanted in zip(found, rounded, exact, strict=True):
        ours, theirs = (np.abs(x.astype(np.float32) - wanted).max() for x in (ours, theirs))
        assert ours <= 2 * theirs + 1e-3


# --- One program each: 128 queries of a row of 384, at an offset that is known when it runs ---

QUERIES, KEYS, WINDOW = 128, 384, 100
FLASH = {
    "blockwise": functools.partial(blockwise.blockwise, block=32),
    "splash": functools.partial(splash.splash, interpret=True, softcap=5.0),
    "cudnn's call": functools.partial(cudnn, implementation="xla"),
    "xla": FUNCTIONS["xla on cpu"],
}
SEGMENTS = np.array([[1] * 90 + [2] * 150 + [3] * 144, [1] * 300 + [2] * 80 + [0] * 4], np.int32)


def row():
    generator = np.random.default_rng(1)
    shapes = (2, KEYS, 1, 2, 8), (2, KEYS, 1, 8), (2, KEYS, 1, 8), (2, KEYS, 1, 2, 8)
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


@functools.cache
def program(name):
    """f(offset, use_window, q, k, v, cotangent) -> outputs and gradients of a shard of queries."""

    def part(offset, use_window, q, k, v, cotangent):
        q, segments, cotangent = (
            jax.lax.dynamic_slice_in_dim(jnp.asarray(x), offset, QUERIES, axis=1)
            for x in (q, SEGMENTS, cotangent)
        )
        index = (offset + jnp.arange(QUERIES))[None]
        attend = functools.partial(
            FLASH[name], mask=Mask(index, segments, jnp.asarray(SEGMENTS), WINDOW, use_window)
        )
        return value_and_grads(attend, q, k, v, cotangent)

    with pytest.MonkeyPatch.context() as patch:  # several blocks and strips at this size
        patch.setattr(splash, "BLOCK", 128)
        patch.setattr(blockwise, "STRIP", 64)
        compiled = jax.jit(part).lower(np.int32(0), np.asarray(True), *row()).compile()
    return lambda *arguments: [np.asarray(x) for x in compiled(*arguments)]


@functools.cache
def whole_row(name, use_window):
    softcap = 5.0 if name == "splash" else 0.0
    index, segments = jnp.arange(KEYS)[None], jnp.asarray(SEGMENTS)

    @jax.jit
    def run(*arrays):
        row_mask = Mask(index, segments, segments, WINDOW if use_window else 0)
        return value_and_grads(
            functools.partial(reference, mask=row_mask, softcap=softcap), *arrays
        )

    return [np.asarray(x) for x in run(*row())]


@pytest.mark.parametrize("use_window", [True, False])
@pytest.mark.parametrize("name", FLASH)
def test_shards_of_the_queries_are_together_the_whole_row(name, use_window):
    parts = [
        program(name)(np.int32(offset), np.asarray(use_window), *row())
        for offset in range(0, KEYS, QUERIES)
    ]
    values, dq, dk, dv = zip(*parts, strict=True)
    found = np.concatenate(values, 1), np.concatenate(dq, 1), sum(dk), sum(dv)
    for ours, theirs in zip(found, whole_row(name, use_window), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("offset", [37, 201])
@pytest.mark.parametrize("name", FLASH)
def test_queries_may_stand_anywhere_in_the_row(name, offset):
    value, dq, _, _ = program(name)(np.int32(offset), np.asarray(True), *row())
    part = slice(offset, offset + QUERIES)
    for ours, theirs in zip((value, dq), whole_row(name, True)[:2], strict=True):
        np.testing.assert_allclose(ours, theirs[:, part], atol=2e-5)


@pytest.mark.parametrize("name", FLASH)
def test_a_document_changes_no_output_or_gradient_of_another(name):
    """Bit for bit: queries 128 to 255 of row 0 belong to document 2 up to 240, then to 3."""
    q, k, v, cotangent = row()
    others = SEGMENTS[0] != 2
    cotangent[:, ~others] = 0  # the loss is of the other documents
    changed = [x.copy() for x in (q, k, v)]
    for x, shift in zip(changed, (1.0, -1.0, 1.0), strict=True):
        x[0, ~others] += shift
    results = [
        program(name)(np.int32(128), np.asarray(False), *arrays, cotangent)
        for arrays in ((q, k, v), changed)
    ]
    for ours, theirs in zip(*results, strict=True):
        kept = others if ours.shape[1] == KEYS else others[128:256]
        np.testing.assert_array_equal(ours[0, kept], theirs[0, kept])
    for gradient in results[0][1:]:
        inside = ~others if gradient.shape[1] == KEYS else ~others[128:256]
        assert not np.any(gradient[0, inside])
    assert np.any(results[0][0][0, ~others[128:256]] != results[1][0][0, ~others[128:256]])


@pytest.mark.parametrize(("use_window", "first"), [(True, 0), (False, 0), (True, 256)])
@pytest.mark.parametrize("name", ["blockwise", "splash"])
def test_blocks_that_no_query_sees_are_not_read(name, use_window, first):
    """NaN there stays there; read and multiplied by a weight of 0, it would not."""
    q, k, v, cotangent = row()
    hidden = np.arange(KEYS) >= 128 if first == 0 else np.arange(KEYS) < 128
    k, v = (np.where(hidden[None, :, None, None], np.float32(np.nan), x) for x in (k, v))
    results = program(name)(np.int32(first), np.asarray(use_window), q, k, v, cotangent)
    assert all(np.isfinite(x).all() for x in results)
    assert not np.any(results[2][:, hidden]) and not np.any(results[3][:, hidden])


def kernels_in(jaxpr):
    """How many kernels, or loops of a length that depends on the offset, a program runs."""
    number = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("pallas_call", "while"):
            number += 1
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            number += kernels_in(inner) if hasattr(inner, "eqns") else 0
    return number


@pytest.mark.parametrize("name", ["blockwise", "splash"])
def test_a_policy_may_keep_what_the_forward_kernel_gave(name):
    """Then it does not run again: the program has one kernel fewer."""
    if name == "splash" and jax.__version_info__ < (0, 12):
        pytest.skip("this jax does not see the names inside of splash's own jit: it runs again")
    attend = functools.partial(FLASH[name], mask=Mask(jnp.arange(KEYS)[None]))

    def loss(policy, q, k, v):
        remat = jax.checkpoint(lambda *a: jnp.sin(attend(*a)).sum(), policy=policy)
        return remat(jnp.sin(q), jnp.sin(k), jnp.sin(v))

    counts = []
    for policy in (None, jax.checkpoint_policies.save_only_these_names(SAVED_NAME)):
        program = jax.make_jaxpr(jax.grad(functools.partial(loss, policy), (0, 1, 2)))(*row()[:3])
        counts.append(kernels_in(program.jaxpr))
    assert counts[1] == counts[0] - 1, counts


# --- What each takes ---

GPU = Call(dtype="bfloat16", rows=2, queries=1024, keys=1024, head_width=64)
CHOICES = [
    ("tpu", {}, "splash"),
    ("tpu", {"softcap": 50.0, "packed": True, "queries": 256}, "splash"),
    ("tpu", {"dropout": True}, "xla"),
    ("gpu", {}, "cudnn"),
    ("gpu", {"packed": True}, "cudnn"),
    ("gpu", {"packed": True, "keys": 32768, "queries": 32768}, "blockwise"),  # a mask of 4 GiB
    ("gpu", {"keys": 32768, "queries": 32768}, "cudnn"),
    ("gpu", {"dtype": "float32"}, "blockwise"),
    ("gpu", {"softcap": 50.0}, "blockwise"),
    ("gpu", {"head_width": 256}, "blockwise"),
    ("gpu", {"head_width": 68}, "blockwise"),
    ("gpu", {"packed": True, "keys": 1023, "queries": 1023}, "blockwise"),
    ("gpu", {"keys": 1023, "queries": 1023}, "cudnn"),
    ("gpu", {"dropout": True}, "xla"),
    ("cpu", {}, "xla"),
    ("cpu", {"keys": backends.LONGEST_XLA_ROW}, "xla"),
    ("cpu", {"keys": backends.LONGEST_XLA_ROW + 1}, "blockwise"),
    ("cpu", {"keys": 32768, "dropout": True}, "xla"),
    ("", {"dtype": "float32"}, "xla"),
]


@pytest.mark.parametrize(("platform", "change", "expected"), CHOICES)
def test_auto_takes_what_the_platform_and_the_call_allow(platform, change, expected):
    assert choose(platform, dataclasses.replace(GPU, **change)) == expected


@pytest.mark.parametrize("keys", [24, 64])
def test_auto_runs_what_it_chooses(keys, monkeypatch):
    monkeypatch.setattr(backends, "LONGEST_XLA_ROW", 32)
    arrays = [x[:, :1] for x in inputs(1)]
    q, k, v = (jnp.tile(x, (1, keys, *[1] * (x.ndim - 2))) for x in arrays[:3])
    settings = dict(mask=Mask(jnp.arange(keys)[None]), block=16)
    program = jax.make_jaxpr(functools.partial(BACKENDS["auto"]["cpu"], **settings))(q, k, v)
    chosen = FUNCTIONS["xla on cpu" if keys == 24 else "blockwise on others"]
    expected = jax.make_jaxpr(functools.partial(chosen, **settings))(q, k, v)
    names = [[e.primitive.name for e in x.jaxpr.eqns] for x in (program, expected)]
    assert names[0] == names[1]


REFUSALS = [
    ("cudnn on gpu", {}, "float32", "model.dtype = 'bfloat16'"),
    ("cudnn on gpu", {"softcap": 2.0}, "bfloat16", "attention_softcap = 2.0"),
    ("cudnn on gpu", {"dropout_BKGTS": jnp.ones(())}, "bfloat16", "model.dropout = 0"),
    ("cudnn on others", {}, "bfloat16", "NVIDIA GPUs alone"),
    ("splash on others", {}, "bfloat16", "TPUs alone"),
    ("splash on tpu", {"dropout_BKGTS": jnp.ones(())}, "bfloat16", "model.dropout = 0"),
    ("blockwise on others", {"dropout_BKGTS": jnp.ones(())}, "bfloat16", "model.dropout = 0"),
]


@pytest.mark.parametrize(("name", "settings", "dtype", "message"), REFUSALS)
def test_what_a_backend_has_not_is_refused_with_what_to_set(name, settings, dtype, message):
    backend, _, platform = name.partition(" on ")
    attend = BACKENDS[backend]["" if platform == "others" else platform]
    q, k, v, _ = inputs(1, jnp.dtype(dtype))
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, mask(), **settings)


def test_cudnn_refuses_a_mask_that_takes_too_much_memory():
    shapes = [
        jax.ShapeDtypeStruct((1, 32768, *rest), jnp.bfloat16) for rest in ((1, 1, 64), (1, 64))
    ]
    index = jax.ShapeDtypeStruct((1, 32768), jnp.int32)

    def attend(q, k, index):
        return cudnn(q, k, k, Mask(index, index, index), implementation="xla")

    with pytest.raises(ValueError, match=r"2\.0 GiB, more .* model\.attention = 'blockwise'"):
        jax.eval_shape(attend, *shapes, index)


@pytest.mark.skipif(
    all(device.platform != "gpu" for device in jax.devices()), reason="needs a GPU with cuDNN"
)
@pytest.mark.parametrize("kind", MASKS)
def test_the_kernels_of_cudnn_equal_the_reference(kind):
    found = results(cudnn, kind, 3, 0.0, jnp.bfloat16)
    for ours, theirs in zip(found, EXPECTED(kind, 3, 0.0), strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), theirs, atol=0.06)
