"""Flash attention as the compilers of TPUs and GPUs make it, for chips that are not here.

Inside a manual region over a mesh of eight: rows over fsdp, or the queries of one row over context.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.ops.attention.backends import backends_for
from gptjax.ops.attention.mask import Mask
from gptjax.planning import compile, described, targets

pytestmark = pytest.mark.compiled
GIB = 2**30
# target: its compiler
COMPILERS = {"v5e-8": "libtpu", "v5p-8": "libtpu", "v6e-8": "libtpu", "h100-8": "jax_cuda12_plugin"}


@functools.cache
def mesh_of(name, context):
    target = targets.parse(name)
    if importlib.util.find_spec(COMPILERS[name]) is None:
        pytest.skip(f"{COMPILERS[name]} is not installed")
    described.prepare(target)
    devices = np.array(described.devices(target)).reshape(-1, context)
    return jax.sharding.Mesh(devices, ("fsdp", "context"))


def compiled(name, length, width, *, context=1, packed=True, window=0, softcap=0.0, groups=4):
    """Outputs' sum of squares and gradients, one row a device or, by context, one for all."""
    mesh = mesh_of(name, context)
    attend = backends_for("gpu" if name.startswith("h100") else "tpu")["auto"]

    def local(q, k, v, segments):
        k, v, all_segments = (
            jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v, segments)
        )
        first = jax.lax.axis_index("context") * q.shape[1]
        slots = (first + jnp.arange(q.shape[1], dtype=jnp.int32))[None]
        numbers = (segments, all_segments) if packed else (None, None)
        mask = Mask(slots, *numbers, window)

        def loss(q, k, v):
            return (attend(q, k, v, mask, softcap=softcap).astype(jnp.float32) ** 2).sum()

        value, grads = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
        split = functools.partial(
            jax.lax.psum_scatter, axis_name="context", scatter_dimension=1, tiled=True
        )
        return jax.lax.psum(value, mesh.axis_names), (grads[0], split(grads[1]), split(grads[2]))

    spec = P("fsdp", "context")
    step = jax.shard_map(
        local, mesh=mesh, in_specs=spec, out_specs=(P(), (spec, spec, spec)), check_vma=False
    )
    rows = mesh.shape["fsdp"]
    arguments = [
        jax.ShapeDtypeStruct((rows, length, *rest), dtype, sharding=NamedSharding(mesh, spec))
        for rest, dtype in (
            ((8, groups, width), jnp.bfloat16),
            ((8, width), jnp.bfloat16),
            ((8, width), jnp.bfloat16),
            ((), jnp.int32),
        )
    ]
    program = jax.jit(step).lower(*arguments).compile()
    return compile.attention_kernels(program.as_text()), program.memory_analysis()


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", COMPILERS)
def test_the_flash_kernels_run_forward_and_backward(name, width):
    kernels, memory = compiled(name, 2048, width)
    assert kernels.forward and kernels.backward
    # of the weights of all heads at once: 32 x 2,048 x 2,048 numbers
    assert memory.temp_size_in_bytes < 32 * 2048**2


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("v5e-8", dict(window=1024, softcap=50.0)),
        ("v5e-8", dict(packed=False, groups=1)),
        ("h100-8", dict(packed=False, window=1024)),
    ],
)
def test_windows_soft_caps_and_single_heads_have_kernels_too(name, settings):
    kernels, _ = compiled(name, 2048, 128, **settings)
    assert kernels.forward and kernels.backward


@pytest.mark.parametrize("name", ["v5p-8", "h100-8"])
def test_memory_is_linear_in_the_row(name):
    """Four times the tokens: at most six times the temporaries, where weights would take 16."""
    short, long = (
        compiled(name, length, 128, packed=False)[1].temp_size_in_bytes for length in (16384, 65536)
    )
    assert long < 6 * max(short, 2**28)


def test_a_row_of_131072_is_split_over_the_context():
    kernels, memory = compiled("v5p-8", 131072, 128, context=8)
    assert kernels.forward and kernels.backward
    assert memory.temp_size_in_bytes < 2 * GIB
