"""What a resumed run takes over from its workdir."""

import json

from conftest import make_config

from gptjax.checkpoints import store
from gptjax.checkpoints.workdir import FORMAT
from gptjax.config import schema
from gptjax.tokenizer.trained import SentencePieceTokenizer
from gptjax.training.checkpointing import kept_tokenizer


def test_a_run_goes_on_with_the_tokenizer_that_it_trained(tmp_path):
    config = make_config(data=dict(tokenizer="sentencepiece", tokenizer_vocab=300))
    assert kept_tokenizer(tmp_path, config) is None  # a new run
    kept = SentencePieceTokenizer.train(["text that another version would sample elsewhere"], 300)
    kept.save(tmp_path / "tokenizer")
    meta = tmp_path / "checkpoints" / "4" / "meta" / "metadata"
    meta.parent.mkdir(parents=True)
    meta.write_text(json.dumps({"format": FORMAT, "config": schema.to_dict(config)}))
    store._write_checksums(meta.parent.parent)
    (tmp_path / "checkpoints" / "5" / "meta").mkdir(parents=True)  # a newer one, without content
    assert kept_tokenizer(tmp_path, config).fingerprint == kept.fingerprint
    other = make_config(data=dict(tokenizer="sentencepiece", tokenizer_vocab=301))
    assert kept_tokenizer(tmp_path, other) is None
    assert kept_tokenizer(tmp_path, make_config(data=dict(tokenizer="chars"))) is None
    (tmp_path / "tokenizer" / "sentencepiece.model").write_bytes(b"")
    assert kept_tokenizer(tmp_path, config) is None  # damaged: it is trained again
