"""The findings are those of the functions that make them, and the command writes them down."""

import base64
import json
import re

import numpy as np
import pytest
from conftest import make_config
from helpers import adapters_for, tiny_language_model

from gptjax import interpret
from gptjax.checkpoints import peft
from gptjax.config.errors import UserError
from gptjax.interpretability import page, survey, tuned_lens
from gptjax.tokenizer.trained import ByteTokenizer

PROMPT, OTHER = "a cat", "a dog"


@pytest.fixture(scope="module")
def lm():
    return tiny_language_model("llama", layers=1, vocab=257, tokenizer=ByteTokenizer())


@pytest.fixture(scope="module")
def findings(lm):
    return survey.survey(lm, PROMPT, name="toy", corrupted=OTHER)


def odds_of(lm, text):
    logits = lm.logits([lm.encode(text)])[0].astype(np.float64)
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def test_what_the_last_layer_says_is_what_the_model_says(lm, findings):
    odds, words = odds_of(lm, PROMPT), findings["words"]
    assert [words[i] for i in findings["tokens"]] == ["a", "·", "c", "a", "t"]
    assert findings["lens_rows"] == ["embedding", "layer 0"]
    for position, top in enumerate(findings["lenses"]["logit lens"]["top"][-1]):
        assert len(top) == 10
        expected = np.sort(odds[position])[::-1][:10]
        np.testing.assert_allclose([p for _, p in top], expected, atol=1e-4)
    target = findings["target"]
    assert target["token"] == odds[-1].argmax() and target["rank"] == 0
    assert target["p"] == pytest.approx(odds[-1].max(), rel=1e-3)


def test_the_parts_of_a_logit_add_up(findings):
    logit = findings["logit"]
    parts = [value for _, value in logit["rest"]] + logit["attention"] + logit["mlp"]
    assert sum(parts) == pytest.approx(logit["total"], abs=2e-3)


def test_attention_is_packed_a_byte_a_weight(lm, findings):
    pattern = lm.trace(PROMPT)["pattern"]
    data = np.frombuffer(base64.b64decode(findings["attention"]), np.uint8).reshape(1, 4, 15)
    for query in range(5):
        start = query * (query + 1) // 2  # as interpret.js reads it
        row = data[:, :, start : start + query + 1] / 255
        np.testing.assert_allclose(row, pattern[:, :, query, : query + 1], atol=0.5 / 255 + 1e-6)


def test_maps_have_their_heads_and_tokens(findings):
    titles = [spec["title"] for spec in findings["head_maps"]]
    assert titles[:3] == ["Direct effect", "Without the head", "Induction"]
    for spec in [*findings["head_maps"], *findings["patching"]["maps"]]:
        assert np.shape(spec["values"]) == (len(spec["rows"]), len(spec["columns"]))
        assert spec["signed"] == bool(np.min(spec["values"]) < 0)
    residual = np.array(findings["patching"]["maps"][0]["values"])
    # only the last letters differ, and before layer 0 nothing has moved between positions
    np.testing.assert_allclose(residual[:, :2], 0, atol=1e-3)
    assert residual.shape == (1, 5) and np.abs(residual[0, 2:]).min() > 1e-3


def test_another_target_a_tuned_lens_and_another_model(lm):
    second = tiny_language_model("llama", layers=1, vocab=257, tokenizer=ByteTokenizer())
    second.params["final_norm"]["scale"] = 2 * second.params["final_norm"]["scale"]
    lens = tuned_lens.TunedLens(
        np.zeros((1, 32, 32), np.float32), np.zeros((1, 32), np.float32), (), (), ""
    )
    result = survey.survey(
        lm, PROMPT, name="toy", target="xy", other=second, other_name="twice", tuned_lens=lens
    )
    assert result["words"][result["target"]["word"]] == "x" and result["target"]["rank"] > 0
    assert result["lenses"]["tuned lens"] == result["lenses"]["logit lens"]
    assert result["difference"]["single"] == {"final_norm/scale": 1.0}
    assert "final_norm/scale by 100.00%" in dict(page.summary(result))["tensors that moved"]
    assert result["patching"] is None


def test_prompts_of_different_lengths_are_refused(lm):
    with pytest.raises(UserError, match="the prompts have 5 and 6 tokens"):
        survey.survey(lm, PROMPT, name="toy", corrupted="a duck")


def test_numbers_stay_small():
    assert survey.rounded(np.array([[1.23456, -0.000123456], [np.inf, 12345.6]])) == [
        [1.235, -0.0001235],
        [None, 12350.0],
    ]
    pattern = np.broadcast_to(np.tril(np.ones((60, 60))), (30, 9, 60, 60))
    assert len(survey.pack(pattern)) == 4 * -(-30 * 9 * 1830 // 3)


def test_the_command_writes_a_page_and_says_what_it_found(lm, tmp_path, capsys):
    lm.save(tmp_path / "base", form="gptjax")
    config = make_config(lora=dict(rank=2), train=dict(init_from="base"))
    adapters = adapters_for(type(config)(model=lm.config, lora=config.lora), lm.params, scale=0.1)
    peft.write_adapter(tmp_path / "adapter", lm.config, config.lora, adapters, "base")
    (tmp_path / "text.txt").write_text("A cat and a dog, and so on. " * 20)
    flags = [f"--checkpoint={tmp_path / 'base'}", f"--prompt={PROMPT}"]
    lens, out = tmp_path / "lens.npz", tmp_path / "pages" / "page.html"
    more = [f"--lens_text={tmp_path / 'text.txt'}", f"--lens={lens}", f"--out={out}"]
    interpret.main([*flags, *more, f"--against={tmp_path / 'adapter'}"])
    said = capsys.readouterr().out
    assert f"page: {out}" in said and "likeliest next: " in said and "by layer" not in said
    assert re.search(r"tensors that moved: 4 of \d+; blocks/\S+ of layer 0 by \d", said)
    text = out.read_text()
    assert "tuned lens" in text and "Against" in text and lens.is_file()
    interpret.main([*flags, f"--lens={lens}", f"--out={out}", "--json", f"--corrupted={OTHER}"])
    result = json.loads(capsys.readouterr().out)
    assert result["page"] == str(out) and "attention" not in result
    assert result["summary"]["likeliest next"] and result["patching"]["maps"]
    with pytest.raises(UserError, match="--lens_text=FILE fits a lens"):
        interpret.main([*flags, f"--lens={tmp_path / 'none.npz'}"])
