"""Adapters: they start as nothing, merge into kernels, train alone, and survive their files."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, byte_level_tokenizer, make_config, random_params, tiny_checkpoint
from helpers import adapter_config, adapters_for, batch_for

from gptjax.checkpoints import formats, peft, pretrained, safetensors, store
from gptjax.config.errors import UserError
from gptjax.config.schema import LoraConfig
from gptjax.core import tree
from gptjax.generation import language_model
from gptjax.generation.language_model import LanguageModel
from gptjax.model import head, lora, transformer
from gptjax.runtime import sharding
from gptjax.runtime.mesh import make_mesh
from gptjax.tokenizer import chat_template
from gptjax.training import setup
from gptjax.training import state as train_state
from gptjax.training import step as train_step

TOKENS = np.arange(20)[None] % 250


def logits(config, params):
    x, _ = transformer.apply(config.model, params, jnp.asarray(TOKENS))
    return np.asarray(head.unembed(config.model, params, x))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_new_adapters_are_the_base_exactly(family):
    config = adapter_config(family, rank=3)
    base = random_params(config.model)
    whole = lora.apply_adapter(
        config.lora, base, lora.init(config.model, config.lora, jax.random.key(0), base)
    )
    np.testing.assert_array_equal(logits(config, whole), logits(config, base))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_merged_equals_unmerged(family, dora):
    config = adapter_config(family, rank=3, alpha=5.0, dora=dora)
    base = random_params(config.model)
    trained = adapters_for(config, base)
    beside, merged = (
        logits(config, lora.apply_adapter(config.lora, base, trained)),
        logits(config, lora.merge(config.lora, base, trained)),
    )
    np.testing.assert_allclose(merged, beside, atol=1e-5 * np.abs(beside).max())
    assert np.abs(beside - logits(config, base)).max() > 1e-2


def test_targets_choose_layers_and_wrong_ones_are_named():
    config = adapter_config("gpt2", rank=2, targets=[".*/attn/qkv"])
    base = random_params(config.model)
    assert set(tree.flatten(lora.init(config.model, config.lora, jax.random.key(0), base))) == {
        f"blocks/attn/qkv/lora_{x}" for x in "ab"
    }
    wrong = dataclasses.replace(config.lora, targets=(".*/atn/.*",))
    with pytest.raises(
        UserError, match=r"'\.\*/atn/\.\*' matches no layer; there are blocks/attn/out"
    ):
        lora.init(config.model, wrong, jax.random.key(0), base)


@pytest.mark.parametrize("kind", ["lora", "dora", "int8", "prompt"])
def test_training_changes_adapters_alone(kind, one_device):
    settings = {
        "lora": dict(rank=2, dropout=0.1),
        "dora": dict(rank=2, dora=True),
        "int8": dict(rank=2, base="int8"),
        "prompt": dict(prompt_tokens=3),
    }
    config = make_config(
        lora=settings[kind],
        train=dict(init_from="base"),
        **(
            {"task": {"name": "text"}, "data": {"source": "jsonl", "path": "x"}}
            if kind == "prompt"
            else {}
        ),
    )
    base = jax.tree.map(np.asarray, random_params(config.model))
    mesh = make_mesh(config, one_device)
    with jax.set_mesh(mesh):
        plan = setup.make_plan(config, mesh)
        state, frozen = train_step.init_state(plan, base)
        start = jax.device_get(state.params)
        before = jax.device_get(frozen)
        step = train_step.make_train_step(plan)
        losses = []
        for _ in range(6):
            state, metrics = step(state, sharding.to_global(mesh, batch_for(config)), frozen)
            losses.append(float(metrics["loss"]))
        assert step._cache_size() == 1
    assert losses[-1] < losses[0] - 1e-3
    assert all(
        np.any(a != np.asarray(b))
        for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(state.params), strict=True)
    )
    assert all(
        np.array_equal(a, np.asarray(b))
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True)
    )
    assert tree.size(state.params) < tree.size(base) / 3 and tree.nbytes(state) < tree.nbytes(base)


def test_adapters_are_equal_on_every_mesh():
    def losses(devices, **mesh):
        config = make_config(
            lora=dict(rank=2),
            train=dict(init_from="base"),
            mesh=mesh,
            model=dict(vocab_multiple=256),
        )
        base = jax.tree.map(np.asarray, random_params(config.model))
        grid = make_mesh(config, devices)
        with jax.set_mesh(grid):
            plan = setup.make_plan(config, grid)
            state, frozen = train_step.init_state(plan, base)
            step, found = train_step.make_train_step(plan), []
            for i in range(3):
                state, metrics = step(state, sharding.to_global(grid, batch_for(config, i)), frozen)
                found.append(float(metrics["loss"]))
        assert step._cache_size() == 1
        return found

    np.testing.assert_allclose(
        losses(jax.devices(), data=2, fsdp=2, tensor=2), losses(jax.devices()[:1]), rtol=1e-5
    )


def test_int8_base_stays_near_the_float_one():
    config = adapter_config("llama", rank=2, base="int8")
    base = random_params(config.model)
    trained = adapters_for(config, base)
    rough = logits(
        config, lora.apply_adapter(config.lora, train_state.prepare_base(config, base), trained)
    )
    exact = logits(config, lora.apply_adapter(config.lora, base, trained))
    assert 0 < np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()
    # the gradient through int8 weights is that of the weights they stand for
    weight = {"rows": jnp.array([[3, -7], [100, 2]], jnp.int8), "row_scale": jnp.array([0.5, 0.01])}
    from gptjax.ops import quantized

    found = jax.grad(lambda x: (quantized.matmul_cpu(x, weight) * jnp.array([[1.0, 2.0]])).sum())(
        jnp.array([[0.3, -0.2]])
    )
    np.testing.assert_allclose(
        found, jnp.array([[1.0, 2.0]]) @ quantized.dequantize(weight), rtol=1e-6
    )


def test_prompts_stand_before_each_segment_and_in_generation():
    """A prompt of embeddings of real tokens is those tokens."""
    config = dataclasses.replace(adapter_config("llama"), lora=LoraConfig(prompt_tokens=3))
    base = random_params(config.model)
    ids = np.array([5, 9, 200])
    prompted = lora.apply_adapter(
        config.lora, base, {"embed": {"prompt": base["embed"]["tokens"][ids]}}
    )
    real, placed = np.array([[*ids, 7, 8, 11]]), np.array([[0, 0, 0, 7, 8, 11]])
    run = lambda params, tokens: np.asarray(
        transformer.apply(config.model, params, jnp.asarray(tokens))[0]
    )
    np.testing.assert_array_equal(run(prompted, placed), run(base, real))
    plain, tuned = (LanguageModel(config.model, p, None) for p in (base, prompted))
    assert (
        tuned.generate([placed[0].tolist()], max_new_tokens=6)[0].tokens
        == plain.generate([real[0].tolist()], max_new_tokens=6)[0].tokens
    )


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_peft_files_come_back(tmp_path, family, dora):
    config = adapter_config(family, rank=3, alpha=5.0, dora=dora)
    base = random_params(config.model)
    trained = adapters_for(config, base)
    peft.write_adapter(tmp_path / "a", config.model, config.lora, trained, "somewhere")
    adapter = peft.read_adapter(tmp_path / "a", config.model, lambda: base)
    settings, found = adapter.settings, adapter.trained
    a, b = (
        logits(config, lora.merge(c, base, p))
        for c, p in ((config.lora, trained), (settings, found))
    )
    np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())
    assert (
        tree.flatten(found).keys() == tree.flatten(trained).keys() and settings.rank == 3
    )  # one A, not one for each part


def test_a_handle_takes_several_adapters(tmp_path):
    base = tiny_checkpoint("llama", vocab=264, tokenizer=byte_level_tokenizer())
    lm = LanguageModel(base.config, base.params, base.tokenizer)
    config = adapter_config("llama", rank=2)
    for k, name in enumerate(("one", "two")):
        peft.write_adapter(
            tmp_path / name,
            config.model,
            config.lora,
            adapters_for(config, base.params, scale=0.1 * (k + 1)),
            "base",
        )
    one, two = (lm.with_adapter(tmp_path / name) for name in ("one", "two"))
    found = [h.generate([[5, 6, 7]], max_new_tokens=8)[0] for h in (lm, one, two)]
    assert len({tuple(c.logprobs) for c in found}) == 3
    adapter = peft.read_adapter(tmp_path / "two", config.model, lambda: base.params)
    settings, trained = adapter.settings, adapter.trained
    merged = LanguageModel(base.config, lora.merge(settings, base.params, trained), base.tokenizer)
    np.testing.assert_allclose(
        two.logits(TOKENS), merged.logits(TOKENS), atol=1e-5 * np.abs(merged.logits(TOKENS)).max()
    )
    assert (
        lm.generate([[5, 6, 7]], max_new_tokens=8)[0].logprobs == found[0].logprobs
    )  # the base is as it was


def test_adapters_need_no_second_reading_of_a_stored_base(tmp_path, monkeypatch):
    base, config = (
        tiny_checkpoint("llama", tokenizer=byte_level_tokenizer()),
        adapter_config("llama", rank=2),
    )
    formats.write_checkpoint(tmp_path / "base", base)
    peft.write_adapter(
        tmp_path / "one", config.model, config.lora, adapters_for(config, base.params), "base"
    )
    lm, read = language_model.load(tmp_path / "base"), []
    monkeypatch.setattr(
        safetensors.LazyParams,
        "params",
        lambda self, params=safetensors.LazyParams.params: (read.append(1), params(self))[1],
    )
    one = lm.with_adapter(tmp_path / "one")
    held = LanguageModel(base.config, base.params, base.tokenizer).with_adapter(tmp_path / "one")
    assert (
        one.generate([[5, 6, 7]], max_new_tokens=8) == held.generate([[5, 6, 7]], max_new_tokens=8)
        and not read
    )
    assert (
        one.params["blocks"]["attn"]["qkv"].keys() == held.params["blocks"]["attn"]["qkv"].keys()
        and read
    )


def test_wrong_adapters_are_refused(tmp_path):
    config = adapter_config("llama", rank=2)
    base = random_params(config.model)
    peft.write_adapter(tmp_path / "a", config.model, config.lora, adapters_for(config, base), "x")
    other = make_config(
        model=dict(vocab_size=264, context=64, **{**FAMILIES["llama"], "mlp_dim": 128})
    ).model
    with pytest.raises(UserError, match="do not fit a layer of"):
        peft.read_adapter(tmp_path / "a", other, lambda: base)
    with pytest.raises(UserError, match="fit no layer of this gpt2 model"):
        peft.read_adapter(tmp_path / "a", adapter_config("gpt2", rank=2).model, lambda: base)
    raw = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
    (tmp_path / "a" / peft.CONFIG).write_text(json.dumps({**raw, "peft_type": "IA3"}))
    with pytest.raises(UserError, match='"IA3"'):
        peft.read_adapter(tmp_path / "a", config.model, lambda: base)
    (tmp_path / "a" / peft.CONFIG).write_text(json.dumps(raw))
    (tmp_path / "a" / peft.WEIGHTS).write_bytes(b"no")
    with pytest.raises(UserError, match="is no PEFT adapter"):
        peft.read_adapter(tmp_path / "a", config.model, lambda: base)


def test_peft_files_of_other_makers(tmp_path):
    """alpha by patterns, DoRA without its magnitudes, a head beside prompt vectors."""
    from safetensors.numpy import load_file, save_file

    config = adapter_config("llama", rank=2, alpha=8.0)
    base = random_params(config.model)
    peft.write_adapter(tmp_path / "a", config.model, config.lora, adapters_for(config, base), "x")
    plain = peft.read_adapter(tmp_path / "a", config.model, lambda: base).trained
    raw = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
    (tmp_path / "a" / peft.CONFIG).write_text(
        json.dumps({**raw, "alpha_pattern": {r"layers\.0\..*down_proj": 32, "up_proj": 16}})
    )
    found = peft.read_adapter(tmp_path / "a", config.model, lambda: base).trained
    ratio = {
        path: array / tree.flatten(plain)[path]
        for path, array in tree.flatten(found).items()
        if path.endswith("lora_b")
    }
    np.testing.assert_allclose(ratio["blocks/mlp/down/lora_b"][0], 4.0, rtol=1e-5)
    np.testing.assert_allclose(ratio["blocks/mlp/down/lora_b"][1], 1.0, rtol=1e-5)
    (tmp_path / "a" / peft.CONFIG).write_text(json.dumps({**raw, "use_dora": True}))
    tensors = load_file(tmp_path / "a" / peft.WEIGHTS)
    tensors |= {
        name.replace("lora_B.weight", "lora_magnitude_vector"): np.ones(len(array), np.float32)
        for name, array in tensors.items()
        if "q_proj.lora_B" in name
    }
    save_file(tensors, tmp_path / "a" / peft.WEIGHTS)
    with pytest.raises(UserError, match=r"use_dora = true and .* has no lora_magnitude_vector"):
        peft.read_adapter(tmp_path / "a", config.model, lambda: base)
    prompts = dataclasses.replace(config.lora, rank=0, prompt_tokens=3)
    classifier = dataclasses.replace(config.model, labels=("a", "b"))
    given = {
        "embed": {"prompt": np.ones((3, 32), np.float32)},
        "score": {"kernel": np.full((2, 32), 2.0, np.float32)},
    }
    peft.write_adapter(tmp_path / "p", classifier, prompts, given, "x")
    adapter = peft.read_adapter(tmp_path / "p", classifier, lambda: base)
    settings, found = adapter.settings, adapter.trained
    assert settings.prompt_tokens == 3 and (found["score"]["kernel"] == 2).all()


def test_tuning_goes_on_from_a_tuned_checkpoint(tmp_path, one_device):
    """A head whose labels agree and prompt vectors are where training starts; a base that has
    changed is refused."""
    task = dict(task=dict(name="classification"), data=dict(source="jsonl", path="x"))
    config = make_config(
        lora=dict(rank=2), train=dict(init_from="base"), model=dict(labels=["a", "b"]), **task
    )
    params = jax.tree.map(np.asarray, random_params(config.model))
    mesh = make_mesh(config, one_device)
    with jax.set_mesh(mesh):
        state, frozen = train_step.init_state(setup.make_plan(config, mesh), params)
        assert (
            np.array_equal(state.params["score"]["kernel"], params["score"]["kernel"])
            and "score" not in frozen
        )
        config = make_config(lora=dict(prompt_tokens=3), train=dict(init_from="base"), **task)
        params = jax.tree.map(np.asarray, random_params(config.model))
        params["embed"]["prompt"] = np.full((3, config.model.width), 0.25, np.float32)
        state, frozen = train_step.init_state(setup.make_plan(config, mesh), params)
        assert (
            np.asarray(state.params["embed"]["prompt"]) == 0.25
        ).all() and "prompt" not in frozen["embed"]
    made = tiny_checkpoint("llama", tokenizer=byte_level_tokenizer())
    made.params["embed"]["prompt"] = np.ones((3, 32), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "read_checkpoint", lambda path: made)
        for adapters in ({}, {"rank": 2}, {"prompt_tokens": 4}):
            wanted = make_config(
                lora=adapters, train=dict(init_from="x"), model=dict(context=64), **task
            )
            with pytest.raises(
                UserError, match=r"has 3 learned prompt tokens: set lora.prompt_tokens = 3"
            ):
                setup.resolve_checkpoint(wanted)


def test_adapters_know_the_weights_they_were_trained_on(tmp_path):
    made = tiny_checkpoint("llama", tokenizer=byte_level_tokenizer())
    formats.write_checkpoint(tmp_path / "base", made)
    config = make_config(
        model=dict(vocab_size=264, context=64, **FAMILIES["llama"]),
        lora=dict(rank=2),
        train=dict(init_from=str(tmp_path / "base")),
    )
    source = pretrained.read_checkpoint(tmp_path / "base")
    trained = adapters_for(config, source.params)
    before = pretrained.params_digest(source.params)
    assert (
        pretrained._with_adapter(config, trained, made.tokenizer, base=before).params.keys()
        == source.params.keys()
    )
    shutil.rmtree(tmp_path / "base")
    changed = jax.tree.map(lambda p: p * 1.01, made.params)
    formats.write_checkpoint(tmp_path / "base", dataclasses.replace(made, params=changed))
    with pytest.raises(UserError, match="trained on other weights than"):
        pretrained._with_adapter(config, trained, made.tokenizer, base=before)


def test_adapters_bring_the_chat_template_they_were_tuned_with(tmp_path):
    made = tiny_checkpoint("llama", tokenizer=byte_level_tokenizer())
    formats.write_checkpoint(tmp_path / "base", made)
    config = make_config(
        model=dict(vocab_size=264, context=64, **FAMILIES["llama"]),
        lora=dict(rank=2),
        train=dict(init_from=str(tmp_path / "base")),
    )
    config, _ = setup.resolve_checkpoint(config)
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = chat_template.plain_template(tokenizer)
    store.write_run(tmp_path / "run", config, adapters_for(config, made.params), tokenizer)
    formats.export_adapters(tmp_path / "run", tmp_path / "peft")
    formats.convert(tmp_path / "run", tmp_path / "hf", form="hf")
    lm = language_model.load(tmp_path / "base")
    handles = [language_model.load(tmp_path / name) for name in ("run", "hf")] + [
        lm.with_adapter(tmp_path / name) for name in ("run", "peft")
    ]
    assert (
        all(handle.tokenizer.chat_template == tokenizer.chat_template for handle in handles)
        and not lm.tokenizer.chat_template
    )
    (tmp_path / "peft" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template.jinja.*UTF-8"):
        lm.with_adapter(tmp_path / "peft")


def test_a_classifier_goes_out_and_in(tmp_path):
    for family in ("gpt2", "llama"):
        made = tiny_checkpoint(family, vocab=264, tokenizer=byte_level_tokenizer())
        config = dataclasses.replace(made.config, labels=("bad", "fine", "good"))
        params = jax.tree.map(np.asarray, random_params(config))
        assert "head" not in params and params["score"]["kernel"].shape == (3, 32)
        formats.write_checkpoint(
            tmp_path / family,
            dataclasses.replace(made, config=config, params=params, keep={"eos_token_id": 5}),
        )
        raw = json.loads((tmp_path / family / "config.json").read_text())
        assert raw["architectures"][0].endswith("ForSequenceClassification") and raw[
            "id2label"
        ] == {"0": "bad", "1": "fine", "2": "good"}
        lm = language_model.load(tmp_path / family)
        assert lm.config.labels == config.labels
        found = lm.classify(["the", "a long text", [1, 2, 3]])
        np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
        one = lm.classify([[1, 2, 3]])
        np.testing.assert_allclose(one[0], found[2], rtol=1e-5)
    with pytest.raises(UserError, match="a classification head"):
        formats.write_checkpoint(
            tmp_path / "x.gguf",
            dataclasses.replace(made, config=config, params=params),
            form="gguf",
        )
    with pytest.raises(UserError, match="has no classes"):
        LanguageModel(made.config, made.params, None).classify([[1]])


def test_settings_that_contradict_are_refused():
    for adapters, message in (
        (dict(lora=dict(rank=2)), "train.init_from"),
        (
            dict(lora=dict(rank=2, dora=True, base="int8"), train=dict(init_from="x")),
            "lora.dora needs",
        ),
        (dict(lora=dict(prompt_tokens=2), train=dict(init_from="x")), "set task.name"),
        (
            dict(task=dict(name="qa"), data=dict(source="text", path="x")),
            "needs records with named fields",
        ),
    ):
        with pytest.raises(UserError, match=message):
            make_config(**adapters)
    assert LoraConfig().on is False
