"""Preference and policy-gradient tuning through the ordinary training loop."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from conftest import byte_level_tokenizer, command, make_config, random_params, tiny_checkpoint

from gptjax import evaluate
from gptjax.checkpoints import formats
from gptjax.config.errors import UserError
from gptjax.data import loader
from gptjax.data.packing import Packed
from gptjax.evaluation import compare as comparison
from gptjax.generation import language_model
from gptjax.model import head, transformer
from gptjax.runtime.mesh import make_mesh
from gptjax.tasks import loading
from gptjax.tasks.grpo import reward_of
from gptjax.tasks.preference import SEGMENTS
from gptjax.tracking.jsonl import read_jsonl
from gptjax.training import objectives, preference_losses, rollouts
from gptjax.training.setup import make_plan, resolve_config


def test_token_logprobs_and_their_gradient_are_those_of_all_logits():
    config = make_config(model=dict(logit_softcap=5.0)).model
    params = random_params(config)
    tokens, targets = (np.random.default_rng(i).integers(0, 257, (2, 16)) for i in (0, 1))

    def chunked(params):
        x, _ = transformer.apply(config, params, tokens)
        return head.token_logprobs(config, params, x, targets, chunk=4)

    def plain(params):
        x, _ = transformer.apply(config, params, tokens)
        return jax.numpy.take_along_axis(
            jax.nn.log_softmax(head.unembed(config, params, x)), targets[..., None], -1
        )[..., 0]

    both = [
        jax.jit(jax.value_and_grad(lambda p, f=f: (f(p) ** 2).sum()))(params)
        for f in (chunked, plain)
    ]
    np.testing.assert_allclose(both[0][0], both[1][0], rtol=1e-5)
    a, b = (gradient for _, gradient in both)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4 * max(1.0, float(np.abs(y).max())))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    formats.write_checkpoint(
        folder / "base",
        tiny_checkpoint(
            "gpt2", vocab=264, tokenizer=byte_level_tokenizer(), keep={"eos_token_id": 263}
        ),
    )
    pairs = [
        {"prompt": f"say {i % 10}", "chosen": "the a", "rejected": "in " + "x" * (i % 3)}
        for i in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    questions = [{"prompt": "ab"[i % 2], "answer": ["upper", "lower"][i % 2]} for i in range(8)]
    (folder / "case.py").write_text(
        "def case(answer, references):\n    return float(getattr(answer, 'is' + references[0])())\n"
    )
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return folder


def flags(place, workdir, data, **changes):
    settings = {
        "data.source": "jsonl",
        "data.path": place / data,
        "data.eval_fraction": 0.25,
        "train.init_from": place / "base",
        "model.context": 64,
        "train.steps": 12,
        "train.batch_size": 4,
        "train.log_every": 1,
        "train.save_every": 6,
        "optim.lr": 0.01,
        "optim.warmup_steps": 1,
        **changes,
    }
    return [
        "gptjax.train",
        "--config=configs/base.py",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


@pytest.mark.parametrize("kind", ["dpo", "ipo", "orpo", "kto"])
def test_the_batch_objective_is_the_formula_on_sums(kind, place, tmp_path):
    """Packed pairs give what the published loss gives on each answer's own log-probability."""
    config = make_config(
        task=dict(name="preference", loss=kind),
        data=dict(source="jsonl", path=str(place / "pairs.jsonl"), eval_fraction=0.0),
        train=dict(init_from="base"),
        model=dict(context=96, vocab_size=264),
    )
    examples = loading.load_examples(config, byte_level_tokenizer()).train[:7]
    split = Packed.of([loading.packed_example(config, e) for e in examples], 96, pack=True)
    values = (
        np.random.default_rng(0)
        .normal(-20, 3, sum(len(e.parts) for e in examples))
        .astype(np.float32)
    )
    split = split.with_reference(values) if kind != "orpo" else split
    params = random_params(config.model)
    batch = loader.stack([split.row(i) for i in range(split.count)])

    @jax.jit
    def objective(batch):
        x, _ = transformer.apply(
            config.model,
            params,
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
        )
        return objectives.compute_loss(config.model, config.task, params, x, batch, chunk=48)

    @jax.jit
    def alone(tokens):
        return jax.nn.log_softmax(
            head.unembed(config.model, params, transformer.apply(config.model, params, tokens)[0])
        )[0]

    total, weight, right = objective(batch)
    assert weight == len(examples)

    group, at, rows = SEGMENTS[kind], 0, []
    for e in examples:
        ends, start = [], 0
        for size in e.parts:
            ids = e.ids[start : start + size]
            logp = np.asarray(alone(np.pad(ids, (0, 96 - size))[None]))
            marks = e.learned[start + 1 : start + size]
            ends.append((logp[np.arange(size - 1), ids[1:]][marks].sum(), marks.sum()))
            start += size
        rows.append((ends, values[at : at + group]))
        at += group
    sums, lengths = (np.array([[end[k] for end in ends] for ends, _ in rows]).T for k in (0, 1))
    reference = np.array([r for _, r in rows]).T
    beta = config.task.beta
    if kind == "orpo":
        expected, diagnostics = preference_losses.orpo(
            sums[0] / lengths[0], sums[1] / lengths[1], nll=-sums[0] / lengths[0], weight=beta
        )
        hits = diagnostics["accuracy"].sum()
    elif kind == "kto":
        kl = (sums[2] - reference[2]).mean()
        both = [
            preference_losses.kto(
                sums[i], reference[i], desirable=np.full(len(rows), i == 0), kl=kl, beta=beta
            )
            for i in (0, 1)
        ]
        expected, hits = both[0][0] + both[1][0], sum(b[1]["accuracy"].sum() for b in both) / 2
    else:
        function = {"dpo": preference_losses.dpo, "ipo": preference_losses.ipo}[kind]
        expected, diagnostics = function(
            sums[0],
            sums[1],
            reference_chosen=reference[0],
            reference_rejected=reference[1],
            beta=beta,
        )
        hits = diagnostics["accuracy"].sum()
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-4)
    np.testing.assert_allclose(right, hits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["dpo", "kto"]
)  # orpo differs in its formula alone, which is above
def test_preferences_are_learned_from_the_reference_on(kind, place):
    run = place / f"run-{kind}"
    run.mkdir()  # with what a run that was given up before its first checkpoint may have left
    np.save(run / "reference-train.npy", np.full({"dpo": 36, "kto": 54}[kind], -1.0, np.float32))
    command(
        *flags(
            place,
            run,
            "pairs.jsonl",
            **{
                "task.name": "preference",
                "task.loss": kind,
                "lora.rank": 2 if kind == "dpo" else 0,
                "train.steps": 30,
            },
        )
    )
    records = read_jsonl(run / "metrics.jsonl")
    losses = [r["train/loss"] for r in records if "train/loss" in r]
    if kind == "dpo":
        assert losses[0] == pytest.approx(
            np.log(2), abs=1e-4
        )  # policy and reference are one at first
    assert (
        losses[-1] < 0.8 * losses[0]
        and [r for r in records if "answers/accuracy" in r][-1]["answers/accuracy"] == 1.0
    )
    assert (run / "reference-train.npy").exists()
    if kind == "dpo":
        config = evaluate.task_config(str(run))
        assert comparison.compare(config, [str(run)])[0].scores["accuracy"].value == 1.0


