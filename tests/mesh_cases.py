"""Runs of every kind at toy size, and one step of each on any mesh: the loss and its gradients.

Shapes are such that every product of the four axes over 8 devices is legal: 8 key and value heads,
rows of 16 positions, and a vocabulary whose padding fills the last device's share.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import FAMILIES, make_config, random_params

from gptjax.core import tree
from gptjax.core.types import Batch, TrainState
from gptjax.runtime import sharding
from gptjax.runtime.mesh import make_mesh
from gptjax.tasks.preference import SEGMENTS
from gptjax.training import step as train_step
from gptjax.training.setup import make_plan

LENGTH = 16
ADAPTED = dict(init_from="base")
TASK = dict(source="jsonl", path="x")


def family(name, **model):
    """The settings of a family whose heads any mesh of 8 devices divides; grouped where it is."""
    settings = FAMILIES[name]
    heads = 16 if "kv_heads" in settings else 8
    return settings | dict(heads=heads, kv_heads=8, head_dim=4, mlp_dim=48) | model


def case(name="gpt2", *, model=None, **sections):
    return dict(model=family(name, **(model or {})), **sections)


# Together they have every family, objective, kind of adapter, attention backend and remat policy.
# Cases that scan have two layers, the others one: layers that are unrolled only take time.
CASES = {
    "gpt2": case(train=dict(grad_accum_steps=2)),
    "gpt2 untied": case("gpt2_untied", model=dict(scale_scores_by_layer=True, layers=2)),
    "gpt_neox": case("gpt_neox", model=dict(scan_layers=True, dropout=0.3)),
    "llama": case(
        "llama",
        model=dict(scan_layers=True, remat="full"),
        train=dict(grad_accum_steps=4, batch_size=32),
    ),
    "llama3": case("llama3", model=dict(remat="dots"), train=dict(loss_chunk=4)),
    "yarn": case("yarn", model=dict(attention="reference")),
    "mistral": case("mistral", model=dict(implementation="reference")),
    "qwen2": case("qwen2", model=dict(scan_layers=True, remat="dots")),
    "qwen3": case("qwen3", model=dict(attention="blockwise", attention_block=3)),
    "phi3": case("phi3", train=dict(grad_accum_steps=2)),
    "gemma2": case("gemma2", model=dict(scan_layers=True, remat="full")),
    "dropout": case(model=dict(dropout=0.3), train=dict(grad_accum_steps=2)),
    "frozen": case("llama", optim=dict(freeze=("embed/.*", ".*norm.*", "blocks/attn/.*"))),
    "lora": case("llama", lora=dict(rank=2, dropout=0.3), train=ADAPTED | dict(grad_accum_steps=2)),
    "dora": case(
        "gemma2", model=dict(scan_layers=True), lora=dict(rank=2, dora=True), train=ADAPTED
    ),
    "int8": case("qwen2", lora=dict(rank=2, base="int8"), train=ADAPTED),
    "prompt, several labels": case(
        model=dict(labels=tuple("abc"), problem_type="multi_label_classification"),
        lora=dict(prompt_tokens=3),
        task=dict(name="multi_label"),
        data=TASK,
        train=ADAPTED,
    ),
    "classes": case(
        "qwen2",
        model=dict(labels=tuple("abc")),
        task=dict(name="classification"),
        data=TASK,
        train=ADAPTED,
    ),
    "number": case(
        model=dict(labels=("score",)),
        task=dict(name="regression"),
        data=TASK,
        train=ADAPTED | dict(grad_accum_steps=2),
    ),
    **{
        loss: case(
            "llama",
            task=dict(name="preference", loss=loss),
            data=TASK,
            train=ADAPTED | dict(grad_accum_steps=1 if loss == "kto" else 2),
        )
        for loss in SEGMENTS
    },
    "grpo": case(
        "qwen3", lora=dict(rank=2), task=dict(name="grpo", kl_coef=0.1), data=TASK, train=ADAPTED
    ),
}


def products(count=8):
    """Every mesh of `count` devices over the four axes."""
    for sizes in itertools.product(*[[1, 2, 4, 8]] * len(sharding.AXES)):
        if math.prod(sizes) == count:
            yield dict(zip(sharding.AXES, sizes, strict=True))


def mesh_name(mesh):
    return " ".join(f"{axis}{size}" for axis, size in mesh.items() if size > 1)


def config_of(name, mesh=None, **model):
    sections = {key: dict(values) for key, values in CASES[name].items()}
    layers = 2 if sections["model"].get("scan_layers") else 1
    shape = dict(layers=layers, width=32, context=LENGTH, vocab_size=50, vocab_multiple=64)
    sections["model"] = shape | sections["model"] | model
    sections["train"] = dict(batch_size=16) | sections.get("train", {})
    return make_config(**sections, mesh=mesh or dict(data=1))


def batch_of(config, shapes, seed=0):
    """A batch of rows with several documents, some padding, and weights that differ by row."""
    random = np.random.default_rng(seed)
    rows, length = shapes.tokens.shape
    group = SEGMENTS[config.task.loss] if config.task.name == "preference" else 1
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        cuts = random.choice(np.arange(1, length - 1), size=group * (1 + row % 3), replace=False)
        start = 0
        for number, end in enumerate(sorted(cuts), 1):  # what follows is padding
            segments[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
            start = end
    weights = (random.random((rows, length)) < 0.7) * (segments > 0)
    weights[1::5] = 0  # rows without a target, so that what a device has differs
    if config.model.labels:  # a label stands at the last token of its document
        weights = (segments > 0) & (segments != np.roll(segments, -1, axis=1))
    targets = random.integers(0, 3 if config.model.labels else 50, (rows, length))
    if shapes.targets.dtype == jnp.float32:
        targets = random.normal(size=(rows, length))
    negative = -random.uniform(1, 4, (rows, length)).astype(np.float32)
    advantages = np.repeat(random.normal(size=(rows, 1)), length, axis=1).astype(np.float32)
    return Batch(
        tokens=random.integers(0, 50, (rows, length)).astype(np.int32),
        targets=targets.astype(shapes.targets.dtype),
        loss_weights=weights.astype(np.float32),
        segment_ids=segments,
        positions=positions,
        reference=None if shapes.reference is None else negative,
        advantages=None if shapes.advantages is None else advantages,
    )


# Changes no parameter and keeps the gradient as its state.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, _, params: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def adapters_like(shapes):
    """Adapters away from their start, where B is zero, and what is trained next to them."""
    random = np.random.default_rng(1)

    def draw(path, shape):
        start = np.float32(0.5 if path.endswith("lora_m") else 0)
        return start + 0.1 * random.standard_normal(shape.shape, np.float32)

    return tree.map_with_path(draw, shapes)


class Stepper:
    """The step of a config on its mesh, whose parameters stay where they are.

    config.mesh: with one device or 8.
    """

    def __init__(self, config):
        sizes = dataclasses.asdict(config.mesh)
        plan = make_plan(config, make_mesh(config, jax.devices()[: math.prod(sizes.values())]))
        shapes = dataclasses.replace(plan.state_shapes, opt_state=plan.state_shapes.params)
        self.plan = dataclasses.replace(plan, optimizer=KEEP_GRADIENT, state_shapes=shapes)
        base = jax.tree.map(np.asarray, random_params(config.model))
        params = adapters_like(shapes.params) if config.lora.on else base
        state = TrainState(
            np.zeros((), np.int32),
            params,
            jax.tree.map(np.zeros_like, params),
            np.asarray(jax.random.key_data(jax.random.key(5))),
        )
        with jax.set_mesh(self.plan.mesh):
            self.state = sharding.place(state, self.plan.state_shardings)
            self.frozen = train_step.place_frozen(self.plan, base)
            self.step = train_step.make_train_step(self.plan)
            self.evaluate = train_step.make_eval_step(self.plan)

    def batch(self, seed=0):
        return batch_of(self.plan.config, self.plan.batch_shapes, seed)

    def train(self, batch):
        """({"loss", "weight", "norm"}, {path: gradient}) of the next step."""
        with jax.set_mesh(self.plan.mesh):
            batch = sharding.to_global(self.plan.mesh, batch)
            self.state, metrics = self.step(self.state, batch, self.frozen)
        names = {"loss": "loss", "weight": "tokens", "norm": "grad_norm"}
        sums = {key: float(metrics[name]) for key, name in names.items()}
        return sums, jax.tree.map(np.asarray, tree.flatten(self.state.opt_state))

    def evaluation(self, batch):
        """{"loss", "weight", "correct"} of the evaluation step."""
        with jax.set_mesh(self.plan.mesh):
            batch = sharding.to_global(self.plan.mesh, batch)
            sums = self.evaluate(self.state.params, batch, self.frozen)
        return {key: float(value) for key, value in sums._asdict().items()}


@functools.cache
def on_one_device(name):
    """What `Stepper` gives there: two steps of training, and a function that evaluates."""
    stepper = Stepper(config_of(name))
    steps = [stepper.train(stepper.batch(seed)) for seed in (0, 1)]
    return steps, functools.cache(lambda: stepper.evaluation(stepper.batch(2)))
