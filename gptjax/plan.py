"""Says what a run would need, before it: sizes, memory, traffic, time, money.

    python -m gptjax.plan --config=configs/quickstart.py [--config.train.steps=500 ...] [--json]
    python -m gptjax.plan --config=configs/llama_1b.py --target=v5e-16 [--mfu=0.4] [--price=1.2]
    python -m gptjax.plan --config=configs/llama_1b.py --target=v5e-16 --compile

Without --target, prints each number that follows from the config and its data, with the reason;
data that is not prepared yet is prepared, as `gptjax.train` would. With a target, devices that need
not be here, it says from shapes alone what a step holds and sends on each of them, how long the run
takes and what it costs, and what to change where it does not fit; no data is read. With --compile
the target's own compiler says too what it makes of the step. Trains nothing.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import jax

from gptjax.config.errors import UserError
from gptjax.config.schema import MeshConfig
from gptjax.core import cli
from gptjax.data import shards
from gptjax.data.sources import TRAIN
from gptjax.planning import communication, compile, described, summary
from gptjax.planning.advice import advise, legal_example
from gptjax.planning.cost import read_mfu
from gptjax.planning.explain import derived_numbers, format_numbers
from gptjax.planning.forecast import config_without_data, forecast, rates_of, shapes_of
from gptjax.planning.targets import parse
from gptjax.runtime.mesh import make_mesh
from gptjax.training.setup import (
    load_data,
    make_plan,
    resolve_checkpoint,
    resolve_config,
    rows_of_epoch,
)

FLAGS = {
    "target": "devices to plan for: v5e-16, v5p-64, v6e-256, h100-8, h100-8x4, cpu, here ...",
    "mfu": "share of the peak that a run reaches, or a workdir that has measured it (0.4)",
    "compile": "ask the compiler of those devices too, which need not be here (extras tpu, cuda)",
    "price": "USD an hour and device (that of the table of devices)",
}


def main(argv: list[str]) -> None:
    args = cli.parse(argv, __doc__, FLAGS, required=("config",))
    if "target" in args:
        plan_for_target(args)
        return
    for name in FLAGS:
        if name in args:
            raise UserError(f"--{name} is about devices: name them, such as --target=v5e-16")
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


def plan_for_target(args: cli.Args) -> None:
    """Prints what the run would take on the devices that --target names."""
    target = parse(args["target"])
    if "compile" in args:
        described.prepare(target)
    config = config_without_data(args.settings)
    shapes = shapes_of(config)
    mfu = read_mfu(args["mfu"]) if "mfu" in args else None
    price = args.number("price", 0.0) if "price" in args else target.device.price
    if price is not None and price < 0:
        raise UserError(f"--price={price:g}: must be 0 or more, USD an hour and device")
    rates = rates_of(config, target, mfu, price)
    try:
        plan = forecast(config, shapes, target, rates)
    except UserError as error:
        raise UserError(f"{error}\n{legal_example(config, target.count)}") from None
    advice = advise(plan, shapes)
    least = communication.by_axes(plan.transfers)
    compiled = compile.compile_for(config, target) if "compile" in args else None
    if "json" in args:
        compiled_json = {"compiled": compile.as_json(compiled, least)} if compiled else {}
        print(json.dumps(summary.to_json(plan, advice) | compiled_json))
        return
    print(format_numbers(summary.rows(plan)))
    print("\n".join(["", *summary.advice_lines(plan, advice)]))
    if compiled:
        print("\n" + compile.format_report(compiled, least))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
