"""What a run leaves on "auto": rematerialization, the scan over layers, micro-batches.

They are chosen so that a step fits the memory of its devices: first what costs no time, then more
micro-batches, then more of the forward pass computed again (`training.memory` says what each
holds). Where nothing fits, what holds least is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from gptjax.config.schema import Config
from gptjax.training.memory import RECOMPUTED, Shapes, Work, estimate

# Fewer positions than this at once leave matrix units idle, and the traffic of a micro-batch is not
# hidden behind its arithmetic: rather compute more again than cut micro-batches smaller.
_POSITIONS = 4096

# What is chosen may take this share of the memory: the estimate is right to ten per cent or so.
ROOM = 0.88

# Layers from which on they run in a loop: it compiles in the same time at every depth, and holds
# the gathered weights of one layer. On a CPU unrolled layers run faster. "": any other platform.
_SCANNED = {"cpu": 64, "": 4}


REMATS = tuple(name for name in RECOMPUTED if name != "offload")  # which not every platform has


class Choice(NamedTuple):
    """What `model` and `train` have, without "auto"."""

    remat: str
    scan_layers: bool
    micro_batches: int


def choose(
    config: Config, shapes: Shapes, sizes: Mapping[str, int], platform: str, usable: float | None
) -> Choice:
    """usable: bytes of one device; None where that is not known, and then all is taken to fit."""
    model = config.model
    scan = model.scan_layers
    if scan == "auto":
        scan = model.layers >= _SCANNED.get(platform, _SCANNED[""])

    def holds(remat: str, count: int) -> float:
        return estimate(shapes, Work.of(config, sizes, count, remat, platform)).total

    least: tuple[float, str, int] | None = None
    for remat, count in _candidates(config, sizes):
        held = holds(remat, count) if usable is not None else 0.0
        if usable is None or held <= ROOM * usable:
            return Choice(remat, bool(scan), count)
        if least is None or held < least[0]:
            least = (held, remat, count)
    assert least is not None
    return Choice(least[1], bool(scan), least[2])


def _candidates(config: Config, sizes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """(remat, micro-batches), the cheapest first. What the config states is the only choice."""
    stated = config.model.remat
    remats = REMATS if stated == "auto" else (stated,)
    counts = micro_batch_counts(config, sizes)
    positions = config.train.batch_size * config.length
    positions //= sizes["data"] * sizes["fsdp"] * sizes["context"]
    large = [n for n in counts if n == 1 or positions // n >= _POSITIONS]
    for some in (large, counts[len(large) :]):
        for remat in remats:
            for count in some:
                yield remat, count


def micro_batch_counts(config: Config, sizes: Mapping[str, int]) -> list[int]:
    """Numbers of micro-batches that leave whole rows to every device; the stated one alone."""
    if config.train.grad_accum_steps:
        return [config.train.grad_accum_steps]
    rows = config.train.batch_size // (sizes["data"] * sizes["fsdp"])
    if config.task.loss == "kto":  # its loss is of all pairs of a step together
        return [1]
    return [n for n in range(1, rows + 1) if rows % n == 0] or [1]
