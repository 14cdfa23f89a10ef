"""Compiled programs: under XLA's options for generation, and kept on disk whole.

jax's own cache finds a program by what tracing and lowering give, which takes longer than fetching it. A kept program is found by what it is made from:
the source of this package and the versions under it, jax's settings, the processor, and the arguments' shapes. It is not traced again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import os
import pickle
import platform
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable

from gptjax.core import files
from gptjax.runtime.devices import default_platform

_ANY_ORDER = {
    "xla_cpu_enable_fast_math": True,
    **{
        f"xla_cpu_fast_math_honor_{what}": True
        for what in ("nans", "infs", "division", "functions")
    },
}


_MOST = 32  # programs kept; each is about 2 MB at 12 layers


_FILES = [
    path for path in sorted(Path(__file__).parents[1].rglob("*.py")) if path.is_file()
]  # none where only bytecode was installed


_SOURCE = files.digest(
    *(path.read_bytes() for path in _FILES)
)  # read with the code, not when asked for: they may have changed by then


def jit(
    function: Callable[..., Any],
    *,
    static_argnames: tuple[str, ...] = (),
    donate_argnames: tuple[str, ...] = (),
) -> Program:
    """`jax.jit`, at the top level only, where XLA:CPU may take sums in any order, which is how it comes to add vectors of numbers in
    `products.few_rows`. Of its fast math that is all that is asked for: divisions and functions stay as they are, comparisons, softmax and values read at
    run time keep NaN and infinities, but x - x and x * 0 may be folded to 0. The jitted function itself is `.compiled()`."""
    return Program(function, static_argnames, donate_argnames)


class Program:
    """A jitted function, and what is ready of it."""

    def __init__(
        self, function: Callable[..., Any], static: tuple[str, ...], donated: tuple[str, ...]
    ):
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
    def compiled(
        self,
    ) -> Any:  # made at the first call: asking for the backend starts it, and `jax.distributed` must come before
        return jax.jit(
            self.function,
            static_argnames=self.static,
            donate_argnames=self.donated,
            compiler_options=_options(),
        )


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
        return {
            name: value
            for name, value in self._arguments.items()
            if name not in self.program.static
        }

    @functools.cached_property
    def key(self) -> Any:
        """jax's settings, static arguments, structure, shapes and dtypes."""
        static = [self._arguments[name] for name in self.program.static]
        static = [
            tuple(sorted(value)) if isinstance(value, frozenset) else value for value in static
        ]  # whose order is another in each process
        leaves, structure = jax.tree.flatten(tuple(self.arrays.values()))
        settings = repr(
            [
                item
                for item in jax.config.values.items()
                if "cache" not in item[0] and "traceback" not in item[0]
            ]
        )
        return (
            settings,
            tuple(static),
            structure,
            tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves),
        )

    def place(self, folder: Path) -> Path:
        versions = [
            platform.python_version(),
            *(module.__version__ for module in (jax, jaxlib, flax)),
        ]
        digest = files.digest(
            _SOURCE, repr([versions, _machine(), os.environ.get("XLA_FLAGS"), self.key])
        )
        return folder / f"{self.program.function.__name__}-{digest[:32]}.program"

    def lower(self, name: str) -> Any:
        """The program of its own function called `name`."""
        static, names = (
            {name: self._arguments[name] for name in self.program.static},
            list(self.arrays),
        )

        def function(*arrays: Any) -> Any:
            return self.program.function(**static, **dict(zip(names, arrays, strict=True)))

        function.__name__ = name
        donated = tuple(names.index(name) for name in self.program.donated)
        return jax.jit(function, donate_argnums=donated, compiler_options=_options()).lower(
            *self.arrays.values()
        )


def prepare(calls: Sequence[Call], folder: str | Path | None = None) -> None:
    """The programs of these calls are fetched from `folder`, or compiled and kept there; without a folder they come from jax's cache or are compiled, and so
    wherever programs cannot safely be kept: away from one CPU device, or where jax's cache is disabled. The folder holds machine code, to be trusted like
    jax's cache. Functions of this package that were replaced at run time are not seen."""
    if folder is None or not _storable():
        _compile(call.program.compiled().lower(*call.args, **call.kwargs) for call in calls)
        return
    places = {call.place(Path(folder).expanduser()): call for call in calls}
    missing = {place: call for place, call in places.items() if not _fetch(call, place)}
    # names that no cache knows: an executable that came from jax's cannot be stored again (it loads, and fails when it runs)
    names = [f"{call.program.function.__name__}_{uuid.uuid4().hex}" for call in missing.values()]
    made = _compile(call.lower(name) for call, name in zip(missing.values(), names, strict=True))
    pool = concurrent.futures.ThreadPoolExecutor(
        1
    )  # beside what comes now; the process waits for it at its end
    for (place, call), name, compiled in zip(missing.items(), names, made, strict=True):
        call.program.ready[call.key] = compiled
        pool.submit(_keep, compiled, place, name)
    pool.shutdown(wait=False)


def _storable() -> bool:
    settings, flags = jax.config.values, os.environ.get("XLA_FLAGS", "").strip()
    if (
        default_platform() != "cpu"
        or jax.device_count() > 1
        or not _FILES
        or settings["jax_disable_jit"]
    ):
        return False
    return settings["jax_enable_compilation_cache"] and (
        not flags or flags.startswith("--")
    )  # else they are in a file


def _compile(programs: Iterable[Any]) -> list[Any]:
    """Each is compiled in a thread, outside the interpreter's lock, while the next one is traced."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        making = [pool.submit(one.compile) for one in programs]
        return [one.result() for one in making]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C waits for one program at most


def _fetch(call: Call, place: Path) -> bool:
    """Whether the program is ready, or there and whole."""
    if call.key in call.program.ready:
        return True
    try:
        data = place.read_bytes()
        checksum, data = data[:64], data[64:]
        if files.digest(data).encode() != checksum:
            return False
        call.program.ready[call.key] = serialize_executable.deserialize_and_load(
            *pickle.loads(data)
        )
    except Exception:  # not there, or of another machine: whatever XLA raises; it is compiled then
        return False
    with contextlib.suppress(OSError):
        os.utime(place)  # used last
    return True


def _keep(compiled: Any, place: Path, name: str) -> None:
    data = pickle.dumps(serialize_executable.serialize(compiled))
    try:
        files.write_bytes(place, files.digest(data).encode() + data)
    except OSError as error:
        warnings.warn(
            f"a compiled program could not be kept for the next start: {error}", stacklevel=1
        )
    with contextlib.suppress(OSError):  # another process may do the same
        for copy in Path(jax.config.values["jax_compilation_cache_dir"] or place.parent).glob(
            f"*{name}*"
        ):  # nobody will look for it in jax's cache
            copy.unlink(missing_ok=True)
        ages = {
            path: path.stat().st_mtime for path in place.parent.glob("*.program")
        }  # and what killed processes left half written
        for old in sorted(ages, key=lambda path: ages[path])[:-_MOST]:
            old.unlink(missing_ok=True)


def _options() -> dict[str, Any] | None:
    return _ANY_ORDER if default_platform() == "cpu" else None


@functools.cache
def _machine() -> list[Any]:
    """What XLA:CPU compiles for: it divides work by the number of processors then."""
    flags = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    return [platform.machine(), flags, os.cpu_count()]
