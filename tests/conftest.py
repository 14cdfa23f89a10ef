"""Eight fake devices for every test, a cache folder of the session, and small runs to share."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

# Optimisation level 0 halves the time to compile; what the tests compare holds at every level, and
# the second lane of CI runs at the default.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
# experiments/accelerator runs some files on the one device that it is there for.
os.environ["JAX_PLATFORMS"] = os.environ.get("GPTJAX_TEST_PLATFORM", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import is_quick

from gptjax.config import build
from gptjax.core import tree
from gptjax.model import init as model_init
from gptjax.runtime import executables
from gptjax.runtime.compile_cache import enable_compile_cache
from gptjax.runtime.programs import is_crowded

ROOT = Path(__file__).parent.parent
SHARED = (
    ROOT.parent / "shared" / "data"
)  # real data sets on the developers' machines; tests that want it skip without


def pytest_collection_modifyitems(items):
    for item in items:
        if is_quick(item, ROOT):
            item.add_marker("quick")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    folder = (
        base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    ) / "cache"  # one for all workers
    folder.mkdir(exist_ok=True)
    os.environ["GPTJAX_CACHE"] = str(folder)
    enable_compile_cache()
    return folder


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Without it those of a lane are more than a process may map."""
    yield
    if is_crowded():
        jax.clear_caches()
        executables._programs.make_room()


@pytest.fixture
def one_device():
    return jax.devices()[:1]


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """`python -m gptjax.serve` over a toy model, started for the first test that wants it."""
    from served import serve_toy

    with serve_toy(tmp_path_factory.mktemp("served")) as served:
        yield served


def make_config(**sections):
    """A toy config: 2 layers x 32, context 16, bytes; each keyword updates one section."""
    base = {
        "model": dict(layers=2, width=32, heads=4, context=16, vocab_size=257),
        "data": dict(tokenizer="bytes"),
        "optim": dict(warmup_steps=2, lr=3e-3),
        "train": dict(steps=8, batch_size=8, sample_tokens=8),
    }
    for name, values in sections.items():
        base.setdefault(name, {}).update(values)
    return build.build_config(base)


def on_cpu(config, implementation="cpu"):
    """The model's config as a run or a generation on CPU devices resolves it.

    Of another platform's implementation, what a CPU can run: its attention kernels are left out.
    """
    if implementation in ("gpu", "tpu"):
        config = dataclasses.replace(config, attention="xla")
    return dataclasses.replace(config, implementation=implementation)


def random_params(config):
    """Parameters with every leaf away from its initial zeros and ones, drawn by NumPy: nothing to
    compile."""
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model_init.init_params(config, jax.random.key(0)))
    start = tree.map_with_path(lambda path, s: np.float32(path.endswith("scale")), shapes)
    return jax.tree.map(
        lambda s, at: jnp.asarray(at + 0.1 * generator.standard_normal(s.shape, np.float32)),
        shapes,
        start,
    )


def command(*args, check=True, devices=1, env=None, **kwargs):
    """Runs `python -m gptjax.<args>` as users do; returns the finished process and its output."""
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{count} --xla_backend_optimization_level=0"  # as above
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **(env or {})}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, args)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        **kwargs,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture
def corpus(tmp_path):
    """A text file of about 20 kB with structure that a tiny model can learn."""
    path = tmp_path / "corpus.txt"
    path.write_text(
        "".join(
            f"Line {i}: the quick brown fox jumps over {i % 7} lazy dogs.\n" for i in range(400)
        )
    )
    return path


TINY = (
    "--config=configs/debug.py",
    "--config.model.layers=1",
    "--config.model.width=16",
    "--config.model.heads=2",
    "--config.model.context=16",
    "--config.data.source=text",
    "--config.data.tokenizer=bytes",
    "--config.data.eval_fraction=0.1",
    "--config.train.sample_tokens=4",
)


