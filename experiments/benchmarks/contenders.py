"""A training step of gptjax and of PyTorch (transformers), on one device and on equal terms.

Same random rows, the mean cross-entropy of every position (float32), micro-batches, AdamW,
gradients clipped at 1.0, no dropout. `step()` may return before the device has done its work, as
it does in a training loop; `wait()` returns afterwards. Nothing is imported before it is needed: a
process that holds one of them has no part of the other.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

# A constant learning rate; biases and scales of norms do not decay.
OPTIM = dict(lr=3e-4, warmup_steps=0, min_lr_ratio=1.0, b1=0.9, b2=0.95, weight_decay=0.1)
OPTIM |= dict(max_grad_norm=1.0)


def random_rows(vocab: int, rows: int, length: int) -> np.ndarray:
    """int32 [rows, length + 1]: tokens and, one place on, their targets."""
    return np.random.default_rng(0).integers(0, vocab, (rows, length + 1)).astype(np.int32)


def torch_config(model: dict[str, Any], *, padded: bool = False) -> dict[str, Any]:
    """config.json of transformers for these settings of `config.model`.

    padded: with the rows that gptjax pads the vocabulary to, whose products are faster.
    """
    from gptjax.checkpoints.huggingface import write_config
    from gptjax.config import build

    config = build.build_config({"model": model}).model
    raw = write_config(config, "float32", {"bos_token_id": None, "eos_token_id": None})
    return raw | ({"vocab_size": config.padded_vocab} if padded else {})


class GptjaxTrainer:
    """sections: of the config (model, train), on the first device that JAX finds."""

    def __init__(self, sections: dict[str, dict[str, Any]]) -> None:
        import jax

        from gptjax.config import build
        from gptjax.core.types import Batch
        from gptjax.runtime import sharding
        from gptjax.runtime.mesh import make_mesh
        from gptjax.training import step as train_step
        from gptjax.training.setup import make_plan

        config = build.build_config({"optim": OPTIM, **sections})
        rows, length = config.train.batch_size, config.length
        ids = random_rows(config.model.vocab_size, rows, length)
        ones = np.ones((rows, length), np.int32)
        batch = Batch(
            tokens=ids[:, :-1],
            targets=ids[:, 1:],
            loss_weights=ones.astype(np.float32),
            segment_ids=ones,
            positions=np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        )
        self._jax = jax
        self.device = jax.devices()[0]
        mesh = make_mesh(config, [self.device])
        with jax.set_mesh(mesh):
            self.plan = make_plan(config, mesh)
            began = time.perf_counter()
            self.compiled = train_step.lower(self.plan).compile()
            self.compile_seconds = time.perf_counter() - began
            self.state, self._frozen = train_step.init_state(self.plan)
            self._batch = sharding.to_global(mesh, batch)
        self._metrics: Any = None

    def step(self) -> None:
        self.state, self._metrics = self.compiled(self.state, self._batch, self._frozen)

    def wait(self) -> None:
        self._jax.block_until_ready((self.state, self._metrics))

    def loss(self) -> float:
        """Of the latest step."""
        return float(self._metrics["loss"])

    def matrix_rate(self, n: int, d: int, f: int) -> float:
        return jax_matrix_rate(n, d, f, self.plan.config.model.dtype)


class TorchTrainer:
    """raw: config.json of transformers. dtype: "bfloat16" is autocast over float32 parameters.

    backend: of torch.compile; "" runs eagerly. attention: a name of transformers; "sdpa_causal" is
    its SDPA without a mask array, which releases of transformers and PyTorch before those of late
    2026 make whenever a model is compiled, and which no flash kernel takes.
    """

    def __init__(
        self,
        raw: dict[str, Any],
        ids: np.ndarray,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        backend: str = "inductor",
        micro_batches: int = 1,
        attention: str = "sdpa",
    ) -> None:
        import torch
        import transformers
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        transformers.AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
        torch.manual_seed(0)
        self._torch, self._device, self._dtype = torch, device, dtype
        config = transformers.AutoConfig.for_model(**raw)
        config.use_cache = False
        with torch.device(device):
            net = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation=attention
            )
        self.net = net.float().train()

        def loss_of(tokens: Any, targets: Any) -> Any:
            logits = self.net(input_ids=tokens).logits
            flat = logits.reshape(-1, logits.shape[-1]).float()
            return torch.nn.functional.cross_entropy(flat, targets.reshape(-1))

        self._loss_of = torch.compile(loss_of, backend=backend) if backend else loss_of
        params = list(self.net.parameters())
        groups = [
            dict(params=[p for p in params if p.ndim > 1], weight_decay=OPTIM["weight_decay"]),
            dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0),
        ]
        betas = (OPTIM["b1"], OPTIM["b2"])
        fused = device == "cuda"
        self._optimizer = torch.optim.AdamW(groups, lr=OPTIM["lr"], betas=betas, fused=fused)
        rows = torch.tensor(ids, dtype=torch.long, device=device)
        self._micro = [
            (part[:, :-1].contiguous(), part[:, 1:].contiguous())
            for part in rows.split(len(ids) // micro_batches)
        ]
        self._loss: Any = None

    def step(self) -> None:
        torch, losses = self._torch, []
        for tokens, targets in self._micro:
            with torch.autocast(self._device, torch.bfloat16, enabled=self._dtype == "bfloat16"):
                loss = self._loss_of(tokens, targets) / len(self._micro)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), OPTIM["max_grad_norm"])
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._loss = sum(losses)

    def wait(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def loss(self) -> float:
        """Of the latest step."""
        return float(self._loss)

    def matrix_rate(self, n: int, d: int, f: int) -> float:
        """On a CPU: FLOP/s of [n, d] x [d, f] in float32, from call to call."""
        torch = self._torch
        a, b = torch.randn(n, d), torch.randn(d, f)
        return _rate(2 * n * d * f, lambda: a @ b)


def jax_matrix_rate(n: int, d: int, f: int, dtype: str, *, at_least: float = 2e10) -> float:
    """FLOP/s of [n, d] x [d, f], from call to call, over `at_least` so many FLOPs."""
    import jax

    keys = jax.random.split(jax.random.key(0))
    a, b = jax.random.normal(keys[0], (n, d), dtype), jax.random.normal(keys[1], (d, f), dtype)
    product = jax.jit(lambda a, b: a @ b)
    return _rate(2 * n * d * f, lambda: product(a, b).block_until_ready(), at_least)


def _rate(flops: int, product: Any, at_least: float = 2e10) -> float:
    """FLOP/s of a product, over as many calls as `at_least` FLOPs take, after a first one."""
    product()
    count = max(3, math.ceil(at_least / flops))
    began = time.perf_counter()
    for _ in range(count):
        product()
    return flops * count / (time.perf_counter() - began)


def jax_read_rate(nbytes: int) -> float:
    """Bytes/s of reading so many by the whole device, the best of three."""
    import jax
    import jax.numpy as jnp

    block = jnp.ones(nbytes // 4, jnp.float32)
    read = jax.jit(jnp.sum)
    read(block).block_until_ready()
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        read(block).block_until_ready()
        best = max(best, block.nbytes / (time.perf_counter() - began))
    return best
