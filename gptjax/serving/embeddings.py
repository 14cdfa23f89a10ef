"""/v1/embeddings: texts to vectors."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.generation import embeddings
from gptjax.serving import fields
from gptjax.serving.completions import list_prompts
from gptjax.serving.served import Served


class Embeddings:
    """One request. Raises ApiError, UserError."""

    def __init__(self, body: Mapping[str, Any], served: Served):
        asked = fields.check(body, fields.EMBEDDINGS)
        adapter = served.adapter(asked.get("model"))
        self._name, self._lm = adapter or served.name, served.engine.models[adapter]
        self._base64 = asked.get("encoding_format") == "base64"
        self.rows: list[list[int]] = []
        for text in list_prompts(asked["input"]):
            ids = served.encode(text, adapter, "input")
            served.room(ids, "input")
            self.rows.append(ids)

    def embed(self, index: int) -> np.ndarray:
        """float32 [D] of one text, on the device."""
        return embeddings.embed_row(self._lm._model, self.rows[index])

    def response(self, vectors: list[np.ndarray]) -> dict[str, Any]:
        data = []
        for index, vector in enumerate(vectors):
            shown: Any = vector.tolist()
            if self._base64:
                shown = base64.b64encode(vector.astype("<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": shown})
        tokens = sum(map(len, self.rows))
        return {
            "object": "list",
            "data": data,
            "model": self._name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
