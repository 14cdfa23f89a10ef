"""Against trl's trainers, whose losses are inner methods: they run on a stand-in for the trainer.

A model returns given numbers. Values and gradients agree, so each example's part does. Skipped with
a reason where trl is missing or has other inner methods.
"""

import collections
import types
import warnings

import jax
import numpy as np
import pytest

from gptjax.training import preference_losses

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'gptjax[parity]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of trl and of what it imports
    for _needed in ("accelerate", "datasets", "trl"):
        trl = pytest.importorskip(
            _needed, reason=f"{_needed} is not installed: pip install trl==1.16.0"
        )
    if not trl.__version__.startswith("1.16."):
        pytest.skip(
            f"trl is {trl.__version__}; these tests call inner methods of trl 1.16",
            allow_module_level=True,
        )
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

N, T = 12, 6


class Output:
    """What a model returns: the log-probabilities asked for, zeros for all that is only logged."""

    def __init__(self, log_probs):
        self.log_probs = log_probs

    def __getattr__(self, name):
        return torch.zeros_like(self.log_probs, dtype=torch.bool if name == "is_top1" else None)


def stand_in(**settings):
    same = lambda x, **_: x
    accelerator = types.SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same
    )
    metrics = {"eval": collections.defaultdict(list)}
    common = dict(
        model=types.SimpleNamespace(training=False),
        accelerator=accelerator,
        _metrics=metrics,
        _total_train_tokens=0,
        aux_loss_enabled=False,
    )
    return types.SimpleNamespace(**common, **settings)


def numbers(count, *shape, scale=20.0, seed=0):
    return (-scale * np.random.default_rng(seed).random((count, *(shape or (N,))))).astype(
        np.float32
    )


def tensor(array):
    return torch.tensor(np.asarray(array), requires_grad=np.asarray(array).dtype == np.float32)


def agree(of_gptjax, of_trl, arrays, tensors):
    """of_gptjax: a function of `arrays`; of_trl: a scalar made of `tensors`."""
    value, slopes = jax.value_and_grad(of_gptjax, argnums=tuple(range(len(arrays))))(*arrays)
    of_trl.backward()
    np.testing.assert_allclose(value, of_trl.item(), rtol=1e-5, atol=1e-5)
    for slope, t in zip(slopes, tensors, strict=True):
        assert np.abs(slope).max() > 1e-4
        np.testing.assert_allclose(slope, t.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(
    ("name", "loss"), [("sigmoid", preference_losses.dpo), ("ipo", preference_losses.ipo)]
)
def test_dpo_and_ipo(name, loss, beta):
    chosen, rejected, reference_chosen, reference_rejected = numbers(4)
    trainer = stand_in(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.ones(2 * N, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]] * (2 * N)),
    }
    inputs |= {
        "ref_chosen_logps": torch.tensor(reference_chosen),
        "ref_rejected_logps": torch.tensor(reference_rejected),
    }
    policy = [tensor(chosen), tensor(rejected)]
    model = lambda **_: Output(torch.cat(policy)[:, None])
    of_trl = DPOTrainer._compute_loss(trainer, model, inputs, False)
    of_gptjax = lambda a, b: loss(
        a, b, reference_chosen=reference_chosen, reference_rejected=reference_rejected, beta=beta
    )[0].mean()
    agree(of_gptjax, of_trl, (chosen, rejected), policy)
    told = loss(
        chosen,
        rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        beta=beta,
    )[1]
    for ours_name, theirs_name in (
        ("reward_chosen", "chosen"),
        ("reward_rejected", "rejected"),
        ("reward_margin", "margins"),
        ("accuracy", "accuracies"),
    ):
        np.testing.assert_allclose(
            told[ours_name].mean(),
            trainer._metrics["eval"][f"rewards/{theirs_name}"][0],
            rtol=1e-5,
            atol=1e-5,
        )


def test_orpo():
    chosen, rejected, nll = numbers(3, scale=3.0)
    policy = [tensor(chosen), tensor(rejected)]
    losses, *_ = ORPOTrainer.odds_ratio_loss(stand_in(beta=0.3), *policy)
    of_gptjax = lambda a, b: (preference_losses.orpo(a, b, nll=nll, weight=0.3)[0] - nll).sum()
    agree(of_gptjax, -losses.sum(), (chosen, rejected), policy)


@pytest.mark.parametrize("shift", [-8.0, 8.0])
def test_kto(shift):
    policy, reference, unmatched, reference_unmatched = numbers(4)
    unmatched += shift  # the KL estimate below 0, and above
    good = np.arange(N) % 3 > 0
    settings = dict(beta=0.2, desirable_weight=1.3, undesirable_weight=0.7)
    trainer = stand_in(
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        _compute_kl_logps=lambda *_: torch.tensor(unmatched),
        **settings,
    )
    inputs = {
        "input_ids": torch.ones(N, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]] * N),
        "label": torch.tensor(good),
    }
    inputs |= {
        "ref_logps": torch.tensor(reference),
        "ref_KL_logps": torch.tensor(reference_unmatched),
    }
    scored = tensor(policy)
    of_trl = KTOTrainer._compute_loss(trainer, lambda **_: Output(scored[:, None]), inputs, False)
    kl = unmatched - reference_unmatched
    assert (kl.mean() > 0) == (shift > 0)
    of_gptjax = lambda p: preference_losses.kto(p, reference, desirable=good, kl=kl, **settings)[
        0
    ].mean()
    agree(of_gptjax, of_trl, (policy,), [scored])


@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
def test_grpo(kl_weight):
    new, old, reference = numbers(3, N, T, scale=2.0)
    mask = np.arange(T) < (1 + np.arange(N) % T)[:, None]
    advantages = np.random.default_rng(1).standard_normal(N).astype(np.float32)
    scored = tensor(new)
    trainer = stand_in(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=kl_weight,
        loss_type="grpo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None),
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            scored,
            torch.zeros_like(scored),
            None,
        ),
    )
    ids = torch.ones(N, T, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": torch.tensor(mask).long(),
    }
    inputs |= {
        "advantages": torch.tensor(advantages),
        "old_per_token_logps": torch.tensor(old),
        "ref_per_token_logps": torch.tensor(reference),
    }
    of_trl = GRPOTrainer._compute_loss(trainer, None, inputs)

    def of_gptjax(new):
        total, weight = preference_losses.grpo(
            new, old, mask=mask, advantages=advantages, reference=reference, kl_weight=kl_weight
        )
        return total / weight

    agree(of_gptjax, of_trl, (new,), [scored])
