"""Programs that a process keeps ready: those used longest ago go where maps of memory run short."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.runtime import executables, programs
from gptjax.runtime.programs import Programs


def test_those_used_longest_ago_go_and_the_last_one_stays(monkeypatch):
    forgotten, kept = [], Programs(lambda: forgotten.append(True))
    for name in "abc":
        kept.add(name, name.upper())
    assert kept.get("a") == "A" and not forgotten
    answers = iter([True, True, True, False])
    monkeypatch.setattr(programs, "is_crowded", lambda: next(answers))
    kept.add("d", "D")
    assert [kept.get(name) for name in "abcd"] == ["A", None, None, "D"] and forgotten
    monkeypatch.setattr(programs, "is_crowded", lambda: True)
    kept.add("e", "E")
    assert [kept.get(name) for name in "ade"] == [None, None, "E"]


def test_called_or_kept_programs_go_and_come_back(monkeypatch):
    plus = executables.jit(lambda x: x + 1)
    call = plus.call(np.zeros(3, np.float32))
    executables.executable(call)
    plus(np.zeros(4, np.float32))
    assert executables.ready(call.name) and plus.compiled()._cache_size() == 1
    monkeypatch.setattr(programs, "is_crowded", lambda: True)
    plus(np.zeros(5, np.float32))
    assert plus.compiled()._cache_size() == 0
    executables.executable(plus.call(np.zeros(6, np.float32)))
    assert executables.ready(call.name) is None
    assert plus(np.zeros(3, np.float32)).tolist() == [1, 1, 1]


@pytest.mark.skipif(not programs.memory_maps()[1], reason="the system does not count maps")
def test_maps_of_what_is_let_go_are_given_back(monkeypatch):
    def maps():
        gc.collect()
        return programs.memory_maps()[0]

    sines = executables.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) @ x, x))
    before = maps()
    for size in range(3, 23):
        executables.executable(sines.call(np.zeros((size, size), np.float32)))
        sines(np.zeros((size + 20, size + 20), np.float32))
    grown = maps() - before
    monkeypatch.setattr(programs, "_SHARE", (before + grown / 2) / programs.memory_maps()[1])
    executables._programs.make_room()
    assert grown > 40 and maps() - before < grown / 2
