"""What a device holds in a step of training, in bytes by part, from shapes alone.

A program's peak is that of the moment when it holds most. There are three candidates: the loss of a
micro-batch, the backward pass of a block, and the optimizer's update; `estimate` adds up what is
alive in each, and takes the largest. The figures are held against those of compilers by
`tests/planning/test_planned_memory.py` and the table in experiments/LOG.md.

The letters are those of `model.transformer`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from gptjax.config.model_config import ModelConfig
from gptjax.config.schema import Config
from gptjax.core import tree
from gptjax.core.types import Params, TrainState
from gptjax.ops import cross_entropy
from gptjax.ops.attention.backends import Call, choose
from gptjax.runtime import sharding
from gptjax.runtime.sharding import AXES


class Recomputed(NamedTuple):
    """What the backward pass of a block does again: collectives over `tensor` (each half of an
    all-reduce), gathers of keys and values, and the share of the forward pass's FLOPs."""

    tensor: int
    context: int
    flops: float


FORWARD = 1 / 3  # of the FLOPs of a step

# {model.remat: ...}, from the cheapest to that which saves most memory.
RECOMPUTED: dict[str, Recomputed] = {
    "none": Recomputed(0, 0, 0.0),
    "dots": Recomputed(3, 1, 0.05),
    "attention": Recomputed(3, 1, 0.95),
    "full": Recomputed(3, 1, 1.0),
    "offload": Recomputed(3, 1, 1.0),
}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of the state: its elements, the bytes of one, and the mesh axes that split it."""

    path: str
    size: int
    item: int
    axes: tuple[str, ...]

    def local_size(self, sizes: Mapping[str, int]) -> int:
        """Elements on a device of a mesh of {axis: devices}."""
        return self.size // math.prod(sizes[axis] for axis in self.axes)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """All arrays that last from step to step."""

    params: tuple[Leaf, ...]  # those that are trained, float32
    optimizer: tuple[Leaf, ...]
    frozen: tuple[Leaf, ...]  # under adapters

    @classmethod
    def of(cls, state: TrainState, frozen: Params) -> Shapes:
        """Of trees of shapes (`jax.ShapeDtypeStruct`)."""
        mesh = jax.sharding.AbstractMesh((1,) * len(AXES), AXES)
        split = sharding.shardings(mesh, state)
        return cls(
            _leaves(state.params, split.params),
            _leaves(state.opt_state, split.opt_state),
            _leaves(frozen, sharding.shardings(mesh, frozen)),
        )


def _leaves(arrays: Any, split: Any) -> tuple[Leaf, ...]:
    shardings = jax.tree.leaves(split)
    return tuple(
        Leaf(path, leaf.size, leaf.dtype.itemsize, _axes(sharding.spec))
        for (path, leaf), sharding in zip(tree.flatten(arrays).items(), shardings, strict=True)
    )


def _axes(spec: jax.sharding.PartitionSpec) -> tuple[str, ...]:
    axes: list[str] = []
    for part in spec:
        axes += part if isinstance(part, tuple) else [part] if part else []
    return tuple(axes)


def local_bytes(leaves: tuple[Leaf, ...], sizes: Mapping[str, int]) -> float:
    """Bytes of these arrays on one device."""
    return sum(leaf.item * leaf.local_size(sizes) for leaf in leaves)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device computes at a time."""

    model: ModelConfig
    sizes: Mapping[str, int]  # devices along each axis of the mesh
    rows: int  # of a micro-batch
    length: int  # T of the complete row
    micro_batches: int
    remat: str
    platform: str  # cpu, gpu, tpu
    loss_chunk: int  # positions whose logits exist at once

    @classmethod
    def of(
        cls, config: Config, sizes: Mapping[str, int], micro_batches: int, remat: str, platform: str
    ) -> Work:
        """The share of a device of such a mesh in the batch of a config."""
        rows = config.train.batch_size // micro_batches // (sizes["data"] * sizes["fsdp"])
        chunk = loss_chunk(config, sizes, max(rows, 1), platform)
        return cls(
            config.model,
            sizes,
            max(rows, 1),
            config.length,
            micro_batches,
            remat,
            platform,
            chunk,
        )

    @property
    def item(self) -> int:
        """Bytes of a value in the compute dtype."""
        return 4 if self.model.dtype == "float32" else 2

    @property
    def lanes(self) -> float:
        """How many times larger a TPU makes arrays whose last axis is a head: tiles of 128."""
        width = self.model.head_width
        return math.ceil(width / 128) * 128 / width if self.platform == "tpu" else 1.0

    @property
    def positions(self) -> int:
        """N: of a device in a micro-batch."""
        return self.rows * self.length // self.sizes["context"]

    @property
    def heads(self) -> float:
        """Values of the queries of a position."""
        return self.model.heads * self.model.head_width / self.sizes["tensor"]

    @property
    def keys_and_values(self) -> float:
        """Values of the keys and values of a position."""
        return 2 * self.model.kv * self.model.head_width / self.sizes["tensor"]

    @property
    def stream(self) -> float:
        """Bytes of the residual stream, as it is between blocks."""
        return self.positions * self.model.width * self.item / self.sizes["tensor"]

    @property
    def matrices(self) -> int:
        """Parameters in the matrices of one layer, of one part of `tensor`."""
        m = self.model
        attention = (2 * m.heads + 2 * m.kv) * m.head_width * m.width
        return (attention + (3 if m.gated else 2) * m.mlp_width * m.width) // self.sizes["tensor"]

    @property
    def table(self) -> int:
        """Parameters of an embedding table, of one part of `tensor`."""
        return self.model.padded_vocab * self.model.width // self.sizes["tensor"]


