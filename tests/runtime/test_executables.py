"""Executables cached on disk: found by what they are made from, and by nothing else."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from conftest import ROOT, byte_level_tokenizer, command, tiny_checkpoint

from gptjax.checkpoints import formats
from gptjax.generation import language_model
from gptjax.runtime import executables
from gptjax.runtime.programs import Programs

SETTINGS = dict(temperature=0.8, top_k=5, min_p=0.01, repetition_penalty=1.1, seed=3)


def generated(folder, tmp_path, **env):
    """(what the command wrote, the functions that jax compiled for it) in a process of its own."""
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    env = {
        "GPTJAX_CACHE": str(tmp_path / "cache"),
        "JAX_COMPILATION_CACHE_DIR": "",
        "JAX_LOG_COMPILES": "1",
        **env,
    }
    done = command(
        "gptjax.generate",
        f"--checkpoint={folder}",
        "--prompt=the cat",
        "--max_new_tokens=20",
        "--json",
        *flags,
        env=env,
    )
    return json.loads(done.stdout), {
        name for name in ("prefill", "advance") if f"Compiling jit({name}" in done.stderr
    }


def test_a_second_process_compiles_neither_prefill_nor_the_loop(tmp_path):
    folder, both = tmp_path / "hf", {"prefill", "advance"}
    formats.write_checkpoint(
        folder, tiny_checkpoint("llama", context=256, tokenizer=byte_level_tokenizer())
    )
    first, compiled = generated(folder, tmp_path, PYTHONHASHSEED="1")
    assert compiled == both
    assert not [
        path
        for path in (tmp_path / "cache" / "xla").iterdir()
        if "prefill" in path.name or "advance" in path.name
    ]
    assert generated(folder, tmp_path, PYTHONHASHSEED="2") == (first, set())
    for path in (tmp_path / "cache" / "executables").glob("advance-*"):
        # damaged: compiled again (its checksum; what damaged machine code does is anyone's guess)
        path.write_bytes(bytes(32) + path.read_bytes()[32:])
    assert generated(folder, tmp_path) == (first, {"advance"})
    assert generated(folder, tmp_path, JAX_DISABLE_JIT="1")[0]["tokens"] == first["tokens"]
    expected = language_model.load(folder).generate("the cat", max_new_tokens=20, **SETTINGS)
    assert first["tokens"] == expected.tokens
    np.testing.assert_allclose(first["logprobs"], expected.logprobs, atol=1e-4)


@executables.jit
def twice(x, *, bias):
    return 2 * x + bias


def test_an_executable_is_found_by_all_that_it_depends_on(tmp_path, monkeypatch):
    path = lambda shape=(4,), dtype=np.float32: twice.call(
        np.zeros(shape, dtype), bias=np.zeros(1)
    ).path(tmp_path)
    usual = path()
    assert path() == usual
    others = [path((5,)), path(dtype=np.int8)]
    with jax.default_matmul_precision("highest"):
        others.append(path())
    with monkeypatch.context() as patch:
        patch.setattr(executables, "_SOURCE_DIGEST", "another")
        others.append(path())
    with monkeypatch.context() as patch:
        flags = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_fast_math=false"
        patch.setenv("XLA_FLAGS", flags)
        others.append(path())
    with monkeypatch.context() as patch:
        patch.setattr(jax, "__version__", "0.0.0")
        others.append(path())
    assert len({usual, *others}) == 1 + len(others) == 7


@pytest.mark.parametrize("edited", ["model/transformer.py", "ops/norm.py", "generation/loop.py"])
def test_an_edited_file_of_any_folder_changes_the_key(tmp_path, monkeypatch, edited):
    path = lambda: twice.call(np.zeros(4, np.float32), bias=np.zeros(1)).path(tmp_path)
    copy = shutil.copytree(ROOT / "gptjax", tmp_path / "gptjax")
    monkeypatch.setattr(executables, "_SOURCE_DIGEST", executables.source_digest(copy))
    before = path()
    (copy / edited).write_text((copy / edited).read_text() + "\n# edited\n")
    monkeypatch.setattr(executables, "_SOURCE_DIGEST", executables.source_digest(copy))
    assert path() != before


def test_the_key_covers_the_package_that_runs():
    assert ROOT / "gptjax" / "model" / "transformer.py" in executables.source_files(
        executables._PACKAGE
    )
    assert executables.source_digest(ROOT / "gptjax") == executables._SOURCE_DIGEST


def test_static_arguments_and_their_order_count():
    three = executables.jit(lambda x, kinds: x, static_argnames=("kinds",))
    one, other = (
        three.call(np.zeros(2), frozenset(kinds)).key
        for kinds in (["top_k", "min_p"], ["min_p", "top_k"])
    )
    assert one == other != three.call(np.zeros(2), frozenset(["top_k"])).key


def test_a_ready_executable_is_for_its_settings(monkeypatch):
    monkeypatch.setattr(executables, "_programs", Programs())
    call = lambda: twice(np.ones(2, np.float32), bias=np.ones(1, np.float32)).tolist()
    seven = twice.call(np.zeros(2, np.float32), bias=np.zeros(1, np.float32))
    executables._keep(seven, lambda x, bias: np.array([7]))
    assert call() == [7]
    with jax.default_matmul_precision("highest"):
        assert call() == [3, 3]
    with jax.disable_jit():
        assert call() == [3, 3]
    assert twice(np.ones(2), bias=1).tolist() == [3, 3]


def test_the_program_of_a_call_takes_its_arrays(monkeypatch):
    monkeypatch.setattr(executables, "_programs", Programs())
    power = executables.jit(lambda n, x, *, sign: sign * x**n, static_argnames=("n", "sign"))
    call = power.call(3, np.ones(2), sign=-1)
    program = call.program()
    assert program(np.full(2, 2.0)).tolist() == [-8, -8]
    executables._keep(call, lambda x: x + 7)
    assert call.program()(np.ones(2)).tolist() == [8, 8]
    assert program(np.ones(2)).tolist() == [-1, -1]
    other = power.call(2, np.ones(3), sign=5)
    assert other.program()(np.full(3, 2.0)).tolist() == [20] * 3


def test_room_is_made_after_what_jit_compiled(monkeypatch):
    programs, made = Programs(), []
    monkeypatch.setattr(programs, "make_room", lambda: made.append("room"))
    monkeypatch.setattr(executables, "_programs", programs)
    half = executables.jit(lambda x: x / 2)
    half.call(np.ones(2)).program()(np.ones(2))
    assert not made  # the next one looks
    for rows, times in ((2, 1), (2, 1), (3, 2)):
        half(np.ones(rows))
        assert len(made) == times
    half.forget()
    half(np.ones(4))
    assert len(made) == 3


def test_the_executables_used_longest_ago_are_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(executables, "_MAX_CACHED", 2)
    (tmp_path / "thesis.txt").touch()
    compiled = jax.jit(lambda x: x + 1).lower(np.float32(1)).compile()
    for i, name in enumerate("abcd"):
        executables._store(compiled, tmp_path / f"{name}.executable", "no name")
        os.utime(tmp_path / f"{name}.executable", (i, i))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "c.executable",
        "d.executable",
        "thesis.txt",
    ]
    executables._store(compiled, tmp_path / "thesis.txt" / "e.executable", "no name")
    assert "thesis.txt cannot be written" in capsys.readouterr().err
