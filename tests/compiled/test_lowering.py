"""Steps of many described devices, traced and lowered; nothing is compiled."""

import time

import pytest
from programs import LLAMA_70B, Step

from gptjax.planning import described, targets
from gptjax.planning.forecast import config_without_data
from gptjax.runtime.mesh import make_mesh
from gptjax.training import step
from gptjax.training.setup import make_plan

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("mesh", [dict(fsdp=256), dict(data=2, fsdp=16, tensor=4, context=2)])
def test_a_step_of_256_chips_is_lowered_in_seconds(mesh):
    pytest.importorskip("libtpu")
    target = targets.parse("v5p-256")
    described.prepare(target)
    sizes = {f"mesh.{axis}": n for axis, n in ({"data": 1} | mesh).items()}
    settings = Step("v5p-256", model=LLAMA_70B, overrides={"train.batch_size": 256} | sizes)
    config = config_without_data(settings.settings())
    begin = time.perf_counter()
    lowered = step.lower(make_plan(config, make_mesh(config, described.devices(target))))
    assert time.perf_counter() - begin < 20
    assert lowered.as_text().count("num_partitions = 256")
