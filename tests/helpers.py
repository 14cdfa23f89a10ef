"""What tests of several folders share: short training runs, configs, templates, files of rows."""

import json

import jax
import numpy as np
from conftest import FAMILIES, make_config, tiny_checkpoint

from gptjax.core.types import Batch
from gptjax.generation.language_model import LanguageModel
from gptjax.model import lora
from gptjax.runtime import sharding
from gptjax.runtime.mesh import make_mesh
from gptjax.tasks import loading
from gptjax.tokenizer.trained import ByteTokenizer
from gptjax.training import step as train_step
from gptjax.training.setup import make_plan

# Two spellings of the same chat template.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_BY_EXPRESSIONS = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def batch_for(config, step=0):
    generator = np.random.default_rng(step)
    b, t = config.train.batch_size, config.model.context
    ids = generator.integers(0, config.model.vocab_size, (b, t + 1)).astype(np.int32)
    segments = 1 + np.sort(generator.integers(0, 2, (b, t)), axis=1).astype(np.int32)
    return Batch(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        loss_weights=(generator.random((b, t)) < 0.7).astype(np.float32),
        segment_ids=segments,
        positions=np.broadcast_to(np.arange(t, dtype=np.int32), (b, t)),
    )


def run_steps(config, devices, n=3):
    """(losses, final state, step function, mesh) of n steps."""
    mesh = make_mesh(config, devices)
    with jax.set_mesh(mesh):
        plan = make_plan(config, mesh)
        state, frozen = train_step.init_state(plan)
        step = train_step.make_train_step(plan)
        losses = []
        for i in range(n):
            state, metrics = step(state, sharding.to_global(mesh, batch_for(config, i)), frozen)
            losses.append(float(metrics["loss"]))
    return np.array(losses), state, step, mesh


def adapter_config(family="llama", **adapters):
    return make_config(
        model=dict(vocab_size=264, context=64, **FAMILIES[family]),
        lora=dict(adapters),
        train=dict(init_from="base"),
    )


def adapters_for(config, base, *, scale=0.05):
    """Adapters with every leaf away from its start."""
    new = lora.init(config.model, config.lora, jax.random.key(1), base)
    random = np.random.default_rng(2)
    return jax.tree.map(
        lambda p: p + scale * random.standard_normal(p.shape).astype(np.float32), new
    )


def task_config(path, *, data=None, model=None, **sections):
    base = {
        "model": {"context": 64, "vocab_size": 0, **(model or {})},
        "data": {"source": "jsonl", "path": str(path), "eval_fraction": 0.0, **(data or {})},
    }
    return make_config(**base, **sections)


def write_jsonl(path, records):
    path.write_text(
        "".join(json.dumps(r, ensure_ascii="\ud83d" in r.get("text", "")) + "\n" for r in records),
        encoding="utf-8",
    )
    return path


def load_examples(folder, records, tokenizer=None, **sections):
    """(examples of a task whose rows are these records, its config)."""
    config = task_config(write_jsonl(folder / "rows.jsonl", records), **sections)
    return loading.load_examples(config, tokenizer or ByteTokenizer()), config


PROMPTS = [[5, 9, 30], [200, 1, 7, 7, 40, 41, 60, 3, 100], [77], list(range(50, 85))]


def tiny_language_model(
    family="gpt2", *, tokenizer=None, vocab=264, context=64, layers=2, **options
):
    """A `LanguageModel` with random weights of a family's kind."""
    checkpoint = tiny_checkpoint(
        family, vocab=vocab, context=context, layers=layers, tokenizer=tokenizer
    )
    return LanguageModel(checkpoint.config, checkpoint.params, tokenizer, **options)


def greedy_tokens(lm, prompt, count):
    """The next tokens by a full forward pass each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(lm.logits([ids])[0, -1].argmax()))
    return ids[len(prompt) :]
