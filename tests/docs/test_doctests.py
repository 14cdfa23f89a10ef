"""The examples in the docstrings of the public Python interface run, and each object has one."""

import doctest
import importlib.util
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import ROOT, command, make_config
from helpers import adapters_for

import gptjax
from gptjax.checkpoints import peft
from gptjax.config import schema
from gptjax.model import init as model_init
from gptjax.tokenizer.trained import ByteTokenizer

_spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

SENTENCE = "The quick brown fox jumps over the lazy dog.\n"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with what the examples name: runs/fox and runs/adapter; and the model `lm`."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "fox.txt").write_text(SENTENCE * 60)
    command(
        "gptjax.train",
        "--config=configs/debug.py",
        f"--workdir={folder / 'runs' / 'fox'}",
        "--config.data.source=text",
        f"--config.data.path={folder / 'fox.txt'}",
        "--config.data.eval_fraction=0.1",
        "--config.model.layers=1",
        "--config.optim.lr=0.01",
        "--config.train.steps=60",
        "--config.train.grad_accum_steps=1",
        "--config.train.eval_every=0",
        "--config.train.save_every=0",
        "--config.train.sample_tokens=0",
        "--config.train.trackers=",
    )
    lm = gptjax.load(folder / "runs" / "fox")
    config = make_config(lora=dict(rank=2), train=dict(init_from="runs/fox"))
    config = SimpleNamespace(model=lm.config, lora=config.lora)
    adapters = adapters_for(config, lm.params, scale=1e-3)
    peft.write_adapter(folder / "runs" / "adapter", lm.config, config.lora, adapters, "runs/fox")
    return SimpleNamespace(folder=folder, lm=lm)


@pytest.fixture(scope="module")
def classifier():
    """A model with three classes and random parameters."""
    labels = dict(context=64, vocab_size=257, layers=1, labels=("calm", "glad", "alarm"))
    config = make_config(model=labels).model
    params = jax.tree.map(np.asarray, model_init.init_params(config, jax.random.key(0)))
    return gptjax.LanguageModel(config, params, ByteTokenizer())


@pytest.mark.parametrize("name", reference.PUBLIC)
def test_the_example_runs(name, clone, classifier, monkeypatch):
    monkeypatch.chdir(clone.folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    names = {"gptjax": gptjax, "lm": clone.lm, "classifier": classifier}
    text = reference.find_public(name).__doc__
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert test.examples, f"gptjax.{name} has no example"
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    result = runner.run(test, out=report.append)
    assert not result.failed, "".join(report)


def test_every_public_name_is_in_the_reference():
    assert set(gptjax.__all__) <= set(reference.PUBLIC)
    methods = {n for n in vars(gptjax.LanguageModel) if not n.startswith("_")}
    methods = {n for n in methods if callable(getattr(gptjax.LanguageModel, n))}
    missing = {f"LanguageModel.{n}" for n in methods} - set(reference.PUBLIC)
    assert not missing - {f"LanguageModel.{n}" for n in reference.NOT_SHOWN}


def test_the_pages_are_made():
    settings, commands, foreign, python = (make() for make in reference.PAGES.values())
    for path, _, _ in schema.all_settings():
        assert f'\n| <a id="{path}"></a>`{path}` | ' in settings
    assert "| `--workdir` | folder of the run |" in commands
    assert "config.section" not in commands.partition("## gptjax.train")[2]
    assert "## LanguageModel.generate" in python and "lm.generate(" in python
    assert "| `lora_dropout` | no effect: nothing is dropped at inference |" in foreign