def byte_level_tokenizer(template=""):
    """A byte-level BPE with a few merges and three control tokens, as a checkpoint brings it."""
    from gptjax.tokenizer.older_files import byte_level_json
    from gptjax.tokenizer.openai import byte_letters
    from gptjax.tokenizer.pretrained import PretrainedTokenizer

    letters = list(byte_letters())
    merges = ["t h", "th e", "Ġ the", "Ġ a", "i n"]
    words = [
        *letters,
        *(m.replace(" ", "") for m in merges),
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    ids = {word: i for i, word in enumerate(words)}
    control = words[-3:]
    content = {"tokenizer.json": byte_level_json(ids, merges, control=control)}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": "<|endoftext|>",
    }
    content["tokenizer_config.json"] = json.dumps(settings).encode()
    if template:
        content["chat_template.jinja"] = template.encode()
    return PretrainedTokenizer(content, [ids["<|im_end|>"]])


def pieces_json(pieces, scores, types, *, bos):
    """A tokenizer.json of Llama 2's kind: types as in GGUF, `bos` written before every text."""
    from gptjax.checkpoints.gguf_vocabulary import PREFIX, normal_json, tokenizer_json

    fields = dict(model="llama", tokens=pieces, scores=scores, token_type=types, bos_token_id=bos)
    return normal_json(tokenizer_json({PREFIX + name: value for name, value in fields.items()}))


FAMILIES = {
    "gpt2": {},
    "gpt2_untied": dict(tie_embeddings=False, mlp_dim=48, mlp="gelu_exact"),
    "gpt_neox": dict(
        positions="rope", rotary_fraction=0.5, parallel=True, mlp="gelu_exact", tie_embeddings=False
    ),
    "llama": dict(
        positions="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias="none",
        kv_heads=2,
        mlp_dim=64,
        tie_embeddings=False,
    ),
    "llama3": dict(
        positions="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias="attention",
        mlp_dim=64,
        rope_scaling="llama3",
        rope_factor=8.0,
        rope_original_context=16,
    ),
    "yarn": dict(
        positions="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias="none",
        mlp_dim=64,
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original_context=16,
    ),
    "mistral": dict(
        positions="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias="none",
        kv_heads=2,
        mlp_dim=64,
        sliding_window=5,
        tie_embeddings=False,
    ),
    "qwen2": dict(
        positions="rope", norm="rmsnorm", mlp="swiglu", bias="qkv", kv_heads=2, mlp_dim=64
    ),
    "qwen3": dict(
        positions="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias="none",
        kv_heads=2,
        mlp_dim=64,
        head_dim=16,
        qk_norm=True,
    ),
    "phi3": dict(
        positions="rope",
        rotary_fraction=0.5,
        norm="rmsnorm",
        mlp="swiglu",
        bias="none",
        kv_heads=2,
        mlp_dim=64,
        sliding_window=7,
        tie_embeddings=False,
        family="phi3",
    ),
    "gemma2": dict(
        positions="rope",
        norm="rmsnorm",
        norm_plus_one=True,
        post_norms=True,
        mlp="geglu",
        bias="none",
        kv_heads=2,
        mlp_dim=64,
        head_dim=16,
        scale_embeddings=True,
        query_pre_attn_scalar=24,
        attention_softcap=5.0,
        logit_softcap=3.0,
        sliding_window=5,
        alternate_windows=True,
    ),
}


def tiny_checkpoint(family="gpt2", *, vocab=264, context=64, layers=2, tokenizer=None, keep=None):
    """A `convert.Pretrained` with random weights."""
    from gptjax.checkpoints import pretrained

    config = make_config(
        model=dict(
            vocab_size=vocab, context=context, layers=layers, vocab_multiple=128, **FAMILIES[family]
        )
    ).model
    params = jax.tree.map(np.asarray, random_params(config))
    return pretrained.Pretrained(config, params, tokenizer, keep=keep or {})
