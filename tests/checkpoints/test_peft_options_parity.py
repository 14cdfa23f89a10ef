"""Every documented option of a PEFT adapter: PEFT's logits, or a refusal that names the option."""

import numpy as np
import pytest

import gptjax
from gptjax.config.errors import UserError

# warnings of these libraries are not about this package
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'gptjax[parity]'")
T = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'gptjax[parity]'"
)
P = pytest.importorskip("peft", reason="peft is not installed: pip install 'gptjax[parity]'")

TOKENS = np.random.default_rng(0).integers(0, 60, (2, 12))
LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_config(kind):
    common = {"vocab_size": 60, "initializer_range": 0.3}
    llama = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        **common,
    }
    if kind == "gpt2":
        return T.GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=64, **common)
    if kind == "neox":
        return T.GPTNeoXConfig(**{**llama, "hidden_size": 32})
    tied = kind == "tied llama"
    return T.LlamaConfig(num_key_value_heads=2, tie_word_embeddings=tied, **llama)


def spread_singular_values(net):
    """So that no rounding decides which of them are the largest, as it does for PEFT's own SVD."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                u, s, v = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_(u * (s[0] * 0.85 ** torch.arange(len(s))) @ v)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{kind: folder} of tiny random checkpoints, made when they are first asked for."""
    folders = {}

    def get(kind):
        if kind not in folders:
            torch.manual_seed(0)
            folders[kind] = tmp_path_factory.mktemp("base") / "base"
            net = T.AutoModelForCausalLM.from_config(base_config(kind))
            spread_singular_values(net)
            net.save_pretrained(folders[kind])
        return folders[kind]

    return get


def load(folder):
    return T.AutoModelForCausalLM.from_pretrained(folder)


def logits_of(net):
    with torch.no_grad():
        return net.eval()(torch.tensor(TOKENS)).logits.numpy()


def shake(net):
    """Every trained number away from its start, reproducibly."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                factor = 0.02 if "lora_B" in name or "lora_A" in name else 0.1
                parameter.add_(factor * torch.randn_like(parameter))


def make_adapter(base, folder, settings):
    """An adapter of PEFT in `folder`, trained away from its start; PEFT's logits with it."""
    net = P.get_peft_model(load(base), settings)
    shake(net)
    net.save_pretrained(folder)
    return logits_of(P.PeftModel.from_pretrained(load(base), folder))


