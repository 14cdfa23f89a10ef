"""Says what a run would need, before it: sizes, tokens, epochs, FLOPs, memory of the state.

    python -m gptjax.plan --config=configs/quickstart.py [--config.train.steps=500 ...] [--json]

Prints each number that follows from the config and its data, with the reason. Trains nothing; data
that is not prepared yet is prepared, as `gptjax.train` would.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import jax

from gptjax.config.schema import MeshConfig
from gptjax.core import cli
from gptjax.data import shards
from gptjax.data.sources import TRAIN
from gptjax.planning.explain import derived_numbers, format_numbers
from gptjax.runtime.mesh import make_mesh
from gptjax.training.setup import (
    load_data,
    make_plan,
    resolve_checkpoint,
    resolve_config,
    rows_of_epoch,
)


def main(argv: list[str]) -> None:
    args = cli.parse(argv, __doc__, {}, required=("config",))
    config, source = resolve_checkpoint(args.config)
    data = load_data(config, source)
    config = resolve_config(config, data)
    if isinstance(data, shards.Prepared):
        tokens = data.tokens(TRAIN)
    else:
        tokens = rows_of_epoch(config, data) * config.length
    # These numbers are those of every mesh, so the config's need not fit the devices here.
    one_device = make_mesh(dataclasses.replace(config, mesh=MeshConfig()), jax.devices()[:1])
    numbers = derived_numbers(make_plan(config, one_device), tokens)
    if "json" in args:
        print(json.dumps([dataclasses.asdict(number) for number in numbers]))
    else:
        print(format_numbers(numbers))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
