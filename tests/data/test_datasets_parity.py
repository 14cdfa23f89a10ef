"""Folders of Hugging Face's datasets, read through the package itself."""

import pytest

from gptjax.config.build import build_config
from gptjax.config.errors import UserError
from gptjax.data import sources

pytestmark = pytest.mark.parity


def open_source(path, **data):
    data = {"source": "datasets", "path": str(path), "eval_fraction": 0.0, **data}
    return sources.open_source(build_config({"data": data}).data)


def test_a_saved_data_set_gives_the_column_of_the_documents(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [b"no text"] * 3, "text": ["a", "b", "c"]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path))
    source = open_source(tmp_path)
    assert list(source.documents("train")) == ["a", "b", "c"]
    assert source.selections["data"].documents == 3
    with pytest.raises(UserError, match=r"row 0: .* 'body' is not there; fields are image, text"):
        open_source(tmp_path, field="body")