LORA = P.tuners.lora.config
# (base, what LoraConfig gets): each reads here as PEFT reads it
SAME = {
    "init true": ("llama", {}),
    "init false": ("gpt2", {"init_lora_weights": False}),
    "init gaussian": ("neox", {"init_lora_weights": "gaussian"}),
    "init eva": ("llama", {"init_lora_weights": "eva"}),
    "init orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "init mica": ("llama", {"init_lora_weights": "mica"}),
    "init pissa": ("llama", {"init_lora_weights": "pissa", "lora_alpha": 8}),
    "init pissa, fan_in_fan_out": ("gpt2", {"init_lora_weights": "pissa", "fan_in_fan_out": True}),
    "init pissa, rslora, patterns": (
        "neox",
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "target_modules": ["query_key_value", "dense"],
            "rank_pattern": {"query_key_value": 3},
            "alpha_pattern": {r"layers\.1\.attention\.query_key_value": 9},
        },
    ),
    "init olora": ("llama", {"init_lora_weights": "olora", "lora_alpha": 3}),
    "init olora of a square Conv1D": (
        "gpt2",
        {"init_lora_weights": "olora", "target_modules": ["attn.c_proj"], "fan_in_fan_out": True},
    ),
    "pissa, dora": ("llama", {"init_lora_weights": "pissa", "use_dora": True}),
    "use_rslora": ("llama", {"use_rslora": True, "lora_alpha": 6}),
    "use_dora on a part of a layer": ("llama", {"use_dora": True}),
    "use_dora on every linear layer": ("gpt2", {"use_dora": True, "target_modules": "all-linear"}),
    "use_dora on some layers": ("llama", {"use_dora": True, "layers_to_transform": 1}),
    "rank_pattern and alpha_pattern": (
        "llama",
        {
            "target_modules": LLAMA_LINEAR,
            "rank_pattern": {r"^model\.layers\.1\..*(q|k)_proj": 3, "down_proj": 1},
            "alpha_pattern": {r"layers\.0\.mlp\.up_proj": 12, "v_proj": 5},
        },
    ),
    "target_modules all-linear": ("llama", {"target_modules": "all-linear"}),
    "target_modules by a regular expression": (
        "llama",
        {"target_modules": r".*\.1\.(self_attn\.(q|o)_proj|mlp\.up_proj)"},
    ),
    "target_modules null": ("llama", {"target_modules": None}),
    "exclude_modules": (
        "llama",
        {"target_modules": LLAMA_LINEAR, "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
    ),
    "layers_to_transform and layers_pattern": (
        "gpt2",
        {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": [0], "layers_pattern": "h"},
    ),
    "modules_to_save of tables": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "modules_to_save of layers": ("llama", {"modules_to_save": ["input_layernorm", "gate_proj"]}),
    "modules_to_save of a kernel beside an adapter": (
        "llama",
        {"target_modules": ["up_proj", "k_proj"], "modules_to_save": ["gate_proj", "v_proj"]},
    ),
    "modules_to_save, tied": ("tied llama", {"modules_to_save": ["embed_tokens"]}),
    "modules_to_save of the head, tied": ("tied llama", {"modules_to_save": ["lm_head"]}),
    "ensure_weight_tying": (
        "tied llama",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "ensure_weight_tying of adapters": (
        "tied llama",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "bias all": ("gpt2", {"bias": "all"}),
    "bias lora_only": ("neox", {"bias": "lora_only"}),
    "lora_bias": ("gpt2", {"lora_bias": True}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings, tied": ("tied llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings with dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "positions": ("gpt2", {"target_modules": ["wpe", "c_fc"]}),
    "the head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "the head with dora and pissa": (
        "llama",
        {"target_modules": ["lm_head"], "use_dora": True, "init_lora_weights": "pissa"},
    ),
    "the head, tied": ("tied llama", {"target_modules": ["lm_head", "q_proj"]}),
    "trainable_token_indices": ("llama", {"trainable_token_indices": [3, 5]}),
    "trainable_token_indices, tied": ("tied llama", {"trainable_token_indices": [3, 5]}),
    "trainable_token_indices of both tables": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [2]}},
    ),
    "velora_config": ("llama", {"velora_config": {"num_groups": 4}}),
    "eva_config": ("llama", {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}}),
    "lora_dropout": ("llama", {"lora_dropout": 0.3}),
}


@pytest.mark.parametrize("case", SAME)
def test_an_option_reads_as_in_peft(tmp_path, bases, case):
    kind, options = SAME[case]
    defaults = {"target_modules": ["q_proj", "v_proj"]}
    if kind != "llama" and kind != "tied llama":
        defaults = {"target_modules": ["c_attn" if kind == "gpt2" else "query_key_value"]}
    base = bases(kind)
    settings = P.LoraConfig(r=2, task_type="CAUSAL_LM", **{**defaults, **options})
    expected = make_adapter(base, tmp_path / "adapter", settings)
    plain = logits_of(load(base))
    lm = gptjax.load(base).with_adapter(tmp_path / "adapter")
    found = lm.logits(TOKENS)
    largest = np.abs(expected).max()
    print(f"{case}: {np.abs(found - expected).max() / largest:.1e}")
    assert np.abs(expected - plain).max() > 1e-3 * largest  # the adapter does something
    np.testing.assert_allclose(found, expected, atol=1e-5 * largest)


