"""`jit` for generation, and executables cached on disk.

JAX's own cache looks a program up by the result of tracing and lowering, which takes longer than
reading the executable. Here an executable is looked up by what it is made from: the source of this
package, the versions of Python and JAX, JAX's settings, the processor, and the arguments' shapes.
So a second process neither traces nor compiles.

`jit(function)` gives a `JittedFunction`; `prepare([f.call(...)], folder)` fetches or compiles what
later calls need, and `executable(f.call(...))` gives it. The folder holds machine code: trust it as
you trust JAX's cache. Called with `mesh=`, each device of a mesh runs the function on its part of
the arguments (`sharding.decoding_specs`). A process with many programs lets go of those that it
used longest ago (`programs`).
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import os
import pickle
import platform
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from gptjax.core import files, processor
from gptjax.runtime import sharding
from gptjax.runtime.devices import default_platform, platform_of
from gptjax.runtime.programs import Programs

# Sums in any order, which is what lets XLA:CPU use vector instructions for them. Divisions and
# functions stay exact, and NaN and infinities are honoured. Vectors as wide as the processor's.
_CPU_OPTIONS = {
    "xla_cpu_prefer_vector_width": 512,
    "xla_cpu_enable_fast_math": True,
    "xla_cpu_fast_math_honor_nans": True,
    "xla_cpu_fast_math_honor_infs": True,
    "xla_cpu_fast_math_honor_division": True,
    "xla_cpu_fast_math_honor_functions": True,
}
_MAX_CACHED = 32  # executables in the folder; one is about 2 MB at 12 layers
_SUFFIX = ".executable"
_STORE_SECONDS = 60  # that the end of a process waits for


def source_files(package: Path) -> list[Path]:
    """The Python files of a package, in a fixed order. Empty where only bytecode is installed."""
    return [path for path in sorted(package.rglob("*.py")) if path.is_file()]


def source_digest(package: Path) -> str:
    """sha256 of the contents of the package's Python files."""
    return files.digest(*(path.read_bytes() for path in source_files(package)))


# Read when the code is imported, because the files may change while the process runs.
_PACKAGE = Path(__file__).parents[1]
_HAS_SOURCES = bool(source_files(_PACKAGE))
_SOURCE_DIGEST = source_digest(_PACKAGE)


def jit(
    function: Callable[..., Any],
    *,
    static_argnames: tuple[str, ...] = (),
    donate_argnames: tuple[str, ...] = (),
    outputs: Any = sharding.TEXTS,
) -> JittedFunction:
    """`jax.jit` for the outermost function, with XLA's options for generation.

    outputs: how a mesh splits them: PartitionSpecs, or the name of an argument that is split alike.

    On a CPU, XLA may take sums in any order; `ops.products` needs that to be fast. NaN and infinity
    survive comparisons, softmax and values read at run time, but XLA may fold x - x and x * 0 to 0.
    """
    return JittedFunction(function, static_argnames, donate_argnames, outputs)


class JittedFunction:
    """A jitted function, some of whose calls may have executables that are ready."""

    def __init__(
        self,
        function: Callable[..., Any],
        static: tuple[str, ...],
        donated: tuple[str, ...],
        outputs: Any,
    ) -> None:
        functools.update_wrapper(self, function)
        self.function, self.static, self.donated = function, static, donated
        self.outputs = outputs
        self.signature = inspect.signature(function)
        self.is_prepared = False  # whether any of its calls was
        self._compiled: dict[Mesh | None, Any] = {}
        self._kept: dict[Mesh | None, int] = {}  # how many programs `jax.jit` was seen to keep
        _jitted.append(self)

    def __call__(self, *args: Any, mesh: Mesh | None = None, **kwargs: Any) -> Any:
        if mesh is None and self.is_prepared:
            call = self.call(*args, **kwargs)
            if program := _programs.get(call.name):
                return program(*call.arrays.values())
        return self.run(*args, mesh=mesh, **kwargs)

    def run(self, *args: Any, mesh: Mesh | None = None, **kwargs: Any) -> Any:
        """The same by `jax.jit`, whether or not there is an executable."""
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            result = self.compiled(mesh)(*args, **kwargs)
        self.make_room(mesh)
        return result

    def make_room(self, mesh: Mesh | None) -> None:
        """Lets go of programs, if maps are short and `jax.jit` keeps more than at the last call."""
        kept, before = self.compiled(mesh)._cache_size(), self._kept.get(mesh, 0)
        self._kept[mesh] = kept
        if kept > before:
            _programs.make_room()

    def call(self, *args: Any, mesh: Mesh | None = None, **kwargs: Any) -> Call:
        """This function with these arguments, not yet run."""
        return Call(self, args, kwargs, mesh)

    def compiled(self, mesh: Mesh | None = None) -> Any:
        """The function of `jax.jit`.

        Made at the first call, because asking for the platform starts JAX's backend, and
        `jax.distributed` must be initialized before that.
        """
        if mesh not in self._compiled:
            self._compiled[mesh] = jax.jit(
                self.function if mesh is None else self._on_each_device(mesh),
                static_argnames=self.static,
                donate_argnames=self.donated,
                compiler_options=_compiler_options(mesh),
            )
        return self._compiled[mesh]

    def forget(self) -> None:
        """Lets go of the programs that `jax.jit` keeps."""
        self._kept.clear()
        for jitted in list(self._compiled.values()):
            jitted.clear_cache()

    def _on_each_device(self, mesh: Mesh) -> Callable[..., Any]:
        """The function of the whole arrays, of which each device computes its part."""

        @functools.wraps(self.function)
        def of_all(*args: Any, **kwargs: Any) -> Any:
            bound = self.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            static = {name: bound.arguments.pop(name) for name in self.static}
            specs = {
                name: sharding.decoding_specs(name, value)
                for name, value in bound.arguments.items()
            }
            outputs = specs[self.outputs] if isinstance(self.outputs, str) else self.outputs
            of_each = sharding.on_each_device(
                mesh,
                lambda arrays: self.function(**static, **arrays),
                in_specs=(specs,),
                out_specs=outputs,
            )
            return of_each(dict(bound.arguments))

        return of_all


