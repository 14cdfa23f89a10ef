"""The adapter to lm-evaluation-harness against the harness's own model of transformers (HFLM).

300 requests of each of two checkpoints, and complete tasks.
"""

import json
import os
import random
import warnings

import pytest
from conftest import byte_level_tokenizer, pieces_json
from helpers import CHATML_BY_EXPRESSIONS

import gptjax
from gptjax.tokenizer.pretrained import PretrainedTokenizer

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),
]  # what these three warn of is not ours
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip(
        "torch", reason="torch is not installed: pip install 'gptjax[parity]'"
    )
    T = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'gptjax[parity]'"
    )
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'gptjax[lm-eval]'")
    pytest.importorskip(
        "accelerate",
        reason="accelerate is not installed, which HFLM needs: pip install 'gptjax[parity]'",
    )
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from gptjax.evaluation.harness import GptjaxLM, evaluate_tasks

CONTEXT = 64
torch.set_num_threads(1)  # tiny products: a second thread only waits


def spaced_tokenizer():
    """As Llama 2's: <s> before every text, bytes for what has no piece, a space before a word."""
    words = [
        "\u2581",
        *"etaoinshrdlucmfwygpbvk",
        "\u2581t",
        "th",
        "\u2581th",
        "\u2581the",
        "in",
        "\u2581a",
        "an",
        "\u2581an",
        "\n",
    ]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    content = {
        "tokenizer.json": pieces_json(pieces, [-float(i) for i in range(len(pieces))], kinds, bos=1)
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "unk_token": "<unk>",
        "chat_template": CHATML_BY_EXPRESSIONS,
    }
    return PretrainedTokenizer(
        {**content, "tokenizer_config.json": json.dumps(settings).encode()}, [2]
    )


