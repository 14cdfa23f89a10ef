"""The adapter to lm-evaluation-harness: what needs no peer.

test_harness_parity.py compares its numbers.
"""

import importlib
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, byte_level_tokenizer, tiny_checkpoint
from helpers import CHATML_BY_EXPRESSIONS

from gptjax.config.errors import UserError
from gptjax.generation.language_model import LanguageModel


def test_without_lm_eval_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "gptjax.evaluation.harness", raising=False)
    with pytest.raises(UserError, match=r"pip install 'gptjax\[lm-eval\]'") as caught:
        importlib.import_module("gptjax.evaluation.harness")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'gptjax[lm-eval]'")

    from gptjax.evaluation import harness

    return harness


def handle(template=CHATML_BY_EXPRESSIONS):
    source = tiny_checkpoint(tokenizer=byte_level_tokenizer(template))
    return LanguageModel(source.config, source.params, source.tokenizer, source=source)


def ask(arguments, kind="generate_until"):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arguments, 0)]


WRONG = {
    "no tokens left for a prompt": (dict(max_gen_toks=64), "from 1 to 63"),
    "the default is too long": ({}, "asks for 256 new tokens"),
    "beams": (dict(max_gen_toks=4, num_beams=2), "no setting in generation_kwargs 'num_beams'"),
    "sampling without temperature": (dict(max_gen_toks=4, do_sample=True), "without a temperature"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(harness, name):
    settings, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        harness.GptjaxLM(handle()).generate_until(ask(("the", settings)))


def test_wrong_models_requests_and_tasks(harness):
    lm = handle()
    with pytest.raises(UserError, match="no tokenizer"):
        harness.GptjaxLM(LanguageModel(lm.config, lm.params, None))
    with pytest.raises(UserError, match="from 1 to the model's context, 64"):
        harness.GptjaxLM(lm, max_length=65)
    with pytest.raises(UserError, match="a continuation has 70 tokens"):
        harness.GptjaxLM(lm).loglikelihood(ask(("a", "x" * 70), "loglikelihood"), disable_tqdm=True)
    with pytest.raises(UserError, match="no chat template"):
        harness.GptjaxLM(handle("")).apply_chat_template([{"role": "user", "content": "hi"}])
    with pytest.raises(UserError, match="did you mean 'hellaswag'"):
        harness.evaluate_tasks(lm, "helaswag")


def test_a_pair_whose_token_spans_the_border_has_the_score_of_its_text(harness):
    """The harness's own way of cutting such a pair leaves nothing of the completion."""
    lm = handle()
    pairs = [("x th", "e"), ("x th", "a"), ("x t", "he in"), ("x th ", "the")]
    requests = [ask(pair, "loglikelihood")[0] for pair in pairs]
    scores = harness.GptjaxLM(lm).loglikelihood(requests, disable_tqdm=True)
    assert scores == lm.score([p for p, _ in pairs], [c for _, c in pairs])
    assert all(score < 0 for score, _ in scores)


def test_sampled_texts_depend_on_the_seed_of_their_place_alone(harness):
    requests = ask(("the", dict(max_gen_toks=12, do_sample=True, temperature=1.0))) * 5
    texts = [
        harness.GptjaxLM(handle(), batch_size=rows).generate_until(requests, disable_tqdm=True)
        for rows in (1, 2, "auto")
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) == 5


def test_a_task_runs_without_torch_and_transformers(harness, tmp_path):
    """In a process of its own, where neither can be found."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"the cat {i}"}) + "\n" for i in range(3))
    )
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "local.yaml").write_text(json.dumps(task))  # JSON is YAML
    code = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Finder(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, *rest):\n"
        "        if name.split('.')[0] in ('torch', 'transformers'): return None\n"
        "        return PathFinder.find_spec(name, *rest)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Finder\n"
        "from test_harness import handle\n"
        "from gptjax.evaluation import harness\n"
        f"folder = {str(tmp_path)!r}\n"
        "found = harness.evaluate_tasks(handle(), 'local', include_path=folder, limit=2)\n"
        "score = found['results']['local']['bits_per_byte,none']\n"
        "print(score, found['n-samples']['local']['effective'], 'torch' in sys.modules)\n"
    )
    settings = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/evaluation'}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    bits, documents, torch = done.stdout.split()[-3:]
    assert 1 < float(bits) < 20 and (documents, torch) == ("2", "False")
