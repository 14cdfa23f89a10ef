"""The numbers that follow from a config, and the command that prints them."""

import json

from conftest import TINY, command, make_config

from gptjax.core import tree
from gptjax.planning.explain import derived_numbers
from gptjax.runtime.mesh import make_mesh
from gptjax.training.setup import make_plan


def test_numbers_that_follow_from_a_config(one_device):
    config = make_config(train=dict(grad_accum_steps=2))
    plan = make_plan(config, make_mesh(config, one_device))
    numbers = {number.name: number for number in derived_numbers(plan, tokens=512)}
    assert numbers["vocabulary"].value == 257
    assert numbers["embedding rows"].value == 384
    assert numbers["tokens per step"].value == 8 * 16
    assert numbers["epochs"].value == 8 * 8 * 16 / 512
    assert numbers["micro-batch"].value == 4
    assert numbers["training state"].value == tree.nbytes(plan.state_shapes)
    assert numbers["decay begins at step"].value == 2


def test_the_command_prints_the_numbers(corpus):
    flags = (*TINY, f"--config.data.path={corpus}", "--config.mesh.data=64")  # not to be had here
    lines = command("gptjax.plan", *flags).stdout.splitlines()
    assert lines[0].split()[:2] == ["vocabulary", "257"]
    numbers = json.loads(command("gptjax.plan", *flags, "--json").stdout)
    assert len(numbers) == len(lines)
    assert {"name", "value", "text", "reason"} == set(numbers[0])


def test_the_flag_that_printed_them_leads_to_the_command():
    done = command("gptjax.train", *TINY, "--explain", check=False)
    assert done.returncode == 2
    assert "no flag '--explain'" in done.stderr
    assert "python -m gptjax.plan --config" in done.stderr
