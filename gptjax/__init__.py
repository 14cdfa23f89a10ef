"""gptjax: GPT models in JAX, from one command to a trained model."""

__version__ = "0.1.0"