@pytest.mark.slow
def test_rewards_rise_and_a_resumed_run_writes_the_same_answers(place):
    grpo = {
        "task.name": "grpo",
        "task.num_generations": 8,
        "task.max_new_tokens": 1,
        "train.batch_size": 32,
        "task.reward": f"{place}/case.py:case",
        "optim.lr": 0.01,
        "optim.weight_decay": 0,
    }
    grpo |= {"train.steps": 60, "train.save_every": 30, "task.eval_samples": 2}
    grpo["data.overlap"] = "keep"  # two questions, again and again
    command(*flags(place, place / "grpo", "questions.jsonl", **grpo))
    rewards = [
        r["train/reward"]
        for r in read_jsonl(place / "grpo" / "metrics.jsonl")
        if "train/reward" in r
    ]
    assert np.mean(rewards[:3]) < 0.2 and np.mean(rewards[-5:]) > 0.9
    command(*flags(place, place / "stopped", "questions.jsonl", **grpo, **{"train.stop_at": 30}))
    command(*flags(place, place / "stopped", "questions.jsonl", **grpo))
    assert [
        r["train/reward"]
        for r in read_jsonl(place / "stopped" / "metrics.jsonl")
        if "train/reward" in r
    ] == rewards
    lm = language_model.load(place / "grpo")
    assert (
        lm.generate("a", max_new_tokens=1).text.isupper()
        and lm.generate("b", max_new_tokens=1).text.islower()
    )


