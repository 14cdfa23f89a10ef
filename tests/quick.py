"""The quick tier: `python -m pytest -m quick -n 2`, a minute on two cores, for contributors.

It has fast tests of properties from every folder. `QUICK` names them: a file, and patterns of test
names, or none for all of its tests. `tests/conftest.py` marks them; tests that are slow, need a
peer library or run a notebook stay out whatever a pattern says. To add a test, add a pattern; its
cost is best seen with `--durations=0`. The sum of all is about 60 seconds of one core.
"""

import re

ALL = r".*"
QUICK = {
    "tests/checkpoints/test_pretrained.py": (
        r"test_hugging_face_round_trip_is_exact.*",
        r"test_gguf_round_trip\[(gpt2|llama)\]",
        r"test_broken_.*",
        r"test_typed_text_never_becomes_a_control_token",
    ),
    "tests/checkpoints/test_store.py": (r"test_a_damaged_step_is_never_trained_from\[[0-4]\]",),
    "tests/config/test_build.py": (ALL,),
    "tests/core/test_pages.py": (ALL,),
    "tests/core/test_quick.py": (ALL,),
    "tests/core/test_structure.py": (ALL,),
    "tests/data/test_loader.py": (ALL,),
    "tests/data/test_records.py": (ALL,),
    "tests/data/test_shards.py": (ALL,),
    "tests/data/test_sources.py": (ALL,),
    "tests/evaluation/test_compare.py": (
        r"test_answers_end_at_stop_texts.*",
        r"test_what_training_accepts_is_accepted.*",
    ),
    "tests/evaluation/test_probes.py": (r"test_intervals_.*",),
    "tests/generation/test_conversation.py": (ALL,),
    "tests/generation/test_engine.py": (
        r"test_greedy_is_the_argmax_of_a_full_forward_pass\[gpt2\]",
    ),
    "tests/generation/test_options.py": (ALL,),
    "tests/generation/test_public_api.py": (ALL,),
    "tests/generation/test_requests.py": (ALL,),
    "tests/generation/test_sampling.py": (r"test_warpers_by_hand",),
    "tests/generation/test_scoring.py": (ALL,),
    "tests/interpretability/test_heads.py": (ALL,),
    "tests/metrics/test_metrics.py": (ALL,),
    "tests/model/test_lora.py": (
        r"test_new_adapters_are_the_base_exactly\[llama\]",
        r"test_merged_equals_unmerged\[qwen3-lora\]",
    ),
    "tests/model/test_transformer.py": (
        r"test_no_logit_depends_on_a_later_token\[llama\]",
        r"test_documents_in_one_window_are_isolated\[llama-xla\]",
        r"test_variants_give_the_same_loss_and_gradients\[gpt2-scan\]",
    ),
    "tests/ops/test_cross_entropy.py": (r"test_a_model_by_rows.*\[plain\]",),
    "tests/ops/test_implementations.py": (
        r"test_losses_and_gradients_equal_the_reference\[llama-(cpu|gpu)\]",
    ),
    "tests/planning/test_explain.py": (r"test_(?!the_command_prints).*",),
    "tests/runtime/test_executables.py": (r"test_(?!a_second_process_).*",),
    "tests/serving/test_scheduler.py": (ALL,),
    "tests/tasks/test_loading.py": (
        r"test_(?!packed_examples).*",
        r"test_packed_examples.*\[xla\]",
    ),
    "tests/tasks/test_preview.py": (ALL,),
    "tests/tasks/test_table.py": (ALL,),
    "tests/test_wrong_inputs.py": (ALL,),
    "tests/tokenizer/test_tokenizer.py": (ALL,),
    "tests/tracking/test_trackers.py": (ALL,),
    "tests/training/test_optim.py": (ALL,),
    "tests/training/test_plan.py": (r"test_the_plan_describes_the_arrays_exactly.*",),
    "tests/training/test_preference_losses.py": (r"test_.*formula.*",),
    "tests/training/test_report.py": (ALL,),
    "tests/training/test_step.py": (r"test_micro_batches_equal_one_batch_with_unequal_weights",),
}


def is_quick(item, root):
    """Whether a collected test belongs to the tier."""
    if any(item.get_closest_marker(name) for name in ("slow", "parity", "notebook")):
        return False
    patterns = QUICK.get(item.path.relative_to(root).as_posix(), ())
    return any(re.fullmatch(pattern, item.name) for pattern in patterns)
