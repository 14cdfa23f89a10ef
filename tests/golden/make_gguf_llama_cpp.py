"""Writes gguf_llama_cpp.json: digests of the ids that llama.cpp gives in each pre-tokenizer.

    pip install llama-cpp-python gguf pytest sentencepiece
    PYTHONPATH=.:tests:tests/checkpoints python tests/golden/make_gguf_llama_cpp.py

Made with llama-cpp-python 0.3.36.
"""

import json
import tempfile
from pathlib import Path

import gguf
import published_kinds
import test_gguf
from llama_cpp import Llama

from gptjax.checkpoints.gguf_pre_tokenizers import PRE_TOKENIZERS

texts = [text for text in published_kinds.strings(200) if "\0" not in text and len(text) < 300]
golden: dict[str, object] = {"texts": texts}
for name in PRE_TOKENIZERS:
    fields = test_gguf.cutting_fields(name, texts)
    path = Path(tempfile.mkdtemp()) / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", 32)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    library = Llama(str(path), vocab_only=True, verbose=False)
    ids = [library.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    golden[name] = test_gguf.digest(ids)
Path(__file__).with_name("gguf_llama_cpp.json").write_text(
    json.dumps(golden, indent=0, ensure_ascii=False) + "\n"
)
