"""Compiled programs: under XLA's options for generation, and kept on disk whole.

jax's own cache finds a program by what tracing and lowering give, which takes longer than fetching it. A kept program is found by what it is made from:
the source of this package and the versions under it, jax's settings, the processor, and the arguments' shapes. Nothing is traced.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import os
import pickle
import platform
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
from jax.experimental import serialize_executable

from gptjax import files

_ANY_ORDER = {"xla_cpu_enable_fast_math": True, **{f"xla_cpu_fast_math_honor_{what}": True for what in ("nans", "infs", "division", "functions")}}
_MOST = 32  # programs kept; each is about 2 MB at 12 layers
# read with the code, not when it is asked for: the files may have changed by then
_SOURCE = files.digest(*(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))))


def jit(function: Callable[..., Any], *, static_argnames: tuple[str, ...] = (), donate_argnames: tuple[str, ...] = ()) -> Program:
    """`jax.jit`, at the top level only, where XLA:CPU may take sums in any order, which is how it comes to add vectors of numbers in
    `products.few_rows`. Of its fast math that is all that is asked for: divisions and functions stay as they are, comparisons, softmax and values read at
    run time keep NaN and infinities, but x - x and x * 0 may be folded to 0. The jitted function itself is `.compiled()`."""
    return Program(function, static_argnames, donate_argnames)


class Program:
    """A jitted function, and what is ready of it."""

    def __init__(self, function: Callable[..., Any], static: tuple[str, ...], donated: tuple[str, ...]):
        functools.update_wrapper(self, function)
        self.function, self.static, self.donated = function, static, donated
        self.signature = inspect.signature(function)
        self.ready: dict[Any, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.ready and (ready := self.ready.get((call := self.call(*args, **kwargs)).key)):
            return ready(*call.arrays.values())
        return self.compiled()(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Call:
        return Call(self, args, kwargs)

    @functools.cache  # noqa: B019  (a program lives as long as its module)
    def compiled(self) -> Any:  # made at the first call: asking for the backend starts it, and `jax.distributed` must come before
        return jax.jit(self.function, static_argnames=self.static, donate_argnames=self.donated, compiler_options=_options())


@dataclasses.dataclass
class Call:
    """A program and its arguments; shapes do for arrays."""

    program: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @functools.cached_property
    def _arguments(self) -> dict[str, Any]:
        bound = self.program.signature.bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return bound.arguments

    @functools.cached_property
    def arrays(self) -> dict[str, Any]:
        return {name: value for name, value in self._arguments.items() if name not in self.program.static}

    @functools.cached_property
    def key(self) -> Any:
        """Static arguments, structure, shapes and dtypes."""
        static = [self._arguments[name] for name in self.program.static]
        static = [tuple(sorted(value)) if isinstance(value, frozenset) else value for value in static]  # whose order is another in each process
        leaves, structure = jax.tree.flatten(tuple(self.arrays.values()))
        return tuple(static), structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)

    def lower(self, *, alone: bool) -> Any:
        """alone: under a name of its own, with which jax's cache cannot know it; what comes from there cannot be stored again."""
        if not alone:
            return self.program.compiled().lower(*self.args, **self.kwargs)
        static, names = {name: self._arguments[name] for name in self.program.static}, list(self.arrays)

        def function(*arrays: Any) -> Any:
            return self.program.function(**static, **dict(zip(names, arrays, strict=True)))

        function.__name__ = f"{self.program.function.__name__}_{uuid.uuid4().hex[:8]}"
        donated = tuple(names.index(name) for name in self.program.donated)
        return jax.jit(function, donate_argnums=donated, compiler_options=_options()).lower(*self.arrays.values())

    def place(self, folder: Path) -> Path:
        return folder / f"{self.program.function.__name__}-{files.digest(_SOURCE, _surroundings(), repr(self.key))[:32]}"


def make_ready(calls: Sequence[Call], folder: Path | None = None) -> None:
    """The programs of these calls are fetched from `folder`, or compiled (in a thread while the next one is traced) and kept there; without a folder they come
    from jax's cache or are compiled. So also where programs are not known to be storable, away from one CPU device, and where jax's cache is disabled. The
    folder holds machine code, to be trusted like jax's cache. Functions that were replaced at run time are not seen."""
    storable = jax.default_backend() == "cpu" and jax.device_count() == 1 and jax.config.values["jax_enable_compilation_cache"]
    folder = folder if storable else None
    missing = [call for call in calls if folder is None or not _fetch(call, call.place(folder))]
    pool = concurrent.futures.ThreadPoolExecutor(1)  # compiles outside the interpreter's lock
    try:
        making = [pool.submit(call.lower(alone=folder is not None).compile) for call in missing]
        made = [one.result() for one in making]
        for call, compiled in zip(missing, made, strict=True):
            if folder is not None:
                call.program.ready[call.key] = compiled
                pool.submit(_keep, compiled, call.place(folder))  # beside what comes now; the process waits for it at its end
        pool.shutdown(wait=False)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C waits for no program
        raise


def _fetch(call: Call, place: Path) -> bool:
    """Whether the program is ready, or there and whole."""
    if call.key in call.program.ready:
        return True
    try:
        data = place.read_bytes()
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return False
        call.program.ready[call.key] = serialize_executable.deserialize_and_load(*pickle.loads(data[32:]))
        os.utime(place)
    except Exception:  # not there, or of another machine: whatever XLA raises; it is compiled then
        return False
    return True


def _keep(compiled: Any, place: Path) -> None:
    data = pickle.dumps(serialize_executable.serialize(compiled))
    files.write_bytes(place, hashlib.sha256(data).digest() + data)
    for old in sorted(place.parent.glob("[!.]*"), key=lambda path: path.stat().st_mtime)[:-_MOST]:
        old.unlink(missing_ok=True)


def _options() -> dict[str, Any] | None:
    return _ANY_ORDER if jax.default_backend() == "cpu" else None


def _surroundings() -> str:
    """What a compiled program depends on beside its source and its arguments."""
    versions = [platform.python_version(), *(module.__version__ for module in (jax, jaxlib, flax))]
    flags = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    machine = [platform.machine(), flags, os.cpu_count()]  # XLA:CPU divides work by the number of processors when it compiles
    return repr([versions, machine, os.environ.get("XLA_FLAGS"), sorted(jax.config.values.items())])
