"""The sixteen known ways to measure this wrongly (docs/metrics.md), and which tests fail when one is made."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CAUGHT_BY = {
    1: (
        "workloads/test_arrivals.py::test_streams_are_the_same_with_1_and_8_workers_and_in_another_process",
        "workloads/test_arrivals.py::test_poisson_has_dispersion_1",
        "harness/test_mistakes.py::test_mistake_01_dispersion_shows_arrivals_in_step",
    ),
    2: (
        "workloads/test_arrivals.py::test_constant_gaps_are_equal_and_not_random",
        "workloads/test_arrivals.py::test_poisson_is_not_rescaled_to_end_on_the_second",
        "harness/test_mistakes.py::test_mistake_02_constant_arrivals_have_no_dispersion",
    ),
    3: (
        "workloads/test_catalogue.py::test_recorded_times_are_used_and_scaled",
        "workloads/test_catalogue.py::test_mooncake_prompts_have_the_recorded_length_and_share_blocks",
        "workloads/test_tokens.py::test_prompts_from_block_ids_have_exactly_the_input_length",
        "workloads/test_draft.py::test_kin_of_mooncake",
        "harness/test_mistakes.py::test_mistake_03_time_stamps_are_used",
    ),
    4: (
        "workloads/test_tokens.py::test_another_process_with_another_hash_seed_makes_the_same_workload",
        "harness/test_mistakes.py::test_mistake_04_warmup_is_the_same_in_every_process",
    ),
    5: (
        "harness/test_mistakes.py::test_mistake_05_warmup_shares_no_prompt_with_the_measured",
        "harness/test_run.py::test_mistake_05_the_second_run_starts_with_a_cold_cache",
    ),
    6: (
        "harness/test_mistakes.py::test_mistake_06_tpot_leaves_ttft_out",
        "harness/test_mistakes.py::test_mistake_06_itl_is_not_tpot",
        "harness/test_mistakes.py::test_mistake_06_chunks_are_not_tokens_and_give_no_zeros",
        "harness/test_mistakes.py::test_mistake_06_requested_length_never_stands_in",
    ),
    7: (
        "harness/test_mistakes.py::test_mistake_07_the_queue_is_not_hidden",
        "harness/test_mistakes.py::test_mistake_07_a_slow_taker_does_not_shift_the_schedule",
    ),
    8: (
        "harness/test_mistakes.py::test_mistake_08_no_wall_clock_in_intervals",
        "harness/test_mistakes.py::test_mistake_08_a_jump_of_the_wall_clock_changes_nothing",
    ),
    9: (
        "harness/test_mistakes.py::test_mistake_09_closed_loop_warmup_is_handed_over",
        "harness/test_mistakes.py::test_mistake_09_open_loop_warmup_runs_into_the_measured_stream",
        "harness/test_mistakes.py::test_mistake_09_the_ramp_is_outside_the_steady_state",
    ),
    10: (
        "workloads/test_offline.py::test_mistake_10_no_workload_opens_a_connection",
        "reports/page/test_html.py::test_one_file_that_loads_nothing",
        "reports/page/test_html.py::test_script_json_cannot_end_its_element",
    ),
    11: (
        "workloads/test_transform.py::test_spreading_keeps_ticks_order_and_removes_the_bursts",
        "workloads/test_draft.py::test_only_times_on_ticks_are_spread",
        "workloads/test_catalogue.py::test_mooncake_in_both_tick_modes",
    ),
    12: (
        "workloads/readers/test_lengths_readers.py::test_azure_keeps_all_seven_digits",
        "workloads/readers/test_lengths_readers.py::test_azure_fractions_are_exact",
        "workloads/test_packed.py::test_the_bursts_of_azure_code_survive_packing",
    ),
    13: (
        "harness/gate/test_decision.py::test_good_code_does_not_fail_whichever_of_six_metrics_is_unlucky",
        "harness/gate/test_decision.py::test_a_noisy_machine_says_that_it_cannot_tell",
        "harness/gate/test_gate_stored.py::test_a_huge_loss_is_still_no_verdict_but_a_floor_is_one",
    ),
    14: ("harness/gate/test_gate_stored.py::test_another_machine_model_or_workload_is_not_compared",),
    15: (
        "harness/kernels/test_kernel_attention.py::"
        "test_mistake_15_blocks_are_permuted_values_random_and_lengths_unequal",
    ),
    16: (
        "engine/execution/test_graph_key.py::test_mistake_16_every_host_integer_of_a_launch_is_in_the_key",
        "backends/triton/test_triton_attention.py::test_one_graph_serves_every_length",
    ),
}


@pytest.mark.parametrize("mistake", CAUGHT_BY)
def test_what_catches_a_mistake_is_there(mistake: int) -> None:
    for node in CAUGHT_BY[mistake]:
        file, _, name = node.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}, node


def test_every_mistake_of_the_list_is_caught() -> None:
    text = (TESTS.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = text.partition("## Mistakes seen elsewhere")[2].partition("\n## ")[0]
    assert [int(number) for number in re.findall(r"^(\d+)\. ", section, re.M)] == list(CAUGHT_BY)
