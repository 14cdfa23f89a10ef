"""Configs: every fault at once, overrides, JSON, shipped files, published sizes."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, make_config

from configs import sizes
from gptjax.config import build, schema
from gptjax.config.build import build_config
from gptjax.config.errors import UserError
from gptjax.model import init as model_init

# a value that is not the default for each setting that had another name
RENAMED_SETTINGS = {
    "model": dict(
        attention="xla",  # the default of that version
        mlp_dim=96,
        positions="rope",
        rope_theta=5e5,
        rotary_fraction=0.5,
        rope_scaling="llama3",
        rope_low_freq_factor=2.0,
        rope_high_freq_factor=8.0,
        sliding_window=7,
        tie_embeddings=False,
        scan_layers=True,
        remat="none",
    ),
    "data": dict(mask_documents=False),
    "task": dict(num_generations=4, kl_coef=0.5, truncation="drop", eval_samples=7),
    "optim": dict(
        min_lr_ratio=0.2,
        decay_fraction=0.3,
        max_grad_norm=2.0,
        muon_lr=0.03,
        layerwise_lr_decay=0.9,
    ),
    "train": dict(grad_accum_steps=2, max_to_keep=3),
}


def test_all_faults_are_reported_together_with_path_value_and_fix():
    with pytest.raises(UserError) as caught:
        build_config(
            {"model": {"widht": 3, "layers": "four", "norm": "layernrom"}, "trian": {"steps": 1}}
        )
    message = str(caught.value)
    for part in (
        "4 faults",
        "model.widht = 3",
        "model.width",
        "model.layers = 'four'",
        "must be int",
        "did you mean 'layernorm'",
        "train",
    ):
        assert part in message
    assert len(message.splitlines()) <= 6


def test_message_stays_short_when_everything_is_wrong():
    with pytest.raises(UserError) as caught:
        build_config({"model": {f"setting{i}": i for i in range(20)}})
    assert len(str(caught.value).splitlines()) <= 6
    assert "more" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"model": {"heads": 3}}, "does not divide model.width"),
        ({"model": {"kv_heads": 3}}, "does not divide model.heads"),
        ({"model": {"positions": "rope", "width": 12, "heads": 4}}, "pick an even number"),
        ({"model": {"dropout": 0.1, "attention": "blockwise"}}, "dropout"),
        ({"train": {"grad_accum_steps": 3}}, "train.grad_accum_steps"),
        ({"optim": {"warmup_steps": 2000}}, "exceeds train.steps"),
        ({"mesh": {"data": -1, "fsdp": -1}}, "only one axis"),
        ({"data": {"source": "text"}}, "data.path"),
        ({"optim": {"lr": float("nan")}}, "finite"),
        ({"train": {"steps": True}}, "must be int"),
    ],
)
def test_faults_that_concern_several_settings(settings, part):
    with pytest.raises(UserError, match=re.escape(part)):
        build_config(settings)


def test_override_reads_numbers_as_people_write_them():
    settings = build.to_config_dict(schema.Config(), locked=False)
    build.override(
        settings,
        {
            "train.steps": "1e3",
            "optim.lr": "3",
            "model.tie_embeddings": "false",
            "optim.freeze": "a.*,b",
        },
    )
    config = build_config(settings)
    assert (
        config.train.steps,
        config.optim.lr,
        config.model.tie_embeddings,
        config.optim.freeze,
    ) == (1000, 3.0, False, ("a.*", "b"))


def test_json_round_trip_and_locked_view():
    config = make_config(optim=dict(freeze=("embed/.*",)))
    assert build.from_json(schema.to_json(config)) == config
    assert json.loads(schema.to_json(config))["optim"]["freeze"] == ["embed/.*"]
    with pytest.raises(AttributeError):
        build.to_config_dict(config).model.widht = 3


def test_an_old_config_json_becomes_the_same_config():
    """old_config.json was written by the version before the renames, with no default among them."""
    text = (Path(__file__).parent / "old_config.json").read_text()
    old = json.loads(text)
    for path in build.RENAMED:
        section, name = path.split(".")
        assert name in old[section]
    assert build.from_json(text) == build_config(RENAMED_SETTINGS)
    defaults = {path: field.default for path, _, field in schema.all_settings()}
    for path, new in build.RENAMED.items():
        section, name = path.split(".")
        assert old[section][name] != defaults[f"{section}.{new}"]


def test_an_unknown_setting_of_an_old_config_json_is_refused_by_name():
    with pytest.raises(UserError, match=r"model.hiden = 3: no such setting"):
        build.from_json('{"model": {"hiden": 3}}')
    with pytest.raises(UserError, match=r"layers = 3: no such section; did you mean model.layers"):
        build.from_json('{"layers": 3}')
    with pytest.raises(UserError, match=r"model.hidden = 3: no such setting"):
        build_config({"model": {"hidden": 3}})  # in a config file there are no old names


def test_changes_name_only_what_shapes_the_run():
    a, b = make_config(), make_config(train=dict(seed=1, log_every=3), mesh=dict(fsdp=2))
    assert build.changes(a, b) == ["train.seed: 0 -> 1"]
    assert len(build.changes(a, b, shaping_only=False)) == 3


@pytest.mark.parametrize(
    "name",
    sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "sizes")),
)
def test_shipped_configs_build(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = build.load_file(f"configs/{name}.py")
    if not settings.data.path:
        build.override(settings, {"data.path": "x"})
    build_config(settings)
    assert len(Path(f"configs/{name}.py").read_text().splitlines()) <= 60


def test_gpt2_parameter_counts():
    counts = [
        model_init.count_params(build_config({"model": shape}).model)
        for shape in (sizes.GPT2, sizes.GPT2_MEDIUM, sizes.GPT2_LARGE, sizes.GPT2_XL)
    ]
    assert counts == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]


def test_other_published_sizes():
    """SmolLM2-135M has 134,515,008 parameters on its hub page.

    GPT-3's are rounded in the paper, and its 1.3B row (24 heads of 128) has more.
    """
    assert model_init.count_params(build_config({"model": sizes.SMOLLM2_135M}).model) == 134_515_008
    for name, billions in {
        "gpt3-1.3b": 1.5,
        "gpt3-2.7b": 2.7,
        "gpt3-6.7b": 6.7,
        "gpt3-13b": 13.0,
        "gpt3-175b": 175.0,
    }.items():
        count = model_init.count_params(build_config({"model": sizes.ALL[name]}).model)
        assert count == pytest.approx(billions * 1e9, rel=0.12), name
