"""Reports of compiled steps: on fake CPU devices, and from what other compilers say."""

import json

import jax
import pytest
from conftest import make_config

from gptjax import plan as plan_command
from gptjax.planning import compile, targets
from gptjax.planning.compile import Kernels
from gptjax.runtime.mesh import make_mesh
from gptjax.training.setup import make_plan

GIB = 2**30


def plan_of(**sections):
    config = make_config(train=dict(batch_size=8), mesh=dict(data=1, fsdp=4), **sections)
    return make_plan(config, make_mesh(config, jax.devices()[:4]))


@pytest.fixture(scope="module")
def compiled():
    return compile.report(plan_of(), targets.parse("cpu-4"))


def test_memory_is_that_of_the_compiler_and_the_state_is_written_in_place(compiled):
    memory = compiled.memory
    assert memory.peak == (memory.arguments + memory.outputs - memory.aliased + memory.temporaries)
    assert memory.aliased and memory.temporaries and compiled.fits
    assert memory.arguments >= memory.aliased


def test_traffic_is_by_axis_and_nothing_goes_over_axes_of_one_device(compiled):
    assert set(compiled.sent()) == {("fsdp",)}
    assert compiled.sent()[("fsdp",)] == sum(one.sent for one in compiled.traffic)
    assert compiled.moved()[("fsdp",)] == sum(one.total for one in compiled.traffic)


def test_forms_of_cpus_show_as_barriers(compiled):
    assert compiled.barriers
    reference = plan_of(model=dict(implementation="reference", scan_layers=True))
    assert compile.report(reference, targets.parse("cpu-4")).barriers == 0


def test_the_report_in_words_and_as_json(compiled):
    least = {("fsdp",): compiled.sent()[("fsdp",)] / 2}
    text = compile.format_report(compiled, least)
    assert "cpu-4: fits" in text and "sent over fsdp" in text and ": 2.00x" in text
    assert "no kernel" in text
    written = json.loads(json.dumps(compile.as_json(compiled, least)))
    assert written["fits"] and written["memory"]["peak"] == compiled.memory.peak
    assert written["sent_bytes"] == {"fsdp": compiled.sent()[("fsdp",)]}
    assert written["least_sent_bytes"] == {"fsdp": least["fsdp",]}


def test_the_command_asks_the_compiler_where_it_is_told_to(capsys):
    settings = ["--config=configs/debug.py", "--config.mesh.fsdp=2", "--config.train.batch_size=4"]
    plan_command.main([*settings, "--target=cpu-2", "--compile", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["compiled"]["target"] == "cpu-2" and said["compiled"]["memory"]["peak"]
    assert set(said["compiled"]["sent_bytes"]) == set(said["compiled"]["least_sent_bytes"])


class Refusing:
    """A lowered step whose compiler refuses it."""

    def __init__(self, message):
        self.message = message

    def as_text(self):
        return ""

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


TEMPORARIES = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the \
total memory required for HLO temporaries (20.99G) exceeds available HBM (15.75G). HLO module: step.
See https://openxla.org/xla/errors"""
ALL = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.00G of 15.75G hbm. \
Exceeded hbm capacity by 256.00M."""


@pytest.mark.parametrize(("message", "missing"), [(TEMPORARIES, "5.24"), (ALL, "0.25")])
def test_a_refusal_says_by_how_much(monkeypatch, message, missing):
    monkeypatch.setattr(compile.step, "lower", lambda plan: Refusing(message))
    refused = compile.report(plan_of(), targets.parse("cpu-4"))
    assert not refused.fits and refused.memory is None
    assert refused.missing == pytest.approx(float(missing) * GIB)
    text = compile.format_report(refused)
    assert f"does not fit by {missing} GiB a device (Ran out of memory" in text
    assert "openxla.org" not in text


def test_other_faults_of_a_compiler_are_not_taken_for_a_refusal(monkeypatch):
    monkeypatch.setattr(compile.step, "lower", lambda plan: Refusing("INTERNAL: no such thing"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such thing"):
        compile.report(plan_of(), targets.parse("cpu-4"))


def test_what_a_compiler_does_not_refuse_is_compared_with_the_device():
    """Four devices of a processor share its memory, here less than the toy's step takes."""
    target = targets.parse("cpu-4")
    small = type(target.device)(**vars(target.device) | dict(usable=1000.0))
    report = compile.report(plan_of(), type(target)(**vars(target) | dict(device=small)))
    assert not report.fits and not report.refusal
    assert report.missing == report.memory.peak - 1000 / 4


def test_flash_attention_is_found_forward_and_backward():
    def program(*lines):
        body = "\n".join(f"  %{name} = f32[] custom-call(), {rest}" for name, rest in lines)
        return f"ENTRY %main () -> f32[] {{\n{body}\n}}\n"

    pallas = 'custom_call_target="tpu_custom_call"'
    splash = program(
        ("splash_mha_fwd_segmented_residuals.1", pallas),
        ("splash_mha_dq_segmented_no_residuals.2", pallas),
        ("splash_mha_dkv_segmented_no_residuals.3", pallas),
        ("my_norm.4", pallas),
        ("custom-call.5", 'custom_call_target="ConcatBitcast"'),
    )
    assert compile.attention_kernels(splash) == Kernels(
        ("splash_mha_fwd_segmented_residuals",),
        ("splash_mha_dkv_segmented_no_residuals", "splash_mha_dq_segmented_no_residuals"),
    )
    cudnn = program(
        ("dot.1", 'custom_call_target="__cudnn$fmhaSoftmax"'),
        ("dot.2", 'custom_call_target="__cudnn$fmhaSoftmaxBackward"'),
        ("gemm.3", 'custom_call_target="__cublas$gemm"'),
    )
    assert compile.attention_kernels(cudnn) == Kernels(
        ("__cudnn$fmhaSoftmax",), ("__cudnn$fmhaSoftmaxBackward",)
    )
    assert compile.attention_kernels(program(("a", pallas))) == Kernels((), ())
