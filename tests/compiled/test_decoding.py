"""The decode loop as the compilers of TPUs and GPUs make it: small, in place, and quiet."""

import math
import re

import pytest

from gptjax.config import build
from gptjax.generation import engine, meshes, requests
from gptjax.generation.loop import InferenceModel
from gptjax.generation.options import GenerationOptions
from gptjax.generation.weights import inference_config, weight_shapes
from gptjax.planning import described, targets

pytestmark = pytest.mark.compiled

SMALL = dict(layers=2, width=512, heads=8, kv_heads=4, context=1024, vocab_size=32_000)


@pytest.mark.parametrize(
    ("target", "mesh", "weights"),
    [
        ("v5e-8", {}, "int8"),
        ("v5e-8", dict(data=2, tensor=4), "bfloat16"),
        ("h100-8", dict(data=2, tensor=4), "bfloat16"),
    ],
)
def test_a_step_of_decoding(target, mesh, weights):
    pytest.importorskip("libtpu" if target.startswith("v5e") else "jax_cuda12_plugin")
    parsed = targets.parse(target)
    described.prepare(parsed)
    count = mesh.get("data", 1) * mesh.get("tensor", 1)
    devices = meshes.make(mesh, described.devices(parsed)[:count])
    config = build.build_config(dict(model=SMALL, data=dict(tokenizer="bytes"))).model
    model = InferenceModel(
        inference_config(config, weights, devices),
        weight_shapes(config, weights, devices),
        "",
        devices,
    )
    request = requests.build_request(
        [[1] * 10] * 8,
        GenerationOptions(max_new_tokens=200, temperature=1.0),
        tokenizer=None,
        context=config.context,
        eos_ids=[0],
        banned=[],
    )
    advance, _ = engine.first_calls(model, request)
    lowered = advance.lowered()
    barriers = lowered.as_text().count("optimization_barrier")
    assert weights == "int8" or not barriers  # a loop would keep converted weights
    program = lowered.compile()
    memory = program.memory_analysis()
    cache = 2 * 8 * config.kv * 256 * config.head_width * 2 * config.layers // count
    assert memory.alias_size_in_bytes >= cache  # updated in place
    assert memory.temp_size_in_bytes < 0.02 * 2**30
    gathers = re.findall(r"=(.*) all-gather(?:-start)?\(", program.as_text())
    assert len(gathers) == (1 if count > 1 else 0)
    for shapes in gathers:  # logits
        sizes = [math.prod(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", shapes)]
        assert max(sizes) == 8 // mesh["data"] * config.vocab_size
