"""All tables of keys of foreign files, for the reference and for the tests.

To add a type of file, write a `KeyTable` beside the code that reads it and add it here.
"""

from __future__ import annotations

from gptjax.checkpoints import gguf_keys, peft_config
from gptjax.checkpoints.families.common import ROPE_SCALING
from gptjax.checkpoints.generation_config import GENERATION_CONFIG
from gptjax.checkpoints.huggingface import FAMILIES
from gptjax.core.foreign_keys import KeyTable
from gptjax.tokenizer.file_keys import TOKENIZER_TABLES
from gptjax.tokenizer.messages import MESSAGE_KEYS

KEY_TABLES: tuple[KeyTable, ...] = (
    *(family.keys for family in FAMILIES.values()),
    ROPE_SCALING,
    GENERATION_CONFIG,
    *gguf_keys.KEY_TABLES,
    *TOKENIZER_TABLES,
    *peft_config.KEY_TABLES,
    MESSAGE_KEYS,
)
