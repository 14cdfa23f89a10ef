"""GPT models in JAX: train, load, generate, convert. `gptjax.load(path)` returns a `LanguageModel`."""

from typing import Any

__version__ = "0.1.0"


def load(path: Any, **options: Any) -> Any:
    """A `LanguageModel` of a workdir, a Hugging Face folder or a GGUF file; see `gptjax.language_model.load`."""
    from gptjax.generation import language_model

    return language_model.load(path, **options)