@pytest.mark.parametrize("case", ["init pissa", "embeddings, tied", "bias all"])
def test_an_adapted_model_is_saved_with_its_adapter(tmp_path, bases, case):
    kind, options = SAME[case]
    options = {"target_modules": ["c_attn" if kind == "gpt2" else "q_proj"], **options}
    settings = P.LoraConfig(r=2, task_type="CAUSAL_LM", **options)
    expected = make_adapter(bases(kind), tmp_path / "adapter", settings)
    gptjax.load(bases(kind)).with_adapter(tmp_path / "adapter").save(tmp_path / "whole")
    found = logits_of(load(tmp_path / "whole"))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_converted_pissa_adapter_reads_as_in_peft(tmp_path, bases):
    """The way out that a refused initialisation names."""
    base = bases("llama")
    settings = P.LoraConfig(r=2, init_lora_weights="pissa_niter_4", target_modules=["q_proj"])
    net = P.get_peft_model(load(base), settings)
    net.save_pretrained(tmp_path / "initial")
    shake(net)
    net.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    expected = logits_of(P.PeftModel.from_pretrained(load(base), tmp_path / "adapter"))
    found = gptjax.load(base).with_adapter(tmp_path / "adapter").logits(TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_classifier_of_peft_reads_as_there(tmp_path, bases):
    """Its head lies in the adapter's folder; PEFT adds it to modules_to_save by itself."""
    base = bases("llama")
    settings = P.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj", "down_proj"])
    classifier = T.AutoModelForSequenceClassification.from_pretrained
    net = P.get_peft_model(classifier(base, num_labels=3), settings)
    shake(net)
    net.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = net.eval()(torch.tensor(TOKENS[:1])).logits.softmax(-1).numpy()
    lm = gptjax.load(base).with_adapter(tmp_path / "adapter")
    assert lm.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    np.testing.assert_allclose(lm.classify(TOKENS[:1].tolist()), expected, atol=1e-5)
    lm.save(tmp_path / "whole")
    again = gptjax.load(tmp_path / "whole").classify(TOKENS[:1].tolist())
    np.testing.assert_allclose(again, expected, atol=1e-5)


def test_p_tuning_reads_as_in_peft(tmp_path, bases):
    base = bases("llama")
    settings = P.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8
    )
    expected = make_adapter(base, tmp_path / "adapter", settings)[:, 4:]
    lm = gptjax.load(base).with_adapter(tmp_path / "adapter")
    found = lm.logits(np.concatenate([np.zeros((2, 4), int), TOKENS], 1))[:, 4:]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


BD = {"target_modules_bd_b": ["q_proj"], "nblocks": 2}
# {option: what the refusal says}; written by PEFT itself
REFUSED = {
    "init pissa_niter_4": ({"init_lora_weights": "pissa_niter_4"}, '"pissa_niter_4" is not'),
    "init lora_ga": ({"init_lora_weights": "lora_ga"}, 'init_lora_weights = "lora_ga" is not'),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication = "),
    "target_parameters": (
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        "target_parameters = ",
    ),
    "alora_invocation_tokens": ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens = "),
    "use_qalora": ({"use_qalora": True, "qalora_group_size": 4}, "use_qalora = true"),
    "use_bdlora": ({"use_bdlora": BD}, "use_bdlora = "),
    "kasa_config": ({"kasa_config": {}}, "kasa_config = "),
    "monteclora_config": ({"monteclora_config": {}}, "monteclora_config = "),
    "task_type TOKEN_CLS": ({"task_type": "TOKEN_CLS"}, 'task_type = "TOKEN_CLS" is not'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_option_is_refused_by_its_name(tmp_path, bases, case):
    options, message = REFUSED[case]
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    task = options.pop("task_type")
    net = P.get_peft_model(load(bases("llama")), P.LoraConfig(r=2, **options))
    net.peft_config["default"].task_type = task
    net.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError) as error:
        gptjax.load(bases("llama")).with_adapter(tmp_path / "adapter")
    assert message in str(error.value) and "adapter_config.json" in str(error.value)


def test_every_key_and_kind_of_this_peft_is_known(tmp_path, bases):
    """A newer PEFT with further keys or kinds fails here first."""
    import dataclasses

    from gptjax.checkpoints import peft_config

    for table, kind in (
        (peft_config.LORA_KEYS, P.LoraConfig),
        (peft_config.PROMPT_KEYS, P.PromptTuningConfig),
        (peft_config.PROMPT_KEYS, P.PromptEncoderConfig),
    ):
        known = {*table.used, *table.no_effect, *table.refused}
        assert {field.name for field in dataclasses.fields(kind)} <= known
    for kind in P.PeftType:
        if kind.value in ("LORA", "PROMPT_TUNING", "P_TUNING"):
            continue
        with pytest.raises(UserError, match=f'peft_type = "{kind.value}" is not supported'):
            peft_config.check_kind({"peft_type": kind.value}, tmp_path)