def test_the_end_that_was_sampled_is_the_one_credited(place):
    """Every token of this vocabulary but two ends an answer."""
    from gptjax.tokenizer.pretrained import PretrainedTokenizer

    plain = byte_level_tokenizer()
    tokenizer = PretrainedTokenizer(plain.files(), [263, *range(2, 262)])
    task = dict(name="grpo", num_generations=8, max_new_tokens=4, reward="contains")
    config = make_config(
        task=task,
        train=dict(init_from="x", batch_size=16),
        model=dict(context=32, vocab_size=264),
        data=dict(source="jsonl", path=str(place / "questions.jsonl")),
    )
    mesh = make_mesh(config, jax.devices()[:1])
    run = types.SimpleNamespace(
        config=config,
        plan=make_plan(config, mesh),
        data=loading.load_examples(config, tokenizer),
        tokenizer=tokenizer,
        mesh=mesh,
    )
    with jax.set_mesh(run.mesh):
        batch, _ = rollouts.Rollouts(run, {}).next(0, random_params(config.model))
    targets, weights = np.asarray(batch.targets), np.asarray(batch.loss_weights)
    last = {
        int(row[np.flatnonzero(weight)[-1]]) for row, weight in zip(targets, weights, strict=True)
    }
    assert len(last) > 4


def test_an_epoch_of_rewards_asks_every_prompt_once(place):
    config = make_config(
        task=dict(name="grpo", num_generations=8, max_new_tokens=1),
        train=dict(init_from="x", batch_size=16, epochs=3.0),
        optim=dict(warmup_steps=2),
        model=dict(context=64, vocab_size=264),
        data=dict(source="jsonl", path=str(place / "questions.jsonl"), eval_fraction=0.0),
    )
    data = loading.load_examples(config, byte_level_tokenizer())
    assert len(data.train) == 8 and resolve_config(config, data).train.steps == 3 * 8 * 8 // 16
    short = dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_steps=50))
    with pytest.raises(UserError, match=r"exceeds the 12 steps of train.epochs = 3"):
        resolve_config(short, data)


def test_what_cannot_be_tuned_is_said(place, tmp_path):
    (tmp_path / "mine.py").write_text("def good(answer, references):\n    return len(answer)\n")
    config = make_config(task=dict(reward=f"{tmp_path}/mine.py:good"))
    assert reward_of(config.task)("abc", []) == 3
    for reward, message in (
        ("exat", "did you mean 'exact'"),
        (f"{tmp_path}/none.py:good", "no Python file"),
        (f"{tmp_path}/mine.py:bad", "defines no function 'bad'"),
    ):
        with pytest.raises(UserError, match=message):
            reward_of(make_config(task=dict(reward=reward)).task)
    for changes, message in (
        (dict(task=dict(name="preference")), "name its checkpoint in train.init_from"),
        (
            dict(task=dict(name="grpo", num_generations=3), train=dict(init_from="x")),
            "task.num_generations = 3 does not divide",
        ),
        (
            dict(task=dict(name="grpo", kl_coef=0.1), train=dict(init_from="x")),
            "set lora.rank, or task.kl_coef = 0",
        ),
        (
            dict(
                task=dict(name="preference", loss="kto"),
                train=dict(init_from="x", grad_accum_steps=2),
            ),
            "changes KTO's loss",
        ),
        (dict(task=dict(name="regression", method="text")), "a number needs the head"),
        (dict(lora=dict(rank=2, targets=[]), train=dict(init_from="x")), "lora.targets is empty"),
    ):
        with pytest.raises(UserError, match=message):
            make_config(data=dict(source="jsonl", path="x"), **changes)
    (tmp_path / "wrong.py").write_text(
        "def raises(answer, references):\n    return references[0]\n"
        "def nan(answer, references):\n    return float('nan')\n"
    )
    with pytest.raises(UserError, match=r"failed on the answer 'ab': IndexError"):
        reward_of(make_config(task=dict(reward=f"{tmp_path}/wrong.py:raises")).task)("ab", [])
    with pytest.raises(UserError, match=r"gave nan for the answer 'ab'"):
        reward_of(make_config(task=dict(reward=f"{tmp_path}/wrong.py:nan")).task)("ab", [])
    (tmp_path / "broken.py").write_text("def (:\n")
    with pytest.raises(UserError, match=r"broken.py cannot be run: SyntaxError"):
        reward_of(make_config(task=dict(reward=f"{tmp_path}/broken.py:f")).task)
    rows = [{"prompt": "a", "chosen": "same", "rejected": "same"}]
    (tmp_path / "same.jsonl").write_text(json.dumps(rows[0]) + "\n")
    same = make_config(
        task=dict(name="preference"),
        data=dict(source="jsonl", path=str(tmp_path / "same.jsonl"), eval_fraction=0.0),
        train=dict(init_from="x"),
        model=dict(context=64, vocab_size=264),
    )
    with pytest.raises(
        UserError, match=r"same.jsonl:1: the chosen and the rejected answer are the same"
    ):
        loading.load_examples(same, byte_level_tokenizer())
