"""GPT models in JAX: train, load, generate, convert.

    import gptjax

    lm = gptjax.load("runs/quickstart")
    print(lm.generate("My fellow citizens", max_new_tokens=20).text)

`load` takes the checkpoint of any source and returns a `LanguageModel`. All other public names are
imported when they are first used, so `import gptjax` itself is instant and starts no JAX. To add a
public name, add a row to `_HOMES`, to `__all__` and to the imports for type checkers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.config.errors import UserError
    from gptjax.generation.language_model import LanguageModel
    from gptjax.generation.options import GenerationOptions
    from gptjax.generation.requests import Completion

__all__ = ["Completion", "GenerationOptions", "LanguageModel", "UserError", "load"]
__version__ = "0.1.0"

_HOMES = {  # public name: the module that defines it
    "Completion": "gptjax.generation.requests",
    "GenerationOptions": "gptjax.generation.options",
    "LanguageModel": "gptjax.generation.language_model",
    "UserError": "gptjax.config.errors",
}


def load(
    path: str | Path, *, weights: str = "float32", cache_dtype: str = "", mesh: str = ""
) -> LanguageModel:
    """Opens the checkpoint at `path` for generation, scoring and classification.

    Args:
        path: a workdir, a step's folder in it, a Hugging Face folder, a .gguf file, or a name on
            the Hugging Face hub (with the extra `hub`).
        weights: how matrices are stored in memory: "float32", "bfloat16" or "int8" (one scale a
            row). A decoding step takes about as long as reading them.
        cache_dtype: of cached keys and values: "float32", "bfloat16" or "int8"; by default the
            compute dtype.
        mesh: devices that share the work, such as "tensor=4,data=2": `tensor` splits heads, hidden
            units and vocabulary, `data` the texts of a call; -1 takes all that are left. By
            default one device.

    Raises:
        UserError: there is no checkpoint, or it is damaged or of a kind that is not supported; or
            the mesh does not fit.

    Example:
        >>> lm = gptjax.load("runs/fox", weights="int8")
        >>> lm.generate("The quick", max_new_tokens=6).text
        ' brown'
    """
    from gptjax.generation import language_model

    return language_model.load(path, weights=weights, cache_dtype=cache_dtype, mesh=mesh)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gptjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
