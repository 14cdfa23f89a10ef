"""The estimate of memory against compiled programs, and what it must grow with."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from conftest import make_config

from gptjax.config import build
from gptjax.core import tree
from gptjax.model import init as model_init
from gptjax.model import transformer
from gptjax.model.memory import POLICIES
from gptjax.ops.attention.mask import Mask
from gptjax.planning.forecast import shapes_of
from gptjax.runtime.mesh import make_mesh
from gptjax.runtime.sharding import AXES
from gptjax.training import step
from gptjax.training.memory import RECOMPUTED, Work, estimate, local_bytes, saved
from gptjax.training.setup import make_plan

MODEL = dict(
    layers=8,
    width=256,
    heads=8,
    kv_heads=4,
    mlp_dim=768,
    context=512,
    vocab_size=4096,
    positions="rope",
    norm="rmsnorm",
    mlp="swiglu",
    bias="none",
    tie_embeddings=False,
    scan_layers=True,
    remat="full",
    attention="blockwise",
    attention_block=128,
)
CPU_MESHES = {  # name: sections of the config, on eight devices
    "data 8": dict(mesh=dict(data=8)),
    "fsdp 8": dict(mesh=dict(data=1, fsdp=8)),
    "all but context, accumulated": dict(
        mesh=dict(data=2, fsdp=2, tensor=2), train=dict(grad_accum_steps=2)
    ),
    "fsdp 4, tensor 2, nothing again": dict(
        mesh=dict(data=1, fsdp=4, tensor=2), model=dict(remat="none")
    ),
    "data 2, context 4": dict(mesh=dict(data=2, context=4)),
    "fsdp 2, tensor 2, context 2": dict(mesh=dict(data=1, fsdp=2, tensor=2, context=2)),
}


def config_of(model=None, train=None, mesh=None):
    return make_config(
        model={**MODEL, **(model or {})},
        train={"batch_size": 32, "grad_accum_steps": 1, **(train or {})},
        mesh=mesh or {},
    )


def estimated(config, sizes, platform):
    count = config.train.grad_accum_steps
    return estimate(shapes_of(config), Work.of(config, sizes, count, config.model.remat, platform))


@pytest.mark.slow
@pytest.mark.parametrize("name", CPU_MESHES)
def test_within_a_tenth_of_what_xla_takes_on_a_cpu(name):
    config = config_of(**CPU_MESHES[name])
    mesh = make_mesh(config, jax.devices())
    analysis = step.lower(make_plan(config, mesh)).compile().memory_analysis()
    peak = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    assert estimated(config, dict(mesh.shape), "cpu").total == pytest.approx(peak, rel=0.1)


def test_parameters_and_optimizer_are_exact():
    config = config_of(mesh=dict(data=1, fsdp=4, tensor=2))
    mesh = make_mesh(config, jax.devices())
    plan = make_plan(config, mesh)
    shapes = shapes_of(config)

    def on_a_device(arrays):
        return sum(
            leaf.dtype.itemsize * _size(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(arrays)
        )

    sizes = dict(mesh.shape)
    assert local_bytes(shapes.params, sizes) == on_a_device(plan.state_shapes.params)
    assert local_bytes(shapes.optimizer, sizes) == on_a_device(plan.state_shapes.opt_state)
    one = dict.fromkeys(AXES, 1)
    assert local_bytes(shapes.params, one) == tree.nbytes(plan.state_shapes.params)


def _size(shape):
    size = 1
    for n in shape:
        size *= n
    return size


def test_what_is_kept_falls_from_policy_to_policy():
    config = config_of()
    work = Work.of(config, dict.fromkeys(AXES, 1), 1, "none", "tpu")
    kept = [saved(dataclasses.replace(work, remat=remat)) for remat in RECOMPUTED]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 0  # on the host
    assert kept[-2] == 32 * 512 * 256 * 4  # full: one residual stream, float32


def test_memory_grows_with_depth_length_and_rows_and_shrinks_with_the_mesh():
    one = dict.fromkeys(AXES, 1)

    def total(sizes=one, **changes):
        return estimated(config_of(**changes), sizes, "gpu").total

    least = total()
    assert total(model=dict(layers=16)) > 1.1 * least
    assert total(train=dict(batch_size=64)) > 1.3 * least
    assert total(train=dict(grad_accum_steps=4)) < least
    for axis in AXES:
        assert total({**one, axis: 4}) < least, axis


def test_attention_that_keeps_its_weights_grows_with_the_square_of_the_length():
    def activations(attention, context):
        config = config_of(model=dict(attention=attention, context=context, remat="none"))
        return estimated(config, dict.fromkeys(AXES, 1), "tpu").activations

    for attention, factor in {"xla": 3.5, "splash": 2.1, "blockwise": 2.1}.items():
        short, long = activations(attention, 8192), activations(attention, 16384)
        assert (long > factor * short) == (attention == "xla"), attention


def test_adapters_keep_their_base_and_have_small_gradients():
    config = build.build_config(
        dict(
            model=MODEL | dict(vocab_size=257),
            data=dict(tokenizer="bytes"),
            train=dict(init_from="x", batch_size=32),
            lora=dict(rank=4),
        )
    )
    shapes = shapes_of(config)
    one = dict.fromkeys(AXES, 1)
    memory = estimate(shapes, Work.of(config, one, 2, "full", "tpu"))
    assert memory.optimizer < memory.parameters / 10
    assert memory.gradients < memory.parameters / 5


SHAPES = {
    "gpt2": dict(layers=2, width=96, heads=6, mlp_dim=320),
    "llama": dict(
        layers=2,
        width=96,
        heads=6,
        kv_heads=3,
        mlp_dim=320,
        positions="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias="none",
    ),
}


def kept_by_vjp(model, length, policy):
    """Bytes of the residuals of one block, without its parameters; traced alone."""
    x = jax.ShapeDtypeStruct((1, length, model.width), model.dtype)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def params_of_block():
        params = model_init.init_params(model, jax.random.key(0))
        return jax.tree.map(lambda p: p[0], transformer.cast(model, params)["blocks"])

    def residuals(params, x, positions, segments):
        def block(params, x):
            mask = Mask(jnp.arange(length)[None], segments, segments)
            variables = {"params": params}
            return transformer.Block(model).apply(variables, x, positions, mask)[0]

        if policy:
            block = jax.checkpoint(block, policy=POLICIES[policy], prevent_cse=False)
        return jax.tree.leaves(jax.vjp(block, params, x)[1])

    params = jax.eval_shape(params_of_block)
    own = {(leaf.size, leaf.dtype) for leaf in jax.tree.leaves(params)}
    kept = jax.eval_shape(residuals, params, x, ids, ids)
    return sum(
        leaf.size * leaf.dtype.itemsize for leaf in kept if (leaf.size, leaf.dtype) not in own
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("attention", ["blockwise", "xla"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_block_keeps_is_what_its_derivative_keeps(shape, attention, dtype):
    length = 448
    config = make_config(
        model=SHAPES[shape] | dict(context=length, attention=attention, dtype=dtype),
        train=dict(batch_size=1),
    )
    model = dataclasses.replace(config.model, implementation="tpu")
    cases = {("none", 1): "", **{(remat, 1): remat for remat in ("dots", "attention", "full")}}
    cases["none", 2] = "none"  # under fsdp, so that weights are gathered again
    for (remat, fsdp), policy in cases.items():
        sizes = dict.fromkeys(AXES, 1) | {"fsdp": fsdp}
        said = saved(Work.of(config, sizes, 1, remat, "gpu"))
        assert said == pytest.approx(kept_by_vjp(model, length, policy), rel=0.06), (remat, fsdp)
