"""Checkpoints against the libraries that wrote them: logits, gradients, generation, tokenizers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED, byte_level_tokenizer, tiny_checkpoint
from helpers import CHATML_BY_EXPRESSIONS
from tokenizers import Tokenizer, pre_tokenizers

import gptjax
from gptjax.checkpoints import formats, gguf, mapping, pretrained
from gptjax.config.errors import UserError
from gptjax.generation import sampling
from gptjax.generation.sampling import Sampling
from gptjax.model import head, transformer
from gptjax.tokenizer import chat_template
from gptjax.tokenizer.openai import OpenAITokenizer
from gptjax.tokenizer.pretrained import PretrainedTokenizer

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'gptjax[parity]'")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'gptjax[parity]'"
)
T = transformers
SIZE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
GROUPED = dict(**SIZE, num_key_value_heads=2)
# the defaults are outside so small a vocabulary, and padding has no gradient in PyTorch
NO_IDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
ROPE = {
    "llama3": dict(
        rope_type="llama3",
        rope_theta=1e4,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "linear": dict(rope_type="linear", rope_theta=1e4, factor=4.0),
    "yarn": dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16),
    "dynamic": dict(rope_type="dynamic", rope_theta=1e4, factor=4.0),
}
GPT2 = dict(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
MODELS = {
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT2)),
    "gpt2 untied": lambda: T.GPT2LMHeadModel(
        T.GPT2Config(**GPT2, tie_word_embeddings=False, n_inner=48)
    ),
    "pythia": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**SIZE)),
    "neox in sequence": lambda: T.GPTNeoXForCausalLM(
        T.GPTNeoXConfig(**SIZE, use_parallel_residual=False)
    ),
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)),
    "llama biased and tied": lambda: T.LlamaForCausalLM(
        T.LlamaConfig(**GROUPED, attention_bias=True, tie_word_embeddings=True)
    ),
    **{
        f"llama {kind}": lambda rope=rope: T.LlamaForCausalLM(
            T.LlamaConfig(**GROUPED, rope_parameters=rope)
        )
        for kind, rope in ROPE.items()
    },
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**GROUPED, sliding_window=5)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**GROUPED)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**GROUPED, head_dim=16)),
    "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**GROUPED, sliding_window=5, **NO_IDS)),
    "gemma2": lambda: T.Gemma2ForCausalLM(
        T.Gemma2Config(
            **GROUPED,
            **NO_IDS,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=5,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        )
    ),
    "gemma2 without caps": lambda: T.Gemma2ForCausalLM(
        T.Gemma2Config(
            **SIZE,
            **NO_IDS,
            head_dim=16,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            layer_types=["full_attention"] * 2,
        )
    ),
    "phi3 in part": lambda: T.Phi3ForCausalLM(
        T.Phi3Config(**SIZE, partial_rotary_factor=0.5, **NO_IDS)
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 40))


def random_net(name):
    """A random model with every weight away from zeros and ones."""
    torch.manual_seed(0)
    net = MODELS[name]().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else torch.nn.init.normal_(
            p, mean=0.5, std=0.3
        )
    return net


def logits_of(net):
    with torch.no_grad():
        return net(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_both_ways_and_exact_tensors(name, tmp_path):
    net = random_net(name)
    net.save_pretrained(tmp_path / "in")
    expected = logits_of(net)
    lm = gptjax.load(tmp_path / "in")
    np.testing.assert_allclose(lm.logits(TOKENS), expected, atol=1e-4 * np.abs(expected).max())
    lm.save(tmp_path / "out")
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(net)
    before, after = net.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    np.testing.assert_array_equal(logits_of(again), expected)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "phi3", "gemma2"])
def test_gradients_equal_those_of_transformers(name, tmp_path):
    """The maps of a family are linear, so gradients of parameters map as the parameters do."""
    net = random_net(name)
    net.save_pretrained(tmp_path)
    net(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss.backward()
    checkpoint = pretrained.read_checkpoint(tmp_path)
    config = checkpoint.config

    def loss(params):
        x, _ = transformer.apply(config, params, jnp.asarray(TOKENS))
        logits = head.unembed(config, params, x)[:, :-1]
        targets = jnp.asarray(TOKENS)[:, 1:, None]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets, -1).mean()

    grads = jax.grad(loss)(jax.tree.map(jnp.asarray, checkpoint.params))
    for tensor in mapping.from_params(config, grads):
        expected = net.get_parameter(tensor.name).grad.numpy()
        atol = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(tensor.make(), expected, atol=atol, err_msg=tensor.name)


def test_stored_halves_come_back_bit_for_bit(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        net = random_net("llama").to(dtype)
        net.save_pretrained(tmp_path / f"{dtype}")
        formats.convert(tmp_path / f"{dtype}", tmp_path / f"{dtype}_out", form="hf")
        again = T.AutoModelForCausalLM.from_pretrained(
            tmp_path / f"{dtype}_out", dtype="auto"
        ).state_dict()
        assert all(
            torch.equal(v, again[k]) and again[k].dtype == dtype
            for k, v in net.state_dict().items()
        )


EOS = [11, 50, 3, 9]
GENERATE = {
    "greedy": ({}, {}),
    "repetition": (dict(repetition_penalty=1.7), dict(repetition_penalty=1.7)),
    "ngram": (dict(no_repeat_ngram=2), dict(no_repeat_ngram_size=2)),
    "banned": (
        dict(banned=[[5], [7, 8], [60], [33]]),
        dict(bad_words_ids=[[5], [7, 8], [60], [33]]),
    ),
    "stop": (dict(stop_tokens=EOS), dict(eos_token_id=EOS)),
    "least": (
        dict(stop_tokens=list(range(40)), min_new_tokens=6),
        dict(eos_token_id=list(range(40)), min_new_tokens=6),
    ),
    "speculation": (dict(num_speculative_tokens=4), {}),
    "2 beams": (dict(num_beams=2), dict(num_beams=2)),
    "4 long beams": (dict(num_beams=4, length_penalty=2.0), dict(num_beams=4, length_penalty=2.0)),
    "3 early beams": (
        dict(num_beams=3, length_penalty=0.5, early_stopping=True, stop_tokens=EOS),
        dict(num_beams=3, length_penalty=0.5, early_stopping=True, eos_token_id=EOS),
    ),
    "3 late beams": (
        dict(num_beams=3, length_penalty=1.5, early_stopping="never", stop_tokens=EOS),
        dict(num_beams=3, length_penalty=1.5, early_stopping="never", eos_token_id=EOS),
    ),
    "4 short beams": (
        dict(num_beams=4, length_penalty=-0.5, stop_tokens=EOS, no_repeat_ngram=3),
        dict(num_beams=4, length_penalty=-0.5, eos_token_id=EOS, no_repeat_ngram_size=3),
    ),
}


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "mistral", "phi3", "gemma2"])
def test_generation_token_for_token(name, tmp_path):
    """Here as one ragged batch, in transformers row by row."""
    net = random_net(name)
    net.save_pretrained(tmp_path)
    net.generation_config.eos_token_id, net.generation_config.pad_token_id = None, 0
    lm = gptjax.load(tmp_path)
    prompts = [np.random.default_rng(1).integers(0, 97, k).tolist() for k in (3, 9, 1, 17)]
    different = set()
    for case, (options, settings) in GENERATE.items():
        completions = lm.generate(prompts, max_new_tokens=20, **options)
        for prompt, got in zip(prompts, completions, strict=True):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                out = net.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=20,
                    **settings,
                )[0, len(prompt) :].tolist()
            ended = out and out[-1] in settings.get("eos_token_id", [])
            assert got.tokens == (out[:-1] if ended else out), case
            assert got.finish_reason == ("stop" if ended else "length")
            different.add(tuple(out))
    assert len(different) > 12  # the settings matter


def processed(logits, history, **settings):
    request = Sampling(temperature=settings.pop("temperature", 1.0), **settings)
    options = sampling.stack_settings([request] * len(logits), logits.shape[1], [4])
    state = sampling.History(
        tokens=jnp.asarray(history),
        length=jnp.full(len(logits), history.shape[1]),
        prompt_length=jnp.full(len(logits), 3),
    )
    out = sampling.process(
        jnp.asarray(logits), {k: jnp.asarray(v) for k, v in options.items()}, state, request.active
    )
    return torch.softmax(torch.tensor(np.array(out)), -1).numpy()


@pytest.mark.parametrize("shape", ["random", "ties", "flat"])
def test_processors_equal_those_of_transformers(shape):
    rng = np.random.default_rng(0)
    logits = {
        "random": rng.normal(size=(6, 50)) * 3,
        "ties": rng.integers(0, 4, (6, 50)),
        "flat": np.zeros((6, 50)),
    }[shape].astype(np.float32)
    history = rng.integers(0, 50, (6, 12))
    ids, scores = torch.tensor(history), torch.tensor(logits)
    P = T.generation.logits_process
    cases = [
        (dict(temperature=0.7), P.TemperatureLogitsWarper(0.7)),
        (dict(top_k=7), P.TopKLogitsWarper(7)),
        (dict(top_p=0.8), P.TopPLogitsWarper(0.8)),
        (dict(top_p=0.3), P.TopPLogitsWarper(0.3)),
        (dict(min_p=0.1), P.MinPLogitsWarper(0.1)),
        (dict(typical_p=0.6), P.TypicalLogitsWarper(0.6)),
        (dict(repetition_penalty=1.4), P.RepetitionPenaltyLogitsProcessor(1.4)),
        (dict(no_repeat_ngram=2), P.NoRepeatNGramLogitsProcessor(2)),
        (
            dict(banned=[[3], [int(history[0, -1]), 8]]),
            P.NoBadWordsLogitsProcessor([[3], [int(history[0, -1]), 8]]),
        ),
        (dict(logit_bias={5: 2.5}), P.SequenceBiasLogitsProcessor({(5,): 2.5})),
        (dict(min_new_tokens=20), P.MinNewTokensLengthLogitsProcessor(3, 20, torch.tensor([4]))),
    ]
    for settings, processor in cases:
        expected, result = (
            torch.softmax(processor(ids, scores.clone()), -1).numpy(),
            processed(logits, history, **settings),
        )
        if (
            "top_p" in settings and shape != "random"
        ):  # torch.sort is not stable: which of several equals stay is its whim, how many is not
            expected, result = np.sort(expected), np.sort(result)
        np.testing.assert_allclose(result, expected, atol=1e-5, err_msg=str(settings))


def strings(count):
    """Unicode of every kind, runs of white space, and joins of ordinary words."""
    import random

    rng = random.Random(0)
    kinds = [
        lambda: chr(
            rng.choice(
                [
                    rng.randrange(32, 127),
                    rng.randrange(0xA0, 0x2FF),
                    rng.randrange(0x3040, 0x9FFF),
                    rng.randrange(0x1F300, 0x1FAFF),
                ]
            )
        ),
        lambda: rng.choice([" ", "  ", "\n", "\t", "\r\n", "   \n", "\u00a0", "\u3000", "\u200d"]),
        lambda: rng.choice(
            [
                "the",
                "The",
                "don't",
                "I'LL",
                "2024",
                "3.14",
                "naïve",
                "中文",
                "e\u0301",
                "…",
                "<|endoftext|>",
                "<|im_start|>",
                "http://a.b/c?d=1",
                "_x",
                "()",
            ]
        ),
        lambda: chr(rng.randrange(0, 32)),
    ]
    return [
        "".join(
            rng.choices(kinds, weights=[4, 3, 5, 0.3])[0]() for _ in range(rng.randrange(0, 40))
        )
        for _ in range(count)
    ]


def test_tokenizers_equal_their_references(tmp_path):
    texts = strings(2000)
    reference = {}
    tokenizers = {"trained here": byte_level_tokenizer()}
    tokenizers["trained here"].save(tmp_path / "x")
    for name, data in tokenizers["trained here"].files().items():
        (tmp_path / name).write_bytes(data)
    reference["trained here"] = T.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json")
    )
    if SHARED.exists():
        tokenizers["gpt2"] = OpenAITokenizer.find("gpt2", str(SHARED / "gpt2_bpe"))
        exported = formats._hf_tokenizer(tokenizers["gpt2"])
        (tmp_path / "gpt2.json").write_bytes(exported.files()["tokenizer.json"])
        reference["gpt2"] = T.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "gpt2.json"))
        tokenizers["cl100k"] = OpenAITokenizer.find("cl100k", str(SHARED / "openai_ranks"))
        from transformers.convert_slow_tokenizer import TikTokenConverter

        converter = TikTokenConverter(
            vocab_file=str(SHARED / "openai_ranks" / "cl100k_base.tiktoken")
        )
        reference["cl100k"] = T.PreTrainedTokenizerFast(tokenizer_object=converter.converted())
    for name, tokenizer in tokenizers.items():
        encoded = tokenizer.encode_batch(texts)
        for text, ids in zip(texts, encoded, strict=True):
            assert tokenizer.decode(ids) == text, name
            parts = (
                [text] if "<|" not in text else []
            )  # transformers turns typed names of control tokens into them
            for part in parts:
                assert ids.tolist() == reference[name](part, add_special_tokens=False).input_ids, (
                    name,
                    text,
                )


@pytest.mark.slow
def test_smollm2_tokenizer_equals_its_reference():
    """The vocabulary as transformers reads it from the same file.

    It leaves out that this vocabulary cuts digits off first, so it is told.
    """
    from experiments.smollm2 import fetch

    try:
        path = fetch.fetch()
    except UserError as error:
        pytest.skip(str(error))
    reference = T.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    cuts = reference.backend_tokenizer.pre_tokenizer
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), cuts]
    )
    tokenizer = gguf.read_gguf(path).tokenizer
    texts = [text for text in strings(6000) if "<|" not in text][:2000]
    assert len(texts) == 2000
    known = {
        data for data in tokenizer.token_bytes if len(data) == 1
    }  # 21 bytes have no token, six of them control characters: both drop those
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.tolist() == reference(text, add_special_tokens=False).input_ids, text
        assert tokenizer.decode(ids) == text or not all(
            bytes([byte]) in known for byte in text.encode()
        ), text


@pytest.mark.parametrize(
    "content", ["hello", "  spaces \n\n", "in the 中文 é", "{{ not a template }}"]
)
def test_chat_templates_equal_those_of_transformers(content):
    tokenizer = byte_level_tokenizer(CHATML_BY_EXPRESSIONS)
    reference = T.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer.described())),
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
    )
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "ok"},
    ]
    for flag in (True, False):
        expected = reference.apply_chat_template(
            messages,
            chat_template=CHATML_BY_EXPRESSIONS,
            add_generation_prompt=flag,
            return_dict=False,
        )
        assert chat_template.encode(tokenizer, messages, add_generation_prompt=flag) == list(
            expected
        )


def test_an_export_opens_with_its_tokenizer(tmp_path):
    checkpoint = tiny_checkpoint(
        "llama", tokenizer=byte_level_tokenizer(CHATML_BY_EXPRESSIONS), keep={"eos_token_id": 263}
    )
    formats.write_checkpoint(tmp_path / "out", checkpoint)
    tokenizer = T.AutoTokenizer.from_pretrained(tmp_path / "out")
    net = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tokenizer("the cat in").input_ids == checkpoint.tokenizer.encode("the cat in")
    assert tokenizer.chat_template == CHATML_BY_EXPRESSIONS
    assert net.generation_config.eos_token_id == 263
    assert isinstance(checkpoint.tokenizer, PretrainedTokenizer)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
