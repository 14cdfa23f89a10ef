"""What to change so that a run fits its devices, or takes less time.

All legal meshes, micro-batches and ways to rematerialize are tried on the estimates of memory
(`training.memory`) and of time; the flags that come out are those of every command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from gptjax.config.schema import Config
from gptjax.planning import communication, targets
from gptjax.planning.forecast import Forecast
from gptjax.planning.targets import Target
from gptjax.runtime.mesh import mesh_faults
from gptjax.runtime.sharding import AXES
from gptjax.training import auto
from gptjax.training.auto import Choice
from gptjax.training.memory import FORWARD, RECOMPUTED, Shapes, Work, estimate


@dataclasses.dataclass(frozen=True)
class Option:
    """A way to run a config: what a device holds, and about how long a step takes.

    flags: the overrides that lead here from the config; () for what it does as it is.
    """

    flags: tuple[str, ...]
    held: float  # bytes
    seconds: float
    axes: int  # of the mesh that have several devices


@dataclasses.dataclass(frozen=True)
class Advice:
    """best: the fastest way that fits, None where there is none. fitting: flags of up to three
    different ways to make a run fit that does not, the fewest flags first. larger: where nothing
    fits here, the flags that name the smallest target of more such devices, and a way that does.
    largest_rows: rows on a device at once that still fit, with the mesh and remat of the plan.
    """

    best: Option | None
    fitting: list[tuple[str, ...]]
    larger: tuple[str, ...]
    largest_rows: int


def advise(plan: Forecast, shapes: Shapes) -> Advice:
    """For a run as planned."""
    options = _options(plan, plan.target, shapes)
    good = sorted(
        (option for option in options if option.held <= auto.ROOM * plan.usable), key=_rank
    )
    return Advice(
        best=good[0] if good else None,
        fitting=[] if plan.fits else _shortest(good),
        larger=() if good else _larger(plan, shapes),
        largest_rows=_largest_rows(plan, shapes),
    )


def legal_meshes(config: Config, count: int) -> list[dict[str, int]]:
    """Every way to give `count` devices to the four axes that the model and the batch allow."""
    one = dataclasses.replace(config.train, grad_accum_steps=1)
    unsplit = dataclasses.replace(config, train=one)
    return [sizes for sizes in _factorizations(count) if not mesh_faults(unsplit, sizes)]


def legal_example(config: Config, count: int) -> str:
    """A line with the legal mesh of the fewest axes, of those the one with most fsdp; or without
    one."""
    meshes = legal_meshes(config, count)
    if not meshes:
        return f"no mesh of {count} devices is legal for this model and train.batch_size"

    def axes_then_fsdp(sizes: dict[str, int]) -> tuple[int, int]:
        return sum(n > 1 for n in sizes.values()), -sizes["fsdp"]

    sizes = min(meshes, key=axes_then_fsdp)
    flags = " ".join(f"--config.mesh.{axis}={n}" for axis, n in sizes.items())
    return f"legal on {count} devices, for one: {flags}"


def _factorizations(count: int) -> Iterator[dict[str, int]]:
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    for data in divisors:
        for fsdp in divisors:
            for tensor in divisors:
                rest = data * fsdp * tensor
                if rest <= count and count % rest == 0:
                    yield dict(zip(AXES, (data, fsdp, tensor, count // rest), strict=True))


def _options(plan: Forecast, target: Target, shapes: Shapes) -> Iterator[Option]:
    """All of them, whether they fit or not."""
    free = _with_free_batches(plan.config)
    for sizes in legal_meshes(plan.config, target.count):
        for count in auto.micro_batch_counts(free, sizes):
            for remat in auto.REMATS:
                yield _option(plan, target, shapes, sizes, Choice(remat, True, count))


def _option(
    plan: Forecast, target: Target, shapes: Shapes, sizes: Mapping[str, int], choice: Choice
) -> Option:
    platform = target.device.platform
    work = Work.of(plan.config, sizes, choice.micro_batches, choice.remat, platform)
    arithmetic = plan.cost.arithmetic * plan.target.count / target.count
    arithmetic *= _repeated(choice) / _repeated(plan.choice)
    links = communication.seconds(communication.transfers(shapes, work), target, sizes) or 0.0
    # Most traffic is hidden behind arithmetic; a little of each never is, which decides ties.
    seconds = max(arithmetic, links) + 0.05 * min(arithmetic, links)
    axes = sum(count > 1 for count in sizes.values())
    return Option(_flags(plan, sizes, choice), estimate(shapes, work).total, seconds, axes)


def _repeated(choice: Choice) -> float:
    """FLOPs that are computed, for each FLOP of the model."""
    return 1 + RECOMPUTED[choice.remat].flops * FORWARD


def _flags(plan: Forecast, sizes: Mapping[str, int], choice: Choice) -> tuple[str, ...]:
    """Nothing for what the plan does by itself; an axis that is -1 takes what is left."""
    stated = plan.config
    values: dict[str, int | str] = {}
    for axis in AXES:
        if getattr(stated.mesh, axis) not in (-1, sizes[axis]):
            values[f"mesh.{axis}"] = sizes[axis]
    planned = plan.choice
    if (plan.sizes, planned.remat, planned.micro_batches) == (
        sizes,
        choice.remat,
        choice.micro_batches,
    ):
        return ()
    if stated.train.grad_accum_steps != choice.micro_batches:
        values["train.grad_accum_steps"] = choice.micro_batches
    if stated.model.remat != choice.remat:
        values["model.remat"] = choice.remat
    return tuple(f"--config.{name}={value}" for name, value in values.items())


def _with_free_batches(config: Config) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accum_steps=0))


def _rank(option: Option) -> tuple[float, int]:
    """Time, where another axis or a change must be worth a few per cent; then the fewest flags.

    More collectives of smaller arrays take longer than their bytes say.
    """
    worth = 1 + 0.01 * option.axes + (0.02 if option.flags else 0.0)
    return option.seconds * worth, len(option.flags)


def _shortest(fitting: Sequence[Option]) -> list[tuple[str, ...]]:
    """Three ways, the fewest flags first, then the fastest; those that change other settings
    before those that change the same ones otherwise."""
    ways: dict[frozenset[str], tuple[str, ...]] = {}
    others: list[tuple[str, ...]] = []
    for option in sorted(fitting, key=lambda option: (len(option.flags), _rank(option))):
        names = frozenset(flag.partition("=")[0] for flag in option.flags)
        if any(other <= names for other in ways):
            others.append(option.flags)
        else:
            ways[names] = option.flags
    return [*ways.values(), *others][:3]


def _larger(plan: Forecast, shapes: Shapes) -> tuple[str, ...]:
    for name in targets.larger(plan.target):
        target = targets.parse(name)
        room = auto.ROOM * target.device.usable_of(target.count)
        good = [o for o in _options(plan, target, shapes) if o.held <= room]
        if good:
            return (f"--target={name}", *min(good, key=_rank).flags)
    return ()


def _largest_rows(plan: Forecast, shapes: Shapes) -> int:
    """0 where not even one row fits."""
    platform, remat = plan.target.device.platform, plan.choice.remat
    for count in auto.micro_batch_counts(_with_free_batches(plan.config), plan.sizes):
        work = Work.of(plan.config, plan.sizes, count, remat, platform)
        if estimate(shapes, work).total <= auto.ROOM * plan.usable:
            return work.rows
    return 0