@dataclasses.dataclass
class Call:
    """A jitted function and its arguments. In place of an array its shape and dtype will do."""

    jitted: JittedFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mesh: Mesh | None = None

    def lowered(self) -> jax.stages.Lowered:
        """For its devices, which may be described rather than present; also from shapes alone."""
        jitted = self.jitted.compiled(self.mesh)
        if self.mesh is None:
            return jitted.lower(*self.args, **self.kwargs)
        with jax.set_mesh(self.mesh):
            return jitted.lower(*self.args, **self.kwargs)

    @functools.cached_property
    def _arguments(self) -> dict[str, Any]:
        bound = self.jitted.signature.bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return bound.arguments

    @functools.cached_property
    def arrays(self) -> dict[str, Any]:
        """The arguments that are not static."""
        static = self.jitted.static
        return {name: value for name, value in self._arguments.items() if name not in static}

    @functools.cached_property
    def key(self) -> Any:
        """JAX's settings, static arguments, structure, shapes and dtypes: hashable."""
        static = []
        for name in self.jitted.static:
            value = self._arguments[name]
            # the order of a set differs between processes
            static.append(tuple(sorted(value)) if isinstance(value, frozenset) else value)
        leaves, structure = jax.tree.flatten(tuple(self.arrays.values()))
        shapes = tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)
        settings = [
            (name, value)
            for name, value in jax.config.values.items()
            if "cache" not in name and "traceback" not in name
        ]
        return repr(settings), tuple(static), structure, shapes

    @property
    def name(self) -> Any:
        """Of the program, in this process: hashable."""
        return self.jitted, self.key

    def program(self) -> Callable[..., Any]:
        """The function of the arrays alone, by position, that such a call runs.

        For loops, in which every call would look for it. Static arguments come before all others,
        or by name, as arrays must not.
        """
        if self.mesh is None and (known := ready(self.name)):
            return known
        jitted, static = self.jitted, self.jitted.static
        names = [*jitted.signature.parameters][: len(self.args)]
        leading = self.args[: sum(name in static for name in names)]
        assert not set(names[len(leading) :]) & set(static) and set(self.kwargs) <= set(static)
        if self.mesh is not None:
            return functools.partial(jitted.run, *leading, mesh=self.mesh, **self.kwargs)
        jitted.make_room(None)  # for what the program before this one compiled
        return functools.partial(jitted.compiled(), *leading, **self.kwargs)

    def path(self, folder: Path) -> Path:
        """The file of this call's executable."""
        versions = [platform.python_version()]
        versions += [module.__version__ for module in (jax, jaxlib, flax)]
        parts = [versions, _processor(), os.environ.get("XLA_FLAGS"), self.key]
        digest = files.digest(_SOURCE_DIGEST, repr(parts))
        return folder / f"{self.jitted.function.__name__}-{digest[:32]}{_SUFFIX}"

    def lower(self, name: str) -> Any:
        """Lowered, as a function called `name` of the arrays alone."""
        static = {argument: self._arguments[argument] for argument in self.jitted.static}
        names = list(self.arrays)

        def function(*arrays: Any) -> Any:
            return self.jitted.function(**static, **dict(zip(names, arrays, strict=True)))

        function.__name__ = name
        donated = tuple(names.index(argument) for argument in self.jitted.donated)
        jitted = jax.jit(function, donate_argnums=donated, compiler_options=_compiler_options(None))
        return jitted.lower(*self.arrays.values())


