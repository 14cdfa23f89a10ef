"""Devices that are described: what the compilers are told, and what is missing."""

import importlib.util
import os

import pytest

from gptjax.config.errors import UserError
from gptjax.planning import described, targets


@pytest.fixture
def without_compilers(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(("target", "extra"), [("v5e-16", "tpu"), ("h100-8x4", "cuda")])
def test_a_missing_compiler_names_its_extra_in_one_line(without_compilers, target, extra):
    with pytest.raises(UserError) as error:
        described.devices(targets.parse(target))
    assert f"pip install 'gptjax[{extra}]'" in str(error.value)
    assert target in str(error.value) and "\n" not in str(error.value)


def test_devices_that_no_compiler_describes_are_named():
    with pytest.raises(UserError, match="v4-8: no compiler describes a v4"):
        described.devices(targets.parse("v4-8"))


def test_cards_that_are_not_described_name_those_that_are(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError, match=r"v100 .* it has h200, h100, a100"):
        described.devices(targets.parse("v100-8"))


def test_fake_devices_of_a_cpu():
    assert len(described.devices(targets.parse("cpu-4"))) == 4
    with pytest.raises(UserError, match="host_platform_device_count=4096"):
        described.devices(targets.parse("cpu-4096"))


def test_the_process_is_prepared_and_what_the_user_set_stays(monkeypatch):
    for name in (*described._LIBTPU, "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_LOG_DIR", "logs")
    described.prepare(targets.parse("v5e-16"))
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
    assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert os.environ["TPU_LOG_DIR"] == "logs"


def test_a_card_is_described_as_xla_reads_it():
    text = described.target_config(targets.parse("h100-1").device)
    assert "cuda_compute_capability { major: 9 minor: 0 }" in text
    assert "core_count: 132" in text and "shared_memory_per_block_optin: 232448" in text
    assert "memory_bandwidth: 3350000000000" in text and f"memory_size: {80 * 2**30}" in text
    assert text.count("{") == text.count("}")


def test_each_described_card_is_a_target():
    for name, gpu in described.GPUS.items():
        device = targets.parse(f"{name}-1").device
        text = described.target_config(device)
        assert f"device_memory_size: {int(device.memory)}\n" in text
        assert f"memory_bandwidth: {int(device.bandwidth)}\n" in text
        assert gpu.name.startswith(device.kinds)
