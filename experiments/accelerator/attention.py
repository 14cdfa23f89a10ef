"""The part `attention`: every backend of the table against the reference, values and gradients.

What is compared with is the reference in float32, of inputs that are already rounded to the dtype
of the backend. A row of the table that refuses a case (ValueError, NotImplementedError) says so
and is not at fault; to be faster and wrong is.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
from typing import Any

import shapes
from part import Save, Settings, what_went_wrong

# Largest ||x - reference|| / ||reference|| of the output and of each gradient. In bfloat16 a number
# has 8 bits, and both the weights and the output are rounded to it.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}

THREADS = 4
TOY_CASES = ("causal", "packed window", "soft cap")
# T is short of a multiple of any block in the odd case. A soft cap is Gemma 2's.
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "packed": dict(packed=True),
    "window": dict(window=17),
    "packed window": dict(packed=True, window=17),
    "odd length": dict(packed=True, shorter=7),
    "one head each": dict(packed=True, g=1),
    "soft cap": dict(softcap=5.0),
}


def measure(settings: Settings, save: Save) -> None:
    import jax

    from gptjax.ops.attention.backends import backends_for

    size = shapes.TOY_ATTENTION if settings.rehearse else shapes.ATTENTION
    platform = jax.devices()[0].platform

    def check(case: str, dtype: str) -> list[dict[str, Any]]:
        inputs = make_inputs(dtype, **(size | CASES[case]))
        expected = values_and_gradients("reference", "float32", platform, inputs)
        return [
            {"backend": name, "dtype": dtype, "case": case}
            | compare(name, dtype, platform, inputs, expected)
            for name in backends_for(platform)
        ]

    rows: list[dict[str, Any]] = []
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:  # nearly all of it is compiling
        cases = TOY_CASES if settings.rehearse else tuple(CASES)
        for more in pool.map(check, *zip(*itertools.product(cases, TOLERANCES), strict=True)):
            rows += more
            save({"tolerances": TOLERANCES, "rows": rows})


def compare(name: str, dtype: str, platform: str, inputs: Any, expected: Any) -> dict[str, Any]:
    """{"error", "fault"}, or {"refused"} with what the backend says, or {"fault"}."""
    import numpy as np

    try:
        found = values_and_gradients(name, dtype, platform, inputs)
    except (ValueError, NotImplementedError) as error:
        return {"refused": what_went_wrong(error)}
    except Exception as error:
        return {"fault": what_went_wrong(error)}
    errors = [
        float(np.linalg.norm(x - right) / np.linalg.norm(right))
        for x, right in zip(found, expected, strict=True)
    ]
    worst = float("inf") if np.isnan(errors).any() else max(errors)
    return {"error": worst, "fault": "" if worst <= TOLERANCES[dtype] else "wrong"}


def make_inputs(
    dtype: str,
    *,
    b: int,
    t: int,
    k: int,
    g: int,
    c: int,
    window: int = 0,
    packed: bool = False,
    shorter: int = 0,
    softcap: float = 0.0,
) -> dict[str, Any]:
    """Arrays of q, k, v and of the gradient that comes back (float32, rounded to the dtype), and
    the keyword arguments of a backend."""
    import jax.numpy as jnp
    import numpy as np

    from gptjax.ops.attention.mask import Mask

    t, random = t - shorter, np.random.default_rng(1)
    shapes_of = [(b, t, k, g, c), (b, t, k, c), (b, t, k, c), (b, t, k, g, c)]
    arrays = [
        jnp.asarray(random.standard_normal(shape), dtype).astype(jnp.float32) for shape in shapes_of
    ]
    segments = None
    if packed:
        segments = jnp.asarray(1 + np.sort(random.integers(0, 4, (b, t)), axis=1), jnp.int32)
    mask = Mask(jnp.arange(t, dtype=jnp.int32)[None], segments, segments, window)
    return {"arrays": arrays, "mask": mask, "softcap": softcap}


def values_and_gradients(name: str, dtype: str, platform: str, inputs: Any) -> list[Any]:
    """float32 host arrays of the output and of the gradients of q, k and v."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gptjax.ops.attention.backends import backends_for

    attend = functools.partial(
        backends_for(platform)[name],
        mask=inputs["mask"],
        block=min(128, inputs["mask"].q_index.shape[1]),
        softcap=inputs["softcap"],
    )

    @jax.jit
    def run(q: Any, k: Any, v: Any, back: Any) -> Any:
        value, pull = jax.vjp(lambda q, k, v: attend(q, k, v), q, k, v)
        return value, *pull(back.astype(value.dtype))

    with jax.default_matmul_precision("highest"):  # no TF32 in what should be float32
        found = run(*(array.astype(jnp.dtype(dtype)) for array in inputs["arrays"]))
        return [np.asarray(x, np.float32) for x in found]