def loss_chunk(config: Config, sizes: Mapping[str, int], rows: int, platform: str) -> int:
    """Positions whose logits a device holds at once: a divisor of those that it has."""
    length = config.length // sizes["context"]
    if config.train.loss_chunk:
        return math.gcd(config.train.loss_chunk, length)
    vocab = config.model.padded_vocab // sizes["tensor"]
    return cross_entropy.chunk_length(vocab, rows, length, platform)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device at the moment when a step holds most."""

    parameters: float  # float32, with those under adapters
    optimizer: float
    gradients: float  # accumulated ones, and those of the micro-batch at work
    activations: float  # kept for the backward pass, and those of the block at work
    loss: float  # logits, the gathered table and its gradient
    weights: float  # copies in the compute dtype and gathered layers

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def estimate(shapes: Shapes, work: Work) -> Memory:
    """The memory of a step of training on each device."""
    sizes = work.sizes
    trained = sum(leaf.local_size(sizes) for leaf in shapes.params)
    blocks = sum(leaf.local_size(sizes) for leaf in shapes.params if "blocks/" in leaf.path)
    copies = work.item * trained if work.item < 4 else 0.0
    accumulated = 4.0 * trained if work.micro_batches > 1 else 0.0
    kept = work.model.layers * saved(work)
    in_loss = Memory(0, 0, accumulated, kept, _of_loss(work), copies)
    in_block = Memory(
        parameters=0,
        optimizer=0,
        gradients=accumulated + work.item * blocks,
        activations=kept + _working(work),
        loss=_pending(work),
        weights=copies + _gathered(work),
    )
    in_update = Memory(0, 0, 4.0 * trained, 0, 0, 0)
    most = max((in_loss, in_block, in_update), key=lambda memory: memory.total)
    return dataclasses.replace(
        most,
        parameters=local_bytes(shapes.params + shapes.frozen, sizes),
        optimizer=local_bytes(shapes.optimizer, sizes),
    )


def _gathered(work: Work) -> float:
    """Bytes of weights that are whole for a while, and of their gradients before they are split.

    A TPU's program gathers the next ones early; a GPU's, as compiled, when they are used.
    """
    layer = work.item * work.matrices if work.sizes["fsdp"] > 1 else 0.0
    return layer * (1.5 if work.platform == "gpu" else 3)


def _pending(work: Work) -> float:
    """Bytes of the output table's gradient, while it waits to be summed behind the blocks."""
    m, parts = work.model, work.sizes["tensor"]
    gradient = work.item * work.table
    over_vocabulary = cross_entropy.goes_over_vocabulary(m.padded_vocab // parts, m.width)
    if work.platform == "tpu":  # and, over two axes, once more in the layout of the sum
        return gradient * (2 if parts > 1 else 1)
    return 0.0 if over_vocabulary and work.sizes["fsdp"] > 1 else gradient


def saved(work: Work) -> float:
    """Bytes that one block keeps from the forward to the backward pass.

    They are those that `jax.vjp` of a block keeps, which tests/planning/test_planned_memory.py asks
    it for.
    """
    m, e, n, parts = work.model, work.item, work.positions, work.sizes["tensor"]
    heads, hidden, stream = work.heads, m.mlp_width / parts, m.width / parts
    attention = _of_attention(work)
    if work.remat == "offload":  # on the host
        return 0.0
    if work.remat == "full":
        return n * e * stream
    if work.remat == "attention":
        return n * e * (stream + heads) + attention.sums
    if work.remat == "dots":
        projected = heads + work.keys_and_values
        return n * e * (stream + projected + m.width + hidden * (2 if m.gated else 1))
    # Under fsdp, what is not to be gathered once more is chosen one operation at a time, and
    # values are kept before they are rounded to the compute dtype (XLA for TPUs rounds them first).
    rounds_late = work.sizes["fsdp"] > 1 and work.platform != "tpu"
    rounded = 4 if rounds_late else e
    norms = 2 * stream * (4 + rounded) + (2 * m.width * e if parts > 1 else 0.0)
    rope = 4 * m.rotary_width * (1 if rounds_late else 2) if m.positions == "rope" else 0.0
    mlp = 6 * hidden * e if m.gated else hidden * (e + rounded)
    gathered = work.keys_and_values * work.sizes["context"]
    kernels = work.lanes * (2 * heads + gathered)  # what attention takes and gives
    per_position = norms + rope + e * (kernels + heads) + mlp
    return n * per_position + attention.weights + attention.sums


def _working(work: Work) -> float:
    """Bytes alive in the backward pass of one block, in addition to what is kept of all.

    Values of the MLP are those that enter and leave its activation, and their gradients.
    """
    m, each = work.model, work.positions * work.item
    values = 6 if m.gated else 4
    if work.remat == "dots":  # what enters the activation is kept
        values -= 2 if m.gated else 1
        if m.gated and work.platform == "tpu":  # and copied from layout to layout: as compiled
            values += 10
    mlp = each * values * m.mlp_width / work.sizes["tensor"]
    attention, again = _of_attention(work), 0.0
    context = work.sizes["context"]
    copies = 2 * context if context > 1 else 1  # of keys and values: gathered, then heads first
    taken = each * work.lanes * (work.heads + work.keys_and_values * copies)
    if work.remat in ("full", "offload"):
        again = taken + 2 * each * work.heads + attention.weights + attention.sums
    elif work.remat == "attention":
        again = taken + each * work.heads
    if work.remat != "none" and work.sizes["tensor"] > 1:
        # whole sequences: what enters the two branches; on a TPU, which schedules both together,
        # their gradients, sums and layouts too (as compiled)
        again += (10 if work.platform == "tpu" else 2) * each * m.width
    if work.platform == "tpu":  # schedules the two branches together
        # the gradients of queries, keys and values are put side by side, in tiles of 4 and 128
        together = 2 * 4 / 3 * each * work.lanes * (work.heads + work.keys_and_values)
        return 4 * work.stream + mlp + again + attention.working + together
    return 4 * work.stream + max(mlp + again, attention.working)


class _Attention(NamedTuple):
    """Bytes of one block's attention: the weights and the sums of the softmax that are kept, and
    what is alive while its gradients are computed."""

    weights: float
    sums: float
    working: float


def _of_attention(work: Work) -> _Attention:
    m, context = work.model, work.sizes["context"]
    heads = m.heads // work.sizes["tensor"]
    queries = work.length // context
    call = Call(
        dtype=m.dtype,
        rows=work.rows,
        queries=queries,
        keys=work.length,
        head_width=m.head_width,
        packed=True,
        dropout=bool(m.dropout),
        softcap=m.attention_softcap,
    )
    backend = choose(work.platform, call) if m.attention == "auto" else m.attention
    scores = 4.0 * work.rows * heads * queries * work.length
    sums = 4.0 * work.rows * heads * queries
    each = work.lanes * work.positions * work.item
    answers, gathered = each * work.heads, each * work.keys_and_values * (context - 1)
    if backend == "reference":
        return _Attention(scores, 0.0, 2 * scores)
    if backend == "xla":  # up to four strips of queries against the keys before them
        strips = max(1, min(4, queries // 128)) if context == 1 else 1
        return _Attention(scores * (1 + 1 / strips) / 2, sums, 2 * scores / strips)
    if backend == "splash":  # writes sums once for each of 128 lanes
        return _Attention(0.0, sums, 3 * 128 * sums + 4 * answers + 2 * gathered)
    mask = 2.0 * work.rows * queries * work.length if backend == "cudnn" else 0.0
    return _Attention(0.0, sums, mask + 4 * answers + 2 * gathered)


def _of_loss(work: Work) -> float:
    """Bytes alive while the loss is computed, with both its gradients."""
    m, e, parts = work.model, work.item, work.sizes["tensor"]
    vocab, split = m.padded_vocab // parts, work.sizes["fsdp"] > 1
    whole = work.positions * m.width
    gathered = e * work.table if split else 0.0
    if split and cross_entropy.goes_over_vocabulary(vocab, m.width):
        logits = work.positions * cross_entropy.block_length(vocab, work.positions)
        return gathered + logits * (4 + 4 + e) + whole * (4 + 2 * e)
    logits = work.rows * work.loss_chunk * vocab
    return gathered + 4 * work.table + logits * (4 + 4 + e) + 3 * e * whole
