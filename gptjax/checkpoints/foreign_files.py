"""All tables of keys of foreign files, for the reference and for the tests.

To add a type of file, write a `KeyTable` beside the code that reads it and add it here.
"""

from __future__ import annotations

from gptjax.checkpoints import gguf_keys
from gptjax.core.foreign_keys import KeyTable

KEY_TABLES: tuple[KeyTable, ...] = (*gguf_keys.KEY_TABLES,)