def prepare(calls: Sequence[Call], folder: str | Path | None = None) -> None:
    """Gets the executables of these calls ready: read from `folder`, or compiled and stored there.

    Without a folder they come from JAX's cache or are compiled. So they do where they cannot safely
    be stored: on anything but one CPU device, or where JAX's cache is disabled. Functions of this
    package that were replaced at run time are not noticed.
    """
    if folder is None or not _can_store() or any(call.mesh for call in calls):
        _compile(call.lowered() for call in calls)
        return
    paths = {call.path(Path(folder).expanduser()): call for call in calls}
    missing = {path: call for path, call in paths.items() if not _load(call, path)}
    # Names that no cache knows: an executable that came from JAX's cache cannot be stored again
    # (it loads, and then fails when it runs).
    names = [f"{call.jitted.function.__name__}_{uuid.uuid4().hex}" for call in missing.values()]
    lowered = (call.lower(name) for call, name in zip(missing.values(), names, strict=True))
    compiled = _compile(lowered)
    to_store = []
    for (path, call), name, executable in zip(missing.items(), names, compiled, strict=True):
        _keep(call, executable)
        to_store.append((executable, path, name))
    if to_store:
        _store_meanwhile(to_store)


def executable(call: Call, folder: str | Path | None = None) -> Any:
    """The compiled function of the call's arrays, by position; made once, as `prepare` does."""
    if ready(call.name) is None and folder is not None and _can_store():
        prepare([call], folder)
    program = ready(call.name)
    if program is None:
        program = call.lower(call.jitted.function.__name__).compile()
        _keep(call, program)
    return program


def ready(name: Any) -> Any:
    """The executable of a `Call.name`; None where it was not made, or the process let it go."""
    return _programs.get(name)


def _keep(call: Call, program: Any) -> None:
    call.jitted.is_prepared = True
    _programs.add(call.name, program)


def _forget() -> None:
    for jitted in _jitted:
        jitted.forget()


_jitted: list[JittedFunction] = []  # all of the process
_programs = Programs(_forget)


def _can_store() -> bool:
    """Whether executables may be stored and loaded here."""
    if default_platform() != "cpu" or jax.device_count() > 1 or not _HAS_SOURCES:
        return False
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("--"):
        return False  # XLA reads its flags from a file of that name, which the key does not cover
    settings = jax.config.values
    return settings["jax_enable_compilation_cache"] and not settings["jax_disable_jit"]


def _compile(lowered: Iterable[Any]) -> list[Any]:
    """Compiles each in a thread, outside the interpreter's lock, while the next one is traced."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        futures = [pool.submit(program.compile) for program in lowered]
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C waits for one compilation at most


def _load(call: Call, path: Path) -> bool:
    """Whether the executable is ready now: it was, or its file is there and intact."""
    if ready(call.name) is not None:
        return True
    try:
        data = files.read_cached(path)
        if data is None:
            return False
        _keep(call, serialize_executable.deserialize_and_load(*pickle.loads(data)))
    except Exception:  # missing, or of another machine (XLA raises what it likes): compile it
        return False
    with contextlib.suppress(OSError):
        os.utime(path)  # used last
    return True


def _store_meanwhile(to_store: list[tuple[Any, Path, str]]) -> None:
    """Stores while the process goes on; it waits for that at its end, but not for a dead disk."""

    def store_all() -> None:
        for executable, path, name in to_store:
            _store(executable, path, name)

    thread = threading.Thread(target=store_all, name="store executables", daemon=True)
    thread.start()
    atexit.register(thread.join, _STORE_SECONDS)


def _store(executable: Any, path: Path, name: str) -> None:
    """Writes the executable, with its checksum first. Removes what is no longer needed: the copy in
    JAX's cache, which nobody will look up, and the executables that were used longest ago.
    """
    data = pickle.dumps(serialize_executable.serialize(executable))
    files.write_cached(path, data)
    with contextlib.suppress(OSError):  # another process may do the same
        jax_cache = Path(jax.config.values["jax_compilation_cache_dir"] or path.parent)
        for copy in jax_cache.glob(f"*{name}*"):
            copy.unlink(missing_ok=True)
        # this includes files that killed processes left half-written
        last_used = {other: other.stat().st_mtime for other in path.parent.glob(f"*{_SUFFIX}")}
        for old in sorted(last_used, key=lambda other: last_used[other])[:-_MAX_CACHED]:
            old.unlink(missing_ok=True)


def _compiler_options(mesh: Mesh | None) -> dict[str, Any] | None:
    return _CPU_OPTIONS if platform_of(mesh) == "cpu" else None


@functools.cache
def _processor() -> list[Any]:
    """What XLA:CPU compiles for: instruction sets, and the cores that it divides work between."""
    return [platform.machine(), sorted(processor.instruction_sets()), os.cpu_count()]
