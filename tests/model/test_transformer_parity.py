"""Against the libraries people know: transformers' GPT-2 and torch's AdamW. Skipped with a reason
where they are not installed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_config, random_params

from gptjax.model import head, transformer
from gptjax.training import optim

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'gptjax[parity]'")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'gptjax[parity]'"
)


def to_torch(config, params):
    """Our parameters as a transformers GPT-2."""
    c = config
    net = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.context,
            n_embd=c.width,
            n_layer=c.layers,
            n_head=c.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    heads_first = lambda a: np.moveaxis(np.asarray(a), -2, -3).reshape(
        *a.shape[:-3], 3 * c.width
    )  # [..., H, 3, C] -> [..., 3 H C]
    blocks = params["blocks"]
    state = {
        "wte.weight": params["embed"]["tokens"][: c.vocab_size],
        "wpe.weight": params["embed"]["positions"],
    }
    state |= {
        f"ln_f.{ours}": params["final_norm"][name]
        for name, ours in (("scale", "weight"), ("bias", "bias"))
    }
    for i in range(c.layers):
        layer = jax.tree.map(lambda a, i=i: np.asarray(a[i]), blocks)
        for ours, theirs in (("norm1", "ln_1"), ("norm2", "ln_2")):
            state |= {
                f"h.{i}.{theirs}.weight": layer[ours]["scale"],
                f"h.{i}.{theirs}.bias": layer[ours]["bias"],
            }
        state[f"h.{i}.attn.c_attn.weight"] = heads_first(layer["attn"]["qkv"]["kernel"])
        state[f"h.{i}.attn.c_attn.bias"] = heads_first(layer["attn"]["qkv"]["bias"])
        state[f"h.{i}.attn.c_proj.weight"] = layer["attn"]["out"]["kernel"].reshape(
            c.width, c.width
        )
        state[f"h.{i}.attn.c_proj.bias"] = layer["attn"]["out"]["bias"]
        for ours, theirs in (("up", "c_fc"), ("down", "c_proj")):
            state |= {
                f"h.{i}.mlp.{theirs}.weight": layer["mlp"][ours]["kernel"],
                f"h.{i}.mlp.{theirs}.bias": layer["mlp"][ours]["bias"],
            }
    tensors = {f"transformer.{k}": torch.tensor(np.asarray(v)) for k, v in state.items()}
    missing, extra = net.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not extra
    return net.eval()


def test_gpt2_logits_loss_and_gradients():
    config = make_config(model=dict(vocab_size=97, context=24, layers=3)).model
    params = random_params(config)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 24))
    net = to_torch(config, params)
    theirs = net(input_ids=torch.tensor(tokens), labels=torch.tensor(tokens))
    theirs.loss.backward()
    ours, _ = jax.jit(lambda p: transformer.apply(config, p, jnp.asarray(tokens)))(params)
    logits = head.unembed(config, params, ours)
    np.testing.assert_allclose(
        logits, theirs.logits.detach().numpy(), atol=1e-4 * float(jnp.abs(logits).max())
    )

    def loss(params):
        x, _ = transformer.apply(config, params, jnp.asarray(tokens))
        weights = jnp.ones((2, 24)).at[:, -1].set(0.0)
        return (
            head.token_cross_entropy(
                config, params, x, jnp.roll(jnp.asarray(tokens), -1, 1), weights, chunk=8
            )
            / 46
        )

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert float(value) == pytest.approx(theirs.loss.item(), rel=1e-5)
    their_grads = {name: p.grad.numpy() for name, p in net.named_parameters()}
    for i in range(3):
        ours = np.asarray(grads["blocks"]["attn"]["qkv"]["kernel"][i])
        ours = np.moveaxis(ours, -2, -3).reshape(config.width, -1)
        np.testing.assert_allclose(
            ours, their_grads[f"transformer.h.{i}.attn.c_attn.weight"], atol=2e-5
        )
        np.testing.assert_allclose(
            grads["blocks"]["norm1"]["bias"][i],
            their_grads[f"transformer.h.{i}.ln_1.bias"],
            atol=2e-5,
        )
    np.testing.assert_allclose(
        grads["embed"]["tokens"][:97], their_grads["transformer.wte.weight"], atol=2e-5
    )
    np.testing.assert_allclose(
        grads["embed"]["positions"], their_grads["transformer.wpe.weight"], atol=2e-5
    )


def test_adamw_follows_torch():
    config = make_config(
        optim=dict(
            lr=0.01, schedule="constant", warmup_steps=0, weight_decay=0.1, max_grad_norm=1.0
        ),
        train=dict(steps=5),
    )
    params = random_params(config.model)
    tx = optim.make_optimizer(config, params)
    state = tx.init(params)
    leaf = lambda tree: tree["blocks"]["mlp"]["up"]["kernel"]
    decayed = torch.nn.Parameter(torch.tensor(np.asarray(leaf(params))))
    others = [
        torch.nn.Parameter(torch.tensor(np.asarray(p)))
        for p in jax.tree.leaves(params)
        if p is not leaf(params)
    ]
    optimizer = torch.optim.AdamW([decayed], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    generator = np.random.default_rng(1)
    for _ in range(5):
        grads = jax.tree.map(
            lambda p: jnp.asarray(generator.standard_normal(p.shape, np.float32)), params
        )
        decayed.grad = torch.tensor(np.asarray(leaf(grads)))
        for p, g in zip(
            others, [g for g in jax.tree.leaves(grads) if g is not leaf(grads)], strict=True
        ):
            p.grad = torch.tensor(np.asarray(g))
        torch.nn.utils.clip_grad_norm_([decayed, *others], 1.0)
        optimizer.step()
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(leaf(params), decayed.detach().numpy(), atol=1e-5)