def checkpoint(name, folder):
    """A random model with a tokenizer that both sides read.

    It often writes its end token and, as a Llama, words after a space.
    """
    tokenizer = (
        byte_level_tokenizer(CHATML_BY_EXPRESSIONS) if name == "gpt2" else spaced_tokenizer()
    )
    size = dict(vocab_size=tokenizer.vocab_size, bos_token_id=None, eos_token_id=tokenizer.eot)
    torch.manual_seed(0)
    if name == "gpt2":
        net = T.GPT2LMHeadModel(
            T.GPT2Config(**size, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4)
        )
    else:
        shape = dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        net = T.LlamaForCausalLM(T.LlamaConfig(**size, **shape, max_position_embeddings=CONTEXT))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else torch.nn.init.normal_(
            p, mean=0.5, std=0.3
        )
    spaced = [
        i
        for i, token in enumerate(tokenizer.token_bytes)
        if token.startswith(b" ") and name == "llama"
    ]
    net.lm_head.weight.data[[tokenizer.eot, *spaced]] *= 1.5
    net.generation_config.repetition_penalty = (
        2.0  # both obey what the checkpoint says, in greedy decoding too
    )
    net.save_pretrained(folder)
    for file, data in tokenizer.files().items():
        (folder / file).write_bytes(data)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint(request.param, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    return GptjaxLM(gptjax.load(folder)), peer


def texts(count, seed, longest=30):
    """Words, spaces at the ends, characters of several bytes, names of control tokens.

    Some exceed the context.
    """
    rng = random.Random(seed)
    kinds = [
        "the",
        "in",
        " a",
        "cat",
        "  ",
        "\n",
        "é",
        "中文",
        "don't",
        " the",
        "<|im_start|>",
        "<s>",
        "</s>",
        "<|endoftext|>",
        "x.",
        "12",
        "\u2581",
    ]
    return [
        "".join(rng.choices(kinds, weights=[6] * 10 + [1] * 7, k=rng.randrange(1, longest)))
        for _ in range(count)
    ]


def instances(kind, arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def assert_close(adapter, peer):
    assert max(abs(a - b) for a, b in zip(adapter, peer, strict=True)) <= 1e-4


def test_special_tokens_and_limits(both):
    adapter, peer = both
    for name in ("eot_token_id", "prefix_token_id", "max_length", "max_gen_toks"):
        assert getattr(adapter, name) == getattr(peer, name), name
    for text in ["", "<s>", "<s> the", "<|endoftext|>the", *texts(300, 4)]:
        for flag in (None, True, False):
            assert adapter.tok_encode(text, add_special_tokens=flag) == peer.tok_encode(
                text, add_special_tokens=flag
            ), text


def test_loglikelihood(both):
    adapter, peer = both
    pairs = list(zip(texts(300, 0), texts(300, 1, longest=12), strict=True))
    pairs += [
        ("", " the cat"),
        ("", "<s>the"),
        ("", "<|endoftext|>the"),
        ("the  ", "cat"),
        ("the \n ", "in"),
        ("<s>the", "in"),
        ("the cat", " " + "in the " * 7),
    ]
    for context in ("the cat", "", "a" * 62, "a" * 63, "a" * 64, "a" * 65, "a" * 200):
        pairs += [(context, " x"), (context, " 12"), (context, " " + "x" * 40), (context, "x" * 62)]
    starts = texts(20, 9, longest=8)
    greedy = peer.generate_until(
        instances(
            "generate_until",
            [(start, dict(max_gen_toks=4, repetition_penalty=1.0)) for start in starts],
        ),
        disable_tqdm=True,
    )
    pairs = [*pairs, *zip(starts, greedy, strict=True)]
    encoded = [peer._encode_pair(*pair) if pair[0] else ([1], [1]) for pair in pairs]
    pairs = [
        pair
        for pair, (context, rest) in zip(pairs, encoded, strict=True)
        if context and 1 <= len(rest) <= CONTEXT
    ][-180:]  # HFLM asserts it
    expected = peer.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    scores = adapter.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert_close([lp for lp, _ in scores], [lp for lp, _ in expected])
    assert [flag for _, flag in scores] == [flag for _, flag in expected]
    assert {flag for _, flag in expected} == {True, False}
    assert sum(len(c) > CONTEXT for c, _ in pairs) > 20


def test_loglikelihood_rolling(both):
    adapter, peer = both
    long_texts = [
        "",
        "<s>the",
        *("a" * n for n in (1, 62, 63, 64, 65, 66, 127, 128, 129, 130, 500)),
        *texts(47, 2, longest=80),
    ]
    requests = instances("loglikelihood_rolling", [(text,) for text in long_texts])
    expected = peer.loglikelihood_rolling(requests, disable_tqdm=True)
    assert_close(adapter.loglikelihood_rolling(requests, disable_tqdm=True), expected)


def test_generate_until(both):
    adapter, peer = both
    start = texts(60, 3, longest=40)
    settings = [
        dict(until=["\n"], max_gen_toks=24),
        dict(until=["e", "th"], max_gen_toks=24, do_sample=False),
        dict(until=[" ", "."], max_gen_toks=16, temperature=0.0),
        dict(until="in", max_gen_toks=32, num_beams=1),
        dict(until=["<|im_end|>", "<|im_start|>", "</s>"], max_new_tokens=24),
        dict(max_gen_toks=48),
        dict(until=[], max_gen_toks=1),
        dict(until=list("aeiou"), max_gen_toks=24, repetition_penalty=1.0),
    ]
    arguments = [(context, settings[i % len(settings)]) for i, context in enumerate(start)]
    arguments += [
        (context, dict(until=[" "], max_gen_toks=8)) for context in texts(30, 5, longest=8)
    ]  # not the space before a Llama's first word
    expected = peer.generate_until(instances("generate_until", arguments), disable_tqdm=True)
    assert (
        adapter.generate_until(instances("generate_until", arguments), disable_tqdm=True)
        == expected
    )
    assert len(set(expected)) > 30
    assert sum(len(adapter.tok_encode(context)) > CONTEXT - 24 for context in start) > 5


def test_chat_templates(both):
    adapter, peer = both
    assert adapter.chat_template(True) == peer.chat_template(True) == CHATML_BY_EXPRESSIONS
    for last in ("the cat", "the cat  ", " <|im_end|>"):
        talk = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": last},
        ]
        for flag in (True, False):
            assert adapter.apply_chat_template(talk, flag) == peer.apply_chat_template(talk, flag)
    for body in (
        "m['content'] | trim",
        "raise_exception('no') if m['role'] == 'system' else m['content']",
    ):
        template = CHATML_BY_EXPRESSIONS.replace("m['content']", f"({body})")
        before = adapter.tokenizer.chat_template, peer.tokenizer.chat_template
        try:
            adapter.tokenizer.chat_template = peer.tokenizer.chat_template = template
            for flag in (True, False):
                assert adapter.apply_chat_template(talk, flag) == peer.apply_chat_template(
                    talk, flag
                )
        finally:
            adapter.tokenizer.chat_template, peer.tokenizer.chat_template = before


def write_tasks(folder):
    rng = random.Random(0)
    words = ["the", "cat", "in", "a", "an", "hat", "thin", "12"]
    rows = [
        {
            "q": " ".join(rng.choices(words, k=rng.randrange(1, 30))),
            "choices": rng.sample(words, 3),
            "gold": rng.randrange(3),
        }
        for _ in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
    }
    cut = {"until": ["\n", "e"], "max_gen_toks": 8, "do_sample": False}
    tasks = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "read": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{q}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "write": {
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "the",
            "generation_kwargs": cut,
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(
            json.dumps({"task": f"local_{name}", **data, **task})
        )  # JSON is YAML
    return [f"local_{name}" for name in tasks]


@pytest.mark.parametrize(
    "options",
    [dict(), dict(num_fewshot=2, limit=10), dict(apply_chat_template=True)],
    ids=["plain", "few shots", "chat"],
)
def test_offline_tasks(both, tmp_path, monkeypatch, options):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        "lm_eval.evaluator.add_env_info", lambda storage: None
    )  # it runs pip and asks for GPUs
    adapter, peer = both
    names = write_tasks(tmp_path)
    manager = TaskManager(
        include_path=str(tmp_path), include_defaults=False
    )  # to index the harness's ten thousand takes long
    expected = lm_eval.simple_evaluate(model=peer, tasks=names, task_manager=manager, **options)
    results = evaluate_tasks(adapter.lm, names, include_path=tmp_path, **options)
    assert results["results"].keys() == expected["results"].keys() == set(names)
    for name in names:
        metrics = {
            key: value
            for key, value in expected["results"][name].items()
            if isinstance(value, float)
        }
        assert len(metrics) >= 2
        for key, value in metrics.items():
            assert results["results"][name][key] == pytest.approx(value, rel=1e-4), (name, key)
    by_name = lm_eval.simple_evaluate(
        model="gptjax",
        model_args={"pretrained": adapter.lm},
        tasks=names[:1],
        task_manager=manager,
        **options,
    )
    assert by_name["results"][names[0]] == results["results"][names[0]]
