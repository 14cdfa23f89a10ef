"""Published runs: what the planner says of them, from their shapes and an MFU.

What goes in: the shape of the model, tokens, devices, and a share of the peak (MFU), which is taken
from another statement than the figure that comes out; where that is not so it is said.
"""

import pytest
from conftest import make_config

from configs import sizes
from gptjax.model.init import count_params
from gptjax.planning.cost import cost
from gptjax.planning.targets import parse
from gptjax.tracking.throughput import flops_per_token

LLAMA = sizes.LLAMA | dict(vocab_size=32000, tie_embeddings=False)


def flops_of_token(shape):
    config = make_config(model=shape)
    return flops_per_token(config, count_params(config.model))


def run(shape, *, tokens, tokens_of_step, target, mfu, price=None):
    target = parse(target)
    return cost(
        flops_per_token=flops_of_token(shape),
        tokens_of_step=tokens_of_step,
        steps=round(tokens / tokens_of_step),
        target=target,
        rate=target.device.peak,
        mfu=mfu,
        price=price,
    )


def test_gpt3_takes_the_flops_of_its_paper():
    """Brown et al. 2020, table D.1: 3.14e23 FLOPs for 300 billion tokens (no attention counted)."""
    assert count_params(make_config(model=sizes.GPT3_175B).model) == pytest.approx(
        174.6e9, rel=2e-3
    )
    assert flops_of_token(sizes.GPT3_175B) * 300e9 == pytest.approx(3.14e23, rel=0.05)


def test_llama_2_7b_takes_the_gpu_hours_of_its_paper():
    """Touvron et al. 2023b, table 2: 184,320 hours of A100-80GB for 2.0 T tokens, T = 4096.

    MFU in: that of LLaMA 65B, 380 tokens/s on each of 2,048 A100-80GB (Touvron et al. 2023a,
    section 2.4), by the same authors.
    """
    llama_65b = LLAMA | dict(layers=80, width=8192, heads=64, mlp_dim=22016, context=2048)
    assert count_params(make_config(model=llama_65b).model) == pytest.approx(65.2e9, rel=0.01)
    a100 = parse("a100-8").device
    mfu = 380 * flops_of_token(llama_65b) / a100.peak
    assert mfu == pytest.approx(0.50, abs=0.01)
    llama_7b = LLAMA | dict(layers=32, width=4096, heads=32, mlp_dim=11008, context=4096)
    assert count_params(make_config(model=llama_7b).model) == pytest.approx(6.74e9, rel=0.01)
    said = run(llama_7b, tokens=2e12, tokens_of_step=4 << 20, target="a100-8x128", mfu=mfu)
    assert said.device_hours == pytest.approx(184_320, rel=0.15)


def test_nanogpt_124m_takes_the_days_of_its_readme():
    """README of karpathy/nanoGPT: about 4 days on 8 A100 of 40 GB, 600,000 steps of 491,520 tokens.

    MFU in: that of 562 ms a step, which a user reports of the same recipe on 8 A100 and its author
    calls good (issue 110 there): a step's time, so what is checked are steps, FLOPs and devices.
    """
    tokens_of_step = 12 * 1024 * 5 * 8
    shape = sizes.GPT2 | dict(bias="none")
    peak = 8 * parse("a100-40gb-8").device.peak
    mfu = flops_of_token(shape) * tokens_of_step / 0.562 / peak
    assert mfu == pytest.approx(0.30, abs=0.01)
    said = run(
        shape,
        tokens=600_000 * tokens_of_step,
        tokens_of_step=tokens_of_step,
        target="a100-40gb-8",
        mfu=mfu,
    )
    assert said.seconds / 86400 == pytest.approx(4, rel=0.15)


def test_nanochat_d20_takes_the_minutes_and_dollars_of_its_reports():
    """Reports of speedrun.sh of karpathy/nanochat, version of autumn 2025, on 8 H100: 560,988,160
    parameters, 3.491758e9 FLOPs a token, 21,400 steps of 524,288 tokens in 171.9 to 172.9 minutes
    (found in its users' report.md). The complete script, with evaluation and fine-tuning, takes 3 h
    51 min; at its 24 USD an hour (README) pretraining is 69 of about 100 USD.

    MFU in: that of the d24 run in the README of 2026-01: 4.330784e19 FLOPs in 10,949.467 s.
    """
    d20 = dict(layers=20, width=1280, heads=10, context=2048, vocab_size=65536, bias="none")
    shape = d20 | dict(positions="rope", mlp="relu", tie_embeddings=False)
    assert count_params(make_config(model=shape).model) == pytest.approx(560_988_160, rel=1e-3)
    assert flops_of_token(shape) == pytest.approx(3.491758e9, rel=1e-3)
    mfu = 4.330784e19 / 10_949.467 / (8 * parse("h100-8").device.peak)
    assert mfu == pytest.approx(0.50, abs=0.01)
    tokens = 21_400 * 524_288
    said = run(shape, tokens=tokens, tokens_of_step=524_288, target="h100-8", mfu=mfu, price=3.0)
    assert said.seconds / 60 == pytest.approx(172.4, rel=0.15)
    assert said.usd == pytest.approx(24 * 172.4 / 60, rel=0.15)
