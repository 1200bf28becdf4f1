# SPDX-License-Identifier: Apache-2.0
"""Run tests: Hypothesis profiles, rules of markers, and the `device` fixture of every test.

`conftest.py` loads this plugin in each process that runs tests.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import re
import signal
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from portakv.interconnect import link
from portakv.runtime import cuda
from portakv_conformance import simdev
from support import patch_points, simulated
from support.collecting import NO_GPU, OPT_IN

MANY_MODULES = 100
#: Cases that take a second or more, for .ci/full. Most have a relative in the default run.
LONG = {
    "tests/backends/test_ascend_npu.py::test_which_op_serves[three]",
    "tests/backends/test_ascendc.py::test_a_kernel_that_does_not_compile",
    "tests/backends/test_ascendc.py::test_cmake_builds_and_installs_a_library_that_loads",
    "tests/backends/test_ascendc.py::test_every_byte_lands[memory objects, scattered-Setting(cores=5, ub_bytes=1024, when=1)]",  # noqa: E501
    "tests/backends/test_ascendc.py::test_the_emulation_launches_nothing_by_itself",
    "tests/backends/test_compiled.py::test_integers_stay_variable",
    "tests/backends/test_cuda_kernel.py::test_a_kernel_of_each_width_compiles_to_machine_code",
    "tests/backends/test_cuda_kernel.py::test_compiling_needs_no_cuda_core",
    "tests/backends/test_every_backend.py::test_a_bad_id_moves_nothing_and_is_told[torch.int64-12-direct, loads]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_a_bad_id_moves_nothing_and_is_told[torch.int64-9223372036854775807-hip-emulated]",
    "tests/backends/test_every_backend.py::test_asking_them_loads_no_compiler_and_no_driver",
    "tests/backends/test_every_backend.py::test_bad_blocks_on_either_side[destination-compiled]",
    "tests/backends/test_every_backend.py::test_drawn_copies[8-cuda-on-cpu, two vectors]",
    "tests/backends/test_every_backend.py::test_drawn_copies[8-cuda-on-cpu]",
    "tests/backends/test_every_backend.py::test_drawn_copies[8-direct, loads]",
    "tests/backends/test_every_backend.py::test_drawn_copies[8-direct, stores]",
    "tests/backends/test_every_backend.py::test_every_byte_lands[blocks of heads-direct, loads]",
    "tests/backends/test_every_backend.py::test_every_byte_lands[gather of 12 B rows-direct, loads]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[gather of 3 B rows-cuda-on-cpu]",
    "tests/backends/test_every_backend.py::test_every_byte_lands[gather of 656 B rows-direct, stores]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[layers in one allocation-direct, loads]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[memory objects, blocks-cuda-on-cpu]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[memory objects, blocks-direct, loads]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[memory objects, scattered-compiled]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[more planes than the arguments hold-hip-emulated]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[one element's step by head-cuda-on-cpu]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[one head for all-cuda-on-cpu, two vectors]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[pool to pool-direct, loads]",
    "tests/backends/test_every_backend.py::test_every_byte_lands[rows at an odd address-direct, stores]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[scatter to 12 B rows-direct, loads]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[scatter to 6 B rows-direct, stores]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[scatter to 656 B rows-direct, loads]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[several units of an id-direct, loads]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[slots of an id-direct, loads]",
    "tests/backends/test_every_backend.py::test_every_byte_lands[slots to an id-cuda-on-cpu]",
    "tests/backends/test_every_backend.py::test_every_byte_lands[split tokens-cuda-on-cpu, two vectors]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_every_byte_lands[split tokens-direct, stores]",
    "tests/backends/test_every_backend.py::test_every_byte_lands[tokens in a list-direct, stores]",
    "tests/backends/test_every_backend.py::test_memory_that_is_elsewhere_is_refused[freed-compiled]",
    "tests/backends/test_every_backend.py::test_memory_that_is_elsewhere_is_refused[freed-direct, loads]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_memory_that_is_elsewhere_is_refused[shrunk-compiled]",
    "tests/backends/test_every_backend.py::test_memory_that_is_elsewhere_is_refused[shrunk-direct, stores]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_no_state_of_torch_s_changes_a_copy[two nests within deterministic algorithms-hip-emulated]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_no_state_of_torch_s_changes_a_copy[two nests within inference mode-cuda-on-cpu]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_of_several_bad_ids_the_first_is_reported_and_stays[compiled]",
    "tests/backends/test_every_backend.py::test_offsets_past_two_and_four_gib[torch.int32-compiled]",
    "tests/backends/test_every_backend.py::test_offsets_past_two_and_four_gib[torch.int32-cuda-on-cpu]",
    "tests/backends/test_every_backend.py::test_offsets_past_two_and_four_gib[torch.int32-direct, loads]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_offsets_past_two_and_four_gib[torch.int32-direct, stores]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_offsets_past_two_and_four_gib[torch.int32-hip-emulated]",
    "tests/backends/test_every_backend.py::test_offsets_past_two_and_four_gib[torch.int64-compiled]",
    "tests/backends/test_every_backend.py::test_offsets_past_two_and_four_gib[torch.int64-hip-emulated]",
    "tests/backends/test_every_backend.py::test_strides_past_four_gib_inside_a_unit_and_between_planes[direct, loads]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_strides_past_four_gib_inside_a_unit_and_between_planes[direct, stores]",  # noqa: E501
    "tests/backends/test_every_backend.py::test_strides_past_four_gib_inside_a_unit_and_between_planes[hip-emulated]",
    "tests/backends/test_hip.py::test_an_error_of_the_driver_is_told[hipHostGetDevicePointer-1-Finding the status word: expected success of HIP, got]",  # noqa: E501
    "tests/backends/test_hip.py::test_an_error_of_the_driver_is_told[hipModuleGetFunction-500-Finding the kernel: expected success of HIP, got hipEr]",  # noqa: E501
    "tests/backends/test_hip.py::test_an_error_of_the_driver_is_told[hiprtcGetCode-4-Reading a result of hipRTC failed: HIPRTC_ERROR_INVALID_PROGRAM]",  # noqa: E501
    "tests/backends/test_hip.py::test_an_error_of_the_driver_is_told[hiprtcGetCodeSize-4-Reading the size of a result of hipRTC failed: HIPRTC_ERRO]",  # noqa: E501
    "tests/backends/test_hip_code.py::test_amds_runtime_says_that_there_is_no_device",
    "tests/backends/test_hip_code.py::test_without_the_words_for_amd_the_check_fails[words1-B of LDS]",  # noqa: E501
    "tests/backends/test_mlu.py::test_a_release_that_lacks_something[the transfer of all layers]",
    "tests/backends/test_pack_kernel.py::test_every_byte_is_as_the_format_says[cpu-16x128-4bits-kv block token head dim]",  # noqa: E501
    "tests/backends/test_pack_kernel.py::test_every_byte_is_as_the_format_says[cpu-16x16-3bits-block kv head token dim]",  # noqa: E501
    "tests/backends/test_pack_kernel.py::test_every_byte_is_as_the_format_says[cpu-16x576-3bits-block token dim]",  # noqa: E501
    "tests/backends/test_pack_kernel.py::test_every_byte_of_the_text_for_amd[16x128-4bits-kv block token head dim]",  # noqa: E501
    "tests/backends/test_pack_kernel.py::test_every_byte_of_the_text_for_amd[16x16-3bits-block kv head token dim]",  # noqa: E501
    "tests/backends/test_pack_kernel.py::test_every_byte_of_the_text_for_amd[16x576-3bits-block token dim]",  # noqa: E501
    "tests/backends/test_pack_kernel.py::test_no_lane_depends_on_another_being_in_step[16x128-4bits-kv block token head dim]",  # noqa: E501
    "tests/backends/test_rows_kernel.py::test_a_seeded_bug_is_caught[hip-emulated-stores go elsewhere]",  # noqa: E501
    "tests/backends/test_rows_kernel.py::test_plans_with_more_than_the_arguments_hold[AscendC-MAX_LOOPS-NZ blocks]",  # noqa: E501
    "tests/backends/test_triton.py::test_a_table_keeps_wide_vectors[sm_90]",
    "tests/backends/test_vendor_packages.py::test_names_that_the_simulated_device_does_not_carry[simdev:npuu-2-got 'npuu'. Pass simdev, npu, mlu]",  # noqa: E501
    "tests/benchmarks/test_benchmarks.py::test_a_tiny_shape_gives_verified_rows[deepseek-fp8-656 layer | block token dim uint8-cpu]",  # noqa: E501
    "tests/benchmarks/test_benchmarks.py::test_a_tiny_shape_gives_verified_rows[llama3-8b-hnd layer | kv block head token dim bfloat16-cpu]",  # noqa: E501
    "tests/benchmarks/test_benchmarks.py::test_small_payloads_are_measured_again_in_other_memory",
    "tests/benchmarks/test_benchmarks.py::test_the_ladder_checks_every_way",
    "tests/benchmarks/test_benchmarks_bars.py::test_every_bar_is_missed_by_one_worse_row[host]",
    "tests/benchmarks/test_benchmarks_bars.py::test_no_recorded_result_misses_a_bar[h200-host]",
    "tests/benchmarks/test_benchmarks_bars.py::test_no_recorded_result_misses_a_bar[h200-wall]",
    "tests/benchmarks/test_benchmarks_bars.py::test_no_recorded_result_misses_a_bar[h200]",
    "tests/benchmarks/test_benchmarks_command.py::test_it_prints_a_table_or_one_json_value_and_writes_the_same",
    "tests/benchmarks/test_benchmarks_command.py::test_most_suites_need_torch_and_numpy_alone",
    "tests/benchmarks/test_benchmarks_encodings.py::test_a_block_that_does_not_arrive_is_told",
    "tests/benchmarks/test_benchmarks_encodings.py::test_other_codecs_are_measured_and_checked[Lossy]",
    "tests/benchmarks/test_benchmarks_encodings.py::test_what_tiers_hold_is_counted",
    "tests/benchmarks/test_benchmarks_host.py::test_plots_of_a_recorded_result[h200-bandwidth heatmap host ladder]",  # noqa: E501
    "tests/benchmarks/test_benchmarks_host.py::test_plots_of_a_recorded_result[h200-host-ratio interference]",  # noqa: E501
    "tests/benchmarks/test_benchmarks_host_simdev.py::test_a_part_that_fails_or_is_wrong_is_told_and_the_others_stay",
    "tests/benchmarks/test_benchmarks_host_simdev.py::test_copies_by_the_wall[simdev]",
    "tests/benchmarks/test_benchmarks_host_simdev.py::test_copies_that_are_ready_and_that_wait_for_a_kernel",
    "tests/benchmarks/test_benchmarks_host_simdev.py::test_peers_come_last_and_beside_a_memcpy_of_their_own",
    "tests/benchmarks/test_benchmarks_host_simdev.py::test_what_precedes_a_launch_is_measured_without_a_device",
    "tests/benchmarks/test_benchmarks_peers.py::test_a_peer_is_called_and_its_bytes_are_checked",
    "tests/benchmarks/test_benchmarks_plugs.py::test_a_part_with_the_engine_that_is_here[lmcache-cpu]",
    "tests/benchmarks/test_benchmarks_plugs.py::test_a_part_with_the_engine_that_is_here[sglang-cpu]",
    "tests/benchmarks/test_benchmarks_plugs.py::test_a_part_with_the_engine_that_is_here[vllm-cpu]",
    "tests/benchmarks/test_benchmarks_storage.py::test_quantiles_of_urgent_loads_are_over_those_of_all_rounds",
    "tests/cli/test_demo.py::test_a_release_of_transformers_that_is_not_served_is_told",
    "tests/cli/test_demo.py::test_logits_that_changed_make_the_demo_fail",
    "tests/cli/test_demo.py::test_the_demo_fits_80_columns[]",
    "tests/cli/test_doctor.py::test_a_release_outside_the_matrix[transformers-99.0]",
    "tests/cli/test_doctor.py::test_beside_an_accelerator[simdev]",
    "tests/cli/test_store_serve.py::test_a_process_serves_until_a_signal[2]",
    "tests/cli/test_store_serve.py::test_a_service_without_standard_streams_ends_in_order[how0]",
    "tests/cli/test_store_serve.py::test_a_service_without_standard_streams_ends_in_order[how1]",
    "tests/cli/test_warmup.py::test_amds_architectures",
    "tests/cli/test_warmup.py::test_by_default_every_shape_for_these_devices",
    "tests/cli/test_warmup.py::test_the_table",
    "tests/conformance/test_conform_cli.py::test_how_a_run_ends[---0]",
    "tests/conformance/test_conform_cli.py::test_how_a_run_ends[---only cases/test_core.py::test_a--]",  # noqa: E501
    "tests/conformance/test_conform_cli.py::test_how_a_run_ends[---only nothing--]",
    "tests/conformance/test_conform_cli.py::test_how_a_run_ends[---profile full--]",
    "tests/conformance/test_conform_cli.py::test_waivers_are_told[text6-['--only', 'cases/test_core.py::test_a']-2-got a waiver of 'gone'. Remove it]",  # noqa: E501
    "tests/conformance/test_conform_mutants.py::test_launches_that_share_their_arguments_fail_each_case_of_threads[claims]",
    "tests/conformance/test_conform_mutants.py::test_the_suite_catches_mutants[--no-control --only off-by-one-slot]",  # noqa: E501
    "tests/conformance/test_conform_mutants.py::test_the_unmutated_base_is_right",
    "tests/conformance/test_conform_report.py::test_every_form_is_written_and_the_report_reads_back[emulated]",
    "tests/conformance/test_conform_report.py::test_every_form_is_written_and_the_report_reads_back[hostile]",
    "tests/conformance/test_conform_report.py::test_every_form_is_written_and_the_report_reads_back[passing]",
    "tests/conformance/test_conform_report.py::test_the_page_is_well_formed_and_loads_nothing[hostile]",
    "tests/conformance/test_conform_report.py::test_the_page_is_well_formed_and_loads_nothing[incomplete]",
    "tests/conformance/test_conform_report.py::test_the_page_is_well_formed_and_loads_nothing[passing]",
    "tests/conformance/test_conform_report.py::test_verdict_and_totals_are_said[hostile]",
    "tests/conformance/test_conform_report_browser.py::test_a_command_is_copied_as_it_stands[closed]",
    "tests/conformance/test_conform_report_browser.py::test_paper_shows_the_details_of_failures",
    "tests/conformance/test_conform_report_browser.py::test_the_page_fits_is_legible_and_asks_for_nothing[failing-1280-light]",
    "tests/conformance/test_conform_report_browser.py::test_the_page_fits_is_legible_and_asks_for_nothing[failing-360-dark]",
    "tests/conformance/test_conform_runner.py::test_a_case_that_takes_the_process_with_it_has_failed[abort-SIGABRT while this case ran]",  # noqa: E501
    "tests/conformance/test_conform_runner.py::test_a_case_that_takes_the_process_with_it_has_failed[exit-exit code 7 while this case ran]",  # noqa: E501
    "tests/conformance/test_conform_runner.py::test_a_case_that_takes_the_process_with_it_has_failed[half a line-SIGKILL (perhaps by the system, for want of memory) while this case ran]",  # noqa: E501
    "tests/conformance/test_conform_runner.py::test_a_case_that_takes_the_process_with_it_has_failed[leave-exit code 0 while this case ran]",  # noqa: E501
    "tests/conformance/test_conform_runner.py::test_a_worker_that_is_lost_disturbs_no_other[hang]",
    "tests/conformance/test_conform_runner.py::test_losses_not_in_a_row_cost_their_cases[1]",
    "tests/conformance/test_conform_runner.py::test_the_first_failure_can_be_the_end[hang]",
    "tests/conformance/test_conform_simdev.py::test_if_the_compiler_fails_one_test_fails_and_the_others_are_skipped",
    "tests/conformance/test_conform_suite_run.py::test_exit_codes",
    "tests/conformance/test_conform_suite_run.py::test_the_reference_passes",
    "tests/conformance/test_conform_verify.py::test_a_waived_case[crash-cases/test_claims.py::test_a-2999.01-waived-SIGSEGV]",
    "tests/conformance/test_conform_verify.py::test_a_waived_case[fail-cases/test_claims.py::test_a-2020.01-failed-expired in suite 2020.01]",  # noqa: E501
    "tests/conformance/test_conform_verify.py::test_a_waived_case[fail-cases/test_core.py::test_a-2999.01-failed-CORE cannot be waived]",  # noqa: E501
    "tests/conformance/test_conform_verify.py::test_one_that_failed_one_with_waivers_and_partial_ones_stand[options0-behaviours0-failed-]",
    "tests/conformance/test_contract.py::test_a_wrong_one_is_found[transport-Deaf-a_death_ends_slots_in_flight]",
    "tests/conformance/test_contract.py::test_other_tiers_keep_the_contract[two folders]",
    "tests/conformance/test_contract.py::test_what_portakv_brings_keeps_its_contract[io-ring]",
    "tests/conformance/test_contract.py::test_what_portakv_brings_keeps_its_contract[tier-disk]",
    "tests/conformance/test_contract.py::test_what_portakv_brings_keeps_its_contract[tier-remote]",
    "tests/conformance/test_contract.py::test_what_portakv_brings_keeps_its_contract[transport-distributed]",
    "tests/conformance/test_faults.py::test_a_command_that_cannot_run[words0-3-ModuleNotFoundError]",
    "tests/conformance/test_faults.py::test_each_committed_report_stands_without_wrong_bytes[vllm_tier]",
    "tests/conformance/test_faults.py::test_the_command_writes_a_report_that_replays",
    "tests/conformance/test_rope_faults.py::test_without_a_fault_all_cases_pass",
    "tests/conformance/test_support_matrix.py::test_the_command_says_what_a_record_lacks[R3-more1-true-It does not say what emulated (--emulated-by).]",  # noqa: E501
    "tests/conformance/test_tables.py::test_every_rung_is_borne_out_by_its_file",
    "tests/conformance/test_tables.py::test_the_pages_say_what_the_ladder_says",
    "tests/connector/test_connector_caches.py::test_a_cache_whose_storage_shrank_at_its_address[0.5-batch-cpu]",
    "tests/connector/test_connector_caches.py::test_a_cache_whose_storage_shrank_at_its_address[0.5-one-cpu]",
    "tests/connector/test_connector_caches.py::test_the_core_makes_no_copy_of_a_lazy_chunk[True-conj]",
    "tests/connector/test_in_graph.py::test_a_batch_is_one_op[True-cpu]",
    "tests/connector/test_in_graph.py::test_a_cache_that_the_graph_writes_by_indexing_and_then_loads[cpu]",
    "tests/connector/test_in_graph.py::test_a_load_stands_behind_the_chunk_and_before_reads_of_the_cache[make_caches-True-aot_eager-cpu]",
    "tests/connector/test_in_graph.py::test_a_store_behind_writes_before_reads[False-aot_eager-cpu]",
    "tests/connector/test_in_graph.py::test_a_store_behind_writes_before_reads[False-inductor-cpu]",
    "tests/connector/test_in_graph.py::test_a_store_behind_writes_before_reads[True-aot_eager-cpu]",
    "tests/connector/test_in_graph.py::test_a_store_behind_writes_before_reads[True-eager-cpu]",
    "tests/connector/test_in_graph.py::test_a_store_behind_writes_before_reads[True-inductor-cpu]",
    "tests/connector/test_in_graph.py::test_the_compiler_makes_no_copy_of_the_caches[False-in_one_allocation-cpu]",
    "tests/connector/test_in_graph.py::test_the_compiler_makes_no_copy_of_the_caches[False-make_caches-cpu]",
    "tests/connector/test_in_graph.py::test_the_compiler_makes_no_copy_of_the_caches[True-in_one_allocation-cpu]",
    "tests/connector/test_in_graph.py::test_the_compiler_makes_no_copy_of_the_caches[True-make_caches-cpu]",
    "tests/connector/test_in_graph.py::test_torch_finds_the_schema_true[True]",
    "tests/connector/test_in_graph.py::test_what_no_graph_can_hold_breaks_it_and_is_made_eagerly[slots1]",
    "tests/copy/test_ambient_state.py::test_in_a_process_of_its_own[spawn]",
    "tests/copy/test_checked_once.py::test_encoded_rows_are_checked_once[encoded in pinned memory-fp8-decode-host-{'by_layer': True}]",  # noqa: E501
    "tests/copy/test_checked_once.py::test_encoded_rows_are_checked_once[encoded in pinned memory-fp8-encode-host-{'by_layer': True}]",  # noqa: E501
    "tests/copy/test_checked_once.py::test_encoded_rows_are_checked_once[encoded in pinned memory-pack-decode-device-{'by_layer': True}]",  # noqa: E501
    "tests/copy/test_checked_once.py::test_encoded_rows_are_checked_once[encoded in pinned memory-pack-encode-device-{'by_layer': True}]",  # noqa: E501
    "tests/copy/test_checked_once.py::test_encoded_rows_are_checked_once[encoded on host-pack-decode-device-{'by_layer': True}]",  # noqa: E501
    "tests/copy/test_checked_once.py::test_encoded_rows_are_checked_once[encoded on host-pack-decode-host-{'by_layer': True}]",  # noqa: E501
    "tests/copy/test_checked_once.py::test_encoded_rows_are_refused_if_the_given_stream_records_a_graph[pack-decode-encoded on host]",  # noqa: E501
    "tests/copy/test_checked_once.py::test_padding_of_encoded_rows_is_left_out_of_all_layers[encoded in pinned memory-fp8-encode-host]",  # noqa: E501
    "tests/copy/test_checked_once.py::test_padding_of_encoded_rows_is_left_out_of_all_layers[encoded in pinned memory-pack-encode-host]",  # noqa: E501
    "tests/copy/test_checked_once.py::test_padding_of_encoded_rows_is_left_out_of_all_layers[encoded on host-fp8-encode-host]",  # noqa: E501
    "tests/copy/test_checked_once.py::test_replaced_memory_of_a_later_layer_is_noticed_before_a_row_is_written[fp8-decode-encoded on host]",  # noqa: E501
    "tests/copy/test_checked_once.py::test_replaced_memory_of_a_later_layer_is_noticed_before_a_row_is_written[fp8-decode-raw on host]",  # noqa: E501
    "tests/copy/test_checked_once.py::test_replaced_memory_of_a_later_layer_is_noticed_before_a_row_is_written[fp8-decode-simdev]",
    "tests/copy/test_checked_once.py::test_replaced_memory_of_a_later_layer_is_noticed_before_a_row_is_written[pack-decode-encoded on host]",  # noqa: E501
    "tests/copy/test_checked_once.py::test_replaced_memory_of_a_later_layer_is_noticed_before_a_row_is_written[pack-decode-raw on host]",  # noqa: E501
    "tests/copy/test_detached.py::test_every_byte_of_many_lands[simdev-{}-h2d]",
    "tests/copy/test_inside.py::test_a_count_that_is_none_has_the_error_of_the_general_way[-1]",
    "tests/copy/test_inside.py::test_blocks_between_two_views[apart-3-dtype1]",
    "tests/copy/test_inside.py::test_blocks_between_two_views[list-3-dtype2]",
    "tests/copy/test_inside.py::test_bytes_are_those_of_torch",
    "tests/copy/test_inside.py::test_ids_of_the_host_travel_with_as_many_launches_as_it_takes[both-1300-1]",
    "tests/copy/test_inside.py::test_ids_of_the_host_travel_with_as_many_launches_as_it_takes[read-1300-1]",
    "tests/copy/test_launches_on_device.py::test_chunks_by_any_ids",
    "tests/copy/test_launches_on_device.py::test_rows_by_any_ids_end_as_on_the_general_way",
    "tests/copy/test_packing.py::test_no_stream_waits_for_a_detached_copy[False-False]",
    "tests/copy/test_packing.py::test_no_stream_waits_for_a_detached_copy[False-True]",
    "tests/copy/test_packing.py::test_slices_cross_in_turns[simdev-block layer kv head page-False]",
    "tests/copy/test_packing.py::test_slices_cross_in_turns[simdev-by name-False]",
    "tests/copy/test_packing.py::test_slices_cross_in_turns[simdev-layer kv block head page-True]",
    "tests/copy/test_packing.py::test_slices_cross_in_turns[simdev-pageable-True]",
    "tests/copy/test_properties.py::test_a_copy_moves_the_addressed_rows_and_nothing_else",
    "tests/copy/test_properties.py::test_every_destination[lmcache-2-0]",
    "tests/copy/test_properties.py::test_every_destination[lmcache-8-0]",
    "tests/copy/test_properties.py::test_every_destination[trtllm-hnd-0]",
    "tests/copy/test_properties.py::test_every_destination[vllm-bhlnc-0]",
    "tests/copy/test_properties.py::test_every_destination[vllm-lbhnc-0]",
    "tests/copy/test_rotated_overflow.py::test_rows_of_flagged_blocks_stay[1-device]",
    "tests/copy/test_rotated_overflow.py::test_rows_of_flagged_blocks_stay[1-from the device]",
    "tests/copy/test_rotated_overflow.py::test_rows_of_flagged_blocks_stay[2-device]",
    "tests/copy/test_rotated_overflow.py::test_rows_of_flagged_blocks_stay[2-from the device]",
    "tests/core/test_checked_copies.py::test_chunks_by_units",
    "tests/core/test_checked_copies.py::test_launches_by_indices",
    "tests/core/test_checked_copies.py::test_launches_by_units",
    "tests/core/test_core_view.py::test_drawn_views_are_those_of_the_oracle[1]",
    "tests/core/test_core_view.py::test_drawn_views_are_those_of_the_oracle[2]",
    "tests/core/test_library.py::test_a_build_that_fails_leaves_the_library_as_it_was",
    "tests/core/test_library.py::test_a_compiler_that_links_nothing_does_not_count[127]",
    "tests/core/test_exit.py::test_the_process_ends[by_ctypes()]",
    "tests/core/test_exit.py::test_the_process_ends[kernels('chunk')]",
    "tests/core/test_exit.py::test_the_process_ends[pieces()]",
    "tests/core/test_library.py::test_a_compiler_that_links_nothing_does_not_count[1]",
    "tests/core/test_library.py::test_a_current_library_is_not_built_again",
    "tests/core/test_library.py::test_a_library_of_another_contract_is_rejected[no function]",
    "tests/core/test_library.py::test_an_undefined_function_fails_the_build",
    "tests/core/test_library.py::test_the_environments_compiler_comes_first",
    "tests/core/test_pack.py::test_the_argument_names_the_places_of_drawn_forms",
    "tests/core/test_plan.py::test_drawn_plans_move_every_byte_once",
    "tests/examples/test_migrate_rows.py::test_a_wrong_byte_and_a_published_stale_row_are_seen[-]",
    "tests/examples/test_migrate_rows.py::test_rows_of_a_device_that_shares_nothing_come_through_the_host",
    "tests/examples/test_migrate_rows.py::test_rows_of_the_host_come_to_a_device",
    "tests/examples/test_offload_transformers.py::test_the_example_is_bit_identical_and_its_control_is_not[pageable]",
    "tests/examples/test_prefix_store.py::test_a_second_engine_finds_the_prefix_in_a_remote_store",
    "tests/graph/test_meter.py::test_nothing_is_imported_unless_it_is_asked_for[portakv.graph]",
    "tests/graph/test_meter.py::test_nothing_is_imported_unless_it_is_asked_for[portakv.storage]",
    "tests/host/test_pinned.py::test_a_process_that_ends",
    "tests/host/test_pinned.py::test_calls_of_compiled_functions[allocated-aot_eager]",
    "tests/host/test_pinned.py::test_calls_of_compiled_functions[allocated-eager]",
    "tests/host/test_pinned.py::test_calls_of_compiled_functions[registered_in_place-aot_eager]",
    "tests/host/test_pinned.py::test_calls_of_compiled_functions[registered_in_place-eager]",
    "tests/host/test_pool_interrupts.py::test_an_interrupt_loses_no_block[PinnedPool]",
    "tests/host/test_pool_model.py::test_any_order_of_blocks_of_any_size[20-3-0.5]",
    "tests/host/test_pool_model.py::test_any_order_of_calls[3-0.5]",
    "tests/integrations/test_lmcache_l2.py::test_no_server_evicts_what_another_one_has_locked[close-small]",
    "tests/integrations/test_matrix.py::test_a_release_that_is_not_served[lmcache-0.1]",
    "tests/integrations/test_matrix.py::test_a_release_that_is_not_served[transformers-None]",
    "tests/integrations/test_transformers.py::test_a_model_goes_on_behind_a_prefix[simdev-1-OffloadedCache-layer | kv block token head dim]",  # noqa: E501
    "tests/integrations/test_transformers.py::test_a_model_with_an_encoder",
    "tests/integrations/test_transformers.py::test_a_refused_prefix_leaves_the_cache_empty[a block past the pool]",  # noqa: E501
    "tests/integrations/test_transformers.py::test_the_same_logits[1-True]",
    "tests/integrations/test_transformers_changes.py::test_a_compiled_model_generates[aot_eager]",
    "tests/integrations/test_transformers_changes.py::test_a_compiled_model_generates[eager]",
    "tests/integrations/test_transformers_changes.py::test_any_calls_give_what_transformers_cache_gives[cpu-inference]",
    "tests/integrations/test_transformers_changes.py::test_any_calls_give_what_transformers_cache_gives[simdev-inference]",
    "tests/integrations/test_transformers_changes.py::test_any_calls_give_what_transformers_cache_gives[simdev-no grad]",  # noqa: E501
    "tests/integrations/test_transformers_changes.py::test_compiled_calls_of_a_cache[aot_eager]",
    "tests/integrations/test_transformers_changes.py::test_compiled_calls_of_a_cache[eager]",
    "tests/integrations/test_transformers_faults.py::test_a_disk_that_fails_in_a_load[EIO-control]",
    "tests/integrations/test_transformers_faults.py::test_a_disk_that_fails_in_a_load[ENOSPC-control]",
    "tests/integrations/test_transformers_faults.py::test_a_disk_that_fails_in_a_load[ENOSPC-guarded]",
    "tests/integrations/test_transformers_faults.py::test_a_disk_that_fails_in_a_load[a hang-control]",  # noqa: E501
    "tests/integrations/test_transformers_faults.py::test_a_disk_that_fails_in_a_load[a hang-guarded]",  # noqa: E501
    "tests/integrations/test_transformers_faults.py::test_a_disk_that_fails_in_a_save[ENOSPC]",
    "tests/integrations/test_transformers_faults.py::test_a_disk_that_fails_in_a_save[a hang]",
    "tests/integrations/test_transformers_faults.py::test_damaged_blocks_are_computed[swapped]",
    "tests/integrations/test_transformers_faults.py::test_damaged_blocks_come_without_their_checks[swapped]",
    "tests/integrations/test_transformers_hybrids.py::test_batches_and_caches_that_leave_the_device[delta networks, Qwen3.5-DynamicCache]",  # noqa: E501
    "tests/integrations/test_transformers_hybrids.py::test_batches_and_caches_that_leave_the_device[windows, Gemma 3-DynamicCache]",  # noqa: E501
    "tests/integrations/test_transformers_hybrids.py::test_batches_and_caches_that_leave_the_device[windows, Gemma 3-OffloadedCache]",  # noqa: E501
    "tests/integrations/test_transformers_store.py::test_a_prompt_and_its_next_turn[1-DynamicCache]",
    "tests/integrations/test_transformers_store.py::test_a_prompt_and_its_next_turn[1-OffloadedCache]",
    "tests/integrations/test_vllm_connector.py::test_layers_of_graphs_wait_by_words",
    "tests/integrations/test_vllm_connector.py::test_walks_through_the_hooks_of_an_engine[alone-16-5]",
    "tests/integrations/test_vllm_connector.py::test_walks_through_the_hooks_of_an_engine[shared-8-0]",
    "tests/integrations/test_vllm_handover.py::test_a_first_hand_over_makes_nothing_that_the_start_has_not_made",
    "tests/integrations/test_vllm_handover.py::test_rows_of_a_prompt_cross_to_other_blocks",
    "tests/integrations/test_vllm_ranks.py::test_states_of_other_numbers_of_ranks_are_found[MAMBA2-1-4-2]",
    "tests/integrations/test_vllm_tier.py::test_a_walk_through_the_hooks_of_a_tier",
    "tests/integrations/test_vllm_trace.py::test_a_hook_that_is_left_out_is_noticed[start_load_kv]",
    "tests/integrations/test_vllm_trace.py::test_hooks_that_are_swapped_are_noticed[update_state_after_alloc-build_connector_meta]",
    "tests/integrations/test_vllm_witness.py::test_other_actions[log]",
    "tests/interconnect/test_choose_devices.py::test_pages_cross_by_a_copy_engine_for_any_ids[simdev-False-layers-d2h]",
    "tests/interconnect/test_choose_devices.py::test_pages_cross_by_a_copy_engine_for_any_ids[simdev-False-layers-h2d]",
    "tests/interconnect/test_choose_devices.py::test_pages_cross_by_a_copy_engine_for_any_ids[simdev-True-layers-d2h]",
    "tests/interconnect/test_choose_devices.py::test_pages_cross_by_a_copy_engine_for_any_ids[simdev-True-layers-h2d]",
    "tests/interconnect/test_host_rows.py::test_by_which_calls_of_torch[dense-from rows]",
    "tests/interconnect/test_host_rows.py::test_by_which_calls_of_torch[dense-to rows]",
    "tests/interconnect/test_host_rows.py::test_by_which_calls_of_torch[scattered, of 16 B-from rows]",  # noqa: E501
    "tests/interconnect/test_host_rows.py::test_by_which_calls_of_torch[scattered, of 16 B-to rows]",  # noqa: E501
    "tests/interconnect/test_host_rows.py::test_by_which_calls_of_torch[scattered, of 4096 B-from rows]",  # noqa: E501
    "tests/interconnect/test_host_rows.py::test_by_which_calls_of_torch[scattered, of 4096 B-to rows]",  # noqa: E501
    "tests/interconnect/test_host_rows.py::test_by_which_calls_of_torch[scattered, of 48 B-from rows]",  # noqa: E501
    "tests/interconnect/test_host_rows.py::test_by_which_calls_of_torch[scattered, of 524288 B-from rows]",  # noqa: E501
    "tests/interconnect/test_host_rows.py::test_by_which_calls_of_torch[scattered, of 524288 B-to rows]",  # noqa: E501
    "tests/interconnect/test_link.py::test_every_byte_of_any_pieces[simdev-foreign-d2h]",
    "tests/interconnect/test_link.py::test_every_byte_of_any_pieces[simdev-foreign-h2d]",
    "tests/interconnect/test_link.py::test_every_byte_of_any_pieces[simdev-pin_memory-d2h]",
    "tests/interconnect/test_link_cuda.py::test_every_byte_lands[12-True]",
    "tests/interconnect/test_link_cuda.py::test_every_byte_lands[13-False]",
    "tests/interconnect/test_link_cuda.py::test_every_byte_lands[13-True]",
    "tests/interconnect/test_link_cuda.py::test_every_byte_lands[None-True]",
    "tests/interconnect/test_pageable.py::test_slices_cover_every_position_once[1000-h2d]",
    "tests/interconnect/test_pageable.py::test_threads_on_streams_of_their_own[simdev-1]",
    "tests/interconnect/test_pieces.py::test_wide_runs_stay_pieces[block layer (token dim)-block layer (token dim)-all-whole]",  # noqa: E501
    "tests/interconnect/test_pieces.py::test_wide_runs_stay_pieces[layer block (token dim)-layer | block (token dim)-all-whole]",  # noqa: E501
    "tests/interconnect/test_staged.py::test_earlier_work_of_the_stream_comes_first[small-simdev-d2h]",
    "tests/interconnect/test_staged.py::test_earlier_work_of_the_stream_comes_first[small-simdev-h2d]",
    "tests/interconnect/test_staged.py::test_every_byte[simdev-Staged-case1-False]",
    "tests/interconnect/test_staged.py::test_other_transfers_of_one_launch[small-Pageable-False-one allocation-h2d]",  # noqa: E501
    "tests/interconnect/test_staged.py::test_other_transfers_of_one_launch[small-Pageable-True-one allocation-h2d]",  # noqa: E501
    "tests/interconnect/test_staged.py::test_streams_have_staging_of_their_own[small-simdev-d2h]",
    "tests/interconnect/test_staged.py::test_streams_have_staging_of_their_own[small-simdev-h2d]",
    "tests/interconnect/test_submission.py::test_each_wait_is_needed_and_no_other[-d2h]",
    "tests/interconnect/test_zero_copy.py::test_every_cut[loads-1-Cut(threads=1024, each=2, planes=1)]",  # noqa: E501
    "tests/interconnect/test_zero_copy.py::test_every_cut[loads-1-Cut(threads=64, each=4, planes=1)]",  # noqa: E501
    "tests/interconnect/test_zero_copy.py::test_every_cut[loads-1-Cut(threads=8, each=4, planes=5)]",  # noqa: E501
    "tests/interconnect/test_zero_copy.py::test_every_cut[loads-2-Cut(threads=64, each=4, planes=1)]",  # noqa: E501
    "tests/interconnect/test_zero_copy.py::test_every_cut[loads-2-Cut(threads=8, each=4, planes=2)]",  # noqa: E501
    "tests/interconnect/test_zero_copy.py::test_every_cut[loads-2-Cut(threads=8, each=4, planes=4)]",  # noqa: E501
    "tests/interconnect/test_zero_copy.py::test_every_cut[loads-7-Cut(threads=8, each=4, planes=8)]",  # noqa: E501
    "tests/interconnect/test_zero_copy.py::test_every_cut[stores-1-Cut(threads=2, each=1, planes=1)]",  # noqa: E501
    "tests/interconnect/test_zero_copy.py::test_every_cut[stores-2-Cut(threads=1024, each=2, planes=1)]",  # noqa: E501
    "tests/interconnect/test_zero_copy.py::test_every_cut[stores-2-Cut(threads=8, each=4, planes=2)]",  # noqa: E501
    "tests/interconnect/test_zero_copy.py::test_every_cut[stores-7-Cut(threads=8, each=4, planes=8)]",  # noqa: E501
    "tests/interconnect/test_zero_copy.py::test_no_more_thread_blocks_than_the_terms_allow_and_have_something_to_do[no terms]",  # noqa: E501
    "tests/interconnect/test_zero_copy.py::test_nvrtc_keeps_all_vectors_of_a_thread_in_registers",
    "tests/interconnect/test_zero_copy.py::test_nvrtc_makes_machine_code[90]",
    "tests/migrate/test_channel.py::test_a_channel_asks_more_than_a_few_hundred",
    "tests/migrate/test_channel.py::test_strangers_who_take_all_descriptors_do_not_hold_up_those_who_are_served",
    "tests/migrate/test_channel.py::test_the_interpreters_end_closes",
    "tests/migrate/test_channel_model.py::test_the_machine_finds_a_channel_with_a_bug[Forgetful]",
    "tests/migrate/test_channel_stopped.py::test_a_channel_that_closes_ends_connections_though_a_fork_has_its_descriptors",
    "tests/migrate/test_channel_stopped.py::test_a_process_that_stops_is_gone_and_comes_back",
    "tests/migrate/test_channel_stopped.py::test_a_request_behind_a_short_one_has_its_own_time",
    "tests/migrate/test_channel_stopped.py::test_no_side_blames_the_secret_of_a_process_that_was_stopped[tcp]",
    "tests/migrate/test_channel_stopped.py::test_no_side_blames_the_secret_of_a_process_that_was_stopped[unix]",
    "tests/migrate/test_channel_stopped.py::test_the_end_of_a_process_is_seen_though_a_fork_has_its_descriptors",
    "tests/migrate/test_channel_stopped.py::test_the_end_of_a_process_whose_name_is_no_text_is_seen",
    "tests/migrate/test_checksum_kernel.py::test_amds_hiprtc_compiles_the_kernel",
    "tests/migrate/test_checksum_kernel.py::test_large_parts_have_the_sums_of_torch[bytes]",
    "tests/migrate/test_checksum_kernel.py::test_large_parts_have_the_sums_of_torch[narrow rows]",
    "tests/migrate/test_checksum_kernel.py::test_large_parts_have_the_sums_of_torch[one row from an odd address]",  # noqa: E501
    "tests/migrate/test_checksum_kernel.py::test_large_parts_have_the_sums_of_torch[wide rows]",
    "tests/migrate/test_checksum_kernel.py::test_nvrtc_compiles_the_kernel[90]",
    "tests/migrate/test_cold_pulls.py::test_a_renewal_with_a_stopped_owner_ends_by_its_timeout",
    "tests/migrate/test_cold_pulls.py::test_a_stopped_owner_delays_no_handshake_with_another[1]",
    "tests/migrate/test_gathers.py::test_only_the_memory_that_slots_have_now_is_registered[False]",
    "tests/migrate/test_gathers.py::test_rows_of_a_pairing_before_are_not_taken_for_those_of_now",
    "tests/migrate/test_interrupts.py::test_an_interrupt_at_any_line_leaves_nothing[channels]",
    "tests/migrate/test_interrupts.py::test_interrupts_meet_what_callers_run",
    "tests/migrate/test_ipc.py::test_changed_bytes_are_refused_and_nothing_is_opened",
    "tests/migrate/test_marks.py::test_a_pull_by_name_follows_the_mark[by layer-layers-staging]",
    "tests/migrate/test_marks.py::test_many_pulls_follow_together",
    "tests/migrate/test_marks.py::test_rows_come_as_they_are_written[by layer-tokens-staging]",
    "tests/migrate/test_marks.py::test_several_readers_follow_one_offer[layers-staging]",
    "tests/migrate/test_marks.py::test_several_readers_follow_one_offer[tokens-staging]",
    "tests/migrate/test_marks.py::test_without_the_guard_a_reader_gets_poison[by layer-layers-staging]",  # noqa: E501
    "tests/migrate/test_marks_device.py::test_a_mark_is_seen_after_the_streams_work[simdev-by layer-mapped]",  # noqa: E501
    "tests/migrate/test_marks_device.py::test_a_mark_is_seen_after_the_streams_work[simdev-whole-mapped]",
    "tests/migrate/test_marks_device.py::test_a_mark_is_seen_after_the_streams_work[simdev-whole-staging]",
    "tests/migrate/test_marks_processes.py::test_an_owner_that_is_killed_before_its_rows_are_complete[whole-mapped]",
    "tests/migrate/test_marks_processes.py::test_offers_and_pulls_that_end_at_any_moment[6-staging]",
    "tests/migrate/test_marks_processes.py::test_owners_that_are_killed_at_any_moment[6-staging]",
    "tests/migrate/test_marks_processes.py::test_rows_of_another_process_come_as_it_writes_them[whole-tokens-mapped]",
    "tests/migrate/test_marks_processes.py::test_rows_of_this_process_come_to_another[whole-staging]",
    "tests/migrate/test_messages.py::test_a_first_decode_beside_another_one[an answer]",
    "tests/migrate/test_models.py::test_a_model_computes_with_another_process_s_memory[cpu]",
    "tests/migrate/test_models.py::test_the_example_computes_in_two_processes[cpu]",
    "tests/migrate/test_named.py::test_a_new_name_does_not_wait_for_the_pause_between_questions[True]",
    "tests/migrate/test_named.py::test_an_offer_is_found_by_its_name[pull-True-staging]",
    "tests/migrate/test_named.py::test_an_owner_that_is_killed_ends_the_wait_of_its_pulls_alone",
    "tests/migrate/test_named.py::test_an_owner_that_is_stopped_delays_no_other",
    "tests/migrate/test_named.py::test_an_owner_that_wakes_late_is_waited_for",
    "tests/migrate/test_named.py::test_nothing_is_written_after_a_pull_was_stopped_during_its_handshake[cancel]",
    "tests/migrate/test_named.py::test_on_a_device_the_rows_come_after_the_work_of_the_callers_stream[simdev-True]",
    "tests/migrate/test_named.py::test_stopped_owners_are_asked_together",
    "tests/migrate/test_named_threads.py::test_a_pull_that_has_not_begun_is_not_over[guard]",
    "tests/migrate/test_named_threads.py::test_rows_are_there_after_pulls_of_several_threads[staging]",
    "tests/migrate/test_offer_model.py::test_any_order_of_offers_and_pulls[30]",
    "tests/migrate/test_offers.py::test_a_pull_is_cancelled_at_any_moment[staging]",
    "tests/migrate/test_offers.py::test_an_edited_ticket_reads_nothing[tokens-staging]",
    "tests/migrate/test_offers.py::test_many_pulls_at_once_are_each_right[staging]",
    "tests/migrate/test_offers.py::test_rows_of_an_owner_that_reuses_its_blocks_at_once_are_never_stale[staging-100]",
    "tests/migrate/test_offers.py::test_rows_that_are_moved_keep_to_a_rate",
    "tests/migrate/test_packed_pulls.py::test_blocks_that_hold_no_rows_are_named_and_all_others_are_moved[False-slices-staging]",
    "tests/migrate/test_pull_devices.py::test_rows_that_are_still_written_at_the_offer_come_whole[simdev-staging]",
    "tests/migrate/test_pull_processes.py::test_a_reader_that_is_killed_in_mid_copy_frees_its_offers[staging]",
    "tests/migrate/test_pull_processes.py::test_a_reader_that_was_stopped_finds_its_offer_gone",
    "tests/migrate/test_pull_processes.py::test_killed_at_any_moment_nothing_leaks_and_nobody_hangs[10]",
    "tests/migrate/test_pull_processes.py::test_rows_of_two_processes_come_to_a_third[mapped]",
    "tests/migrate/test_pull_soak.py::test_no_stale_row_at_readers_that_are_killed[mapped-26-host]",
    "tests/migrate/test_renewals.py::test_the_loop_leaves_the_end_to_a_caller_that_waits[False]",
    "tests/migrate/test_renewals.py::test_the_loop_leaves_the_end_to_a_caller_that_waits[True]",
    "tests/migrate/test_resources.py::test_a_channel_and_a_store_need_no_shared_memory_folder[mount -t tmpfs -o ro none]",  # noqa: E501
    "tests/migrate/test_resources.py::test_a_channel_and_a_store_need_no_shared_memory_folder[mount -t tmpfs -o size=4k,nr_inodes=1 none]",  # noqa: E501
    "tests/migrate/test_resources.py::test_few_descriptors_are_an_error_or_enough[disk]",
    "tests/migrate/test_resources.py::test_few_descriptors_are_an_error_or_enough[unix]",
    "tests/migrate/test_resources.py::test_few_free_descriptors_raise_the_soft_limit",
    "tests/migrate/test_resources.py::test_no_thread_is_an_error",
    "tests/migrate/test_staged.py::test_a_pull_of_very_many_slices_lets_others_take_turns",
    "tests/migrate/test_staged.py::test_pulls_that_are_cancelled_at_any_moment_leave_one_transport_in_step",
    "tests/migrate/test_staged.py::test_slices_of_a_cancelled_pull_are_not_taken_for_those_of_the_next[False]",
    "tests/migrate/test_staged_commits.py::test_a_pull_that_waits_for_its_bytes_renews_its_offer[True]",
    "tests/migrate/test_staged_faults.py::test_a_pull_ends_if_its_second_owner_has_too_little_staging[names]",
    "tests/migrate/test_staged_faults.py::test_the_end_of_a_complete_offer_ends_a_pull_that_waits_for_another[layers]",
    "tests/migrate/test_tenants.py::test_tenants_get_nothing_of_each_other[cpu-True]",
    "tests/migrate/test_tenants.py::test_tenants_get_nothing_of_each_other[simdev-False]",
    "tests/migrate/test_tenants.py::test_tenants_get_nothing_of_each_other[simdev-True]",
    "tests/migrate/test_time_limits.py::test_an_owner_that_is_busy_for_ever_ends_with_the_pull_s_time[0.0]",
    "tests/migrate/test_weights.py::test_large_tensors_cross_in_pieces",
    "tests/migrate/test_weights_devices.py::test_a_lane_that_does_not_end_in_time_is_released_on_both_sides",
    "tests/migrate/test_weights_devices.py::test_changes_and_cancellations_leave_the_lane_in_step",
    "tests/migrate/test_weights_devices.py::test_host_staging_serves_two_kinds_of_device_and_one_device[simdev-device to device]",  # noqa: E501
    "tests/migrate/test_weights_devices.py::test_host_staging_serves_two_kinds_of_device_and_one_device[simdev-device to host]",  # noqa: E501
    "tests/migrate/test_weights_devices.py::test_streams_order_all_slices_between_devices",
    "tests/migrate/test_weights_in_flight.py::test_a_pull_that_waits_is_cancelled_immediately",
    "tests/migrate/test_weights_in_flight.py::test_the_end_of_the_process_cancels_a_pull_in_flight",
    "tests/migrate/test_weights_staged.py::test_a_failed_pull_that_is_cancelled_while_it_ends_leaves_its_lane",
    "tests/migrate/test_weights_staged.py::test_a_reader_that_dies_releases_the_owners_staging",
    "tests/migrate/test_weights_staged.py::test_a_reader_waits_for_no_bytes_of_a_publication_that_ended",
    "tests/migrate/test_weights_staged.py::test_weights_that_another_host_shares_cross_by_tcp",
    "tests/migrate/test_words.py::test_pulls_that_follow_each_other_wake_nothing[True]",
    "tests/migrate/transports/test_distributed.py::test_a_death_ends_the_slots_that_cross_on_a_device_and_aborts_their_group",
    "tests/migrate/transports/test_distributed.py::test_a_lane_that_its_owner_closes_alone_ends_the_readers_slots[False]",
    "tests/migrate/transports/test_distributed.py::test_a_lane_that_its_owner_closes_alone_ends_the_readers_slots[True]",
    "tests/migrate/transports/test_distributed.py::test_a_pull_that_is_cancelled_long_before_its_bytes_leaves_others_their_lane",
    "tests/migrate/transports/test_distributed.py::test_a_slot_on_a_device_that_takes_too_long_ends_the_one_behind_it",
    "tests/migrate/transports/test_distributed.py::test_an_owner_killed_in_mid_chunk_is_told_by_the_channel",
    "tests/migrate/transports/test_distributed.py::test_pulls_between_devices_that_are_cancelled_leave_one_group_in_step",
    "tests/migrate/transports/test_distributed.py::test_rows_cross_between_devices_in_more_slices_than_there_are_slots",
    "tests/migrate/transports/test_distributed.py::test_slots_after_the_first_are_issued_by_the_caller_and_a_failure_ends_the_lane",
    "tests/registry/test_slowest_npu.py::test_it_is_warned_of_once",
    "tests/registry/test_slowest_npu.py::test_nothing_is_said_if_it_was_asked_for[argument]",
    "tests/runtime/test_devices.py::test_a_backend_is_judged_on_its_own_kind[npu]",
    "tests/runtime/test_devices.py::test_a_broken_package_s_own_words[immediately]",
    "tests/runtime/test_devices.py::test_a_package_that_torch_did_not_load_serves[npu]",
    "tests/runtime/test_interrupts.py::test_a_second_interrupt_ends_the_wait_for_long_work",
    "tests/runtime/test_interrupts.py::test_an_interrupt_leaves_no_condition_locked[ours]",
    "tests/runtime/test_interrupts.py::test_an_interrupt_leaves_no_condition_locked[python's]",
    "tests/runtime/test_kernel_cache.py::test_four_processes_race",
    "tests/runtime/test_linux.py::test_the_rest_says_that_it_needs_linux[a block store]",
    "tests/serving/test_bucket.py::test_an_index_does_not_wait_for_a_bucket_that_does_not_answer",
    "tests/serving/test_bucket.py::test_what_one_engine_saved_another_one_loads_from_the_bucket_alone",
    "tests/serving/test_handover_parts.py::test_stages_hand_over_to_any_engine_and_back[two stages-one worker]",  # noqa: E501
    "tests/serving/test_handovers.py::test_any_walk_of_two_engines[0]",
    "tests/serving/test_handovers.py::test_any_walk_of_two_engines[1]",
    "tests/serving/test_handovers.py::test_walks_pull_and_fail",
    "tests/serving/test_hybrids.py::test_walks[windows alone]",
    "tests/serving/test_hybrids.py::test_walks[windows and states]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_another_owner[simdev-guarded]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_owner_of_an_offer[cpu-staging-control]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_owner_of_an_offer[cpu-staging-guarded]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_owner_of_an_offer[simdev-mapped-control]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_owner_of_an_offer[simdev-mapped-guarded]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_owner_of_an_offer[simdev-staging-control]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_owner_of_an_offer[simdev-staging-guarded]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_store_server_of_a_load[simdev-control]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_store_server_of_a_load[simdev-guarded]",
    "tests/serving/test_page_pool.py::test_a_bucket_that_hangs[lookup]",
    "tests/serving/test_page_pool.py::test_a_disk_that_fails[load-a hang]",
    "tests/serving/test_page_tasks.py::test_locked_pages_stay[1]",
    "tests/serving/test_pages.py::test_pinned_pages_are_not_evicted[disk]",
    "tests/serving/test_prefixes.py::test_a_bucket_that_hangs[lookup]",
    "tests/serving/test_scheduler_side.py::test_any_walk_of_an_engine[12]",
    "tests/serving/test_scheduler_side.py::test_any_walk_of_an_engine[9]",
    "tests/serving/test_scheduler_side.py::test_walks_load_save_and_fail",
    "tests/serving/test_scheduler_side_stages.py::test_any_walk_of_an_engine_with_stages[0]",
    "tests/serving/test_scheduler_side_stages.py::test_walks_have_steps_in_flight_and_load_save_and_fail",
    "tests/serving/test_start.py::test_a_first_save_and_load_import_nothing[cold-disk]",
    "tests/serving/test_start.py::test_a_first_save_and_load_import_nothing[warm-disk]",
    "tests/serving/test_start.py::test_a_first_save_and_load_import_nothing[warm-host]",
    "tests/serving/test_store_server.py::test_walks_of_ranks_that_join_copy_stop_and_die[3]",
    "tests/serving/test_store_server.py::test_walks_of_ranks_that_join_copy_stop_and_die[5]",
    "tests/serving/test_store_server_bucket.py::test_a_scheduler_does_not_wait_for_a_store_server_whose_bucket_does_not_answer",
    "tests/serving/test_store_server_kills.py::test_kills_in_turn",
    "tests/serving/test_store_server_pages.py::test_kill_9_of_the_process_that_serves",
    "tests/serving/test_store_server_processes.py::test_a_folder_that_another_program_has_is_refused_in_one_sentence",
    "tests/serving/test_store_server_processes.py::test_an_index_follows_a_store_server",
    "tests/serving/test_store_server_processes.py::test_blocks_of_another_model_are_refused_in_one_sentence",
    "tests/serving/test_store_server_processes.py::test_rows_of_a_stopped_rank_are_not_given_away",
    "tests/serving/test_store_server_processes.py::test_the_end_of_a_store_server_is_as_loud_as_its_return[True]",
    "tests/serving/test_store_server_processes.py::test_two_engines_of_one_name_share_blocks[False]",
    "tests/serving/test_store_server_sessions.py::test_a_refusal_ends_with_its_store_server",
    "tests/serving/test_store_server_sessions.py::test_an_index_of_ranks_that_are_refused_waits_no_longer[index]",
    "tests/serving/test_store_server_sessions.py::test_an_index_of_ranks_that_are_refused_waits_no_longer[rank]",
    "tests/serving/test_store_server_worker_side.py::test_walks_of_an_engine_over_a_store_server[0]",
    "tests/serving/test_store_server_worker_side.py::test_walks_of_an_engine_with_stages_over_a_store_server[2]",
    "tests/serving/test_store_server_worker_side.py::test_walks_of_an_engine_with_stages_over_a_store_server[3]",
    "tests/serving/test_worker_side.py::test_blocks_that_a_disk_does_not_store_are_not_counted[full-0]",
    "tests/serving/test_worker_side.py::test_blocks_that_a_disk_does_not_store_are_not_counted[full-65536]",
    "tests/storage/test_auto.py::test_blocks_of_a_device[simdev-slow]",
    "tests/storage/test_chains.py::test_of_blocks_after_a_gap_the_first_ones_stay[30]",
    "tests/storage/test_changes.py::test_a_listener_knows_the_keys[6]",
    "tests/storage/test_disk.py::test_killed_at_random[few-ring]",
    "tests/storage/test_disk.py::test_killed_at_random[few-threads]",
    "tests/storage/test_disk.py::test_restarted_while_writes_are_in_flight[ring]",
    "tests/storage/test_disk.py::test_restarted_while_writes_are_in_flight[threads]",
    "tests/storage/test_disk.py::test_threads_at_once[threads-300]",
    "tests/storage/test_forms.py::test_any_calls_bring_right_bytes_or_nothing[0]",
    "tests/storage/test_forms.py::test_any_calls_bring_right_bytes_or_nothing[1]",
    "tests/storage/test_forms.py::test_any_calls_bring_right_bytes_or_nothing[3]",
    "tests/storage/test_forms.py::test_each_form_has_its_own_blocks_under_the_same_keys[False-remote]",
    "tests/storage/test_forms.py::test_forms_are_known_by_what_they_are_after_a_restart[disk]",
    "tests/storage/test_forms.py::test_forms_that_are_used_alike_share_the_space",
    "tests/storage/test_full_disk.py::test_a_block_that_another_call_has_evicted_is_no_hindrance",
    "tests/storage/test_full_disk.py::test_a_write_that_does_not_end",
    "tests/storage/test_full_disk.py::test_blocks_wait_once_for_writes_that_do_not_end[negative control]",  # noqa: E501
    "tests/storage/test_full_disk.py::test_blocks_wait_once_for_writes_that_do_not_end[once]",
    "tests/storage/test_interrupts.py::test_an_interrupt_at_any_line_leaves_nothing[graphs]",
    "tests/storage/test_interrupts.py::test_an_interrupt_at_any_line_leaves_nothing[leaving]",
    "tests/storage/test_interrupts.py::test_interrupts_meet_what_callers_run",
    "tests/storage/test_interrupts.py::test_interrupts_without_helpers_leave_something[graphs]",
    "tests/storage/test_kills.py::test_kills_at_random[few-threads]",
    "tests/storage/test_kills.py::test_kills_of_a_process_that_saves_several_forms[few-ring]",
    "tests/storage/test_kills.py::test_kills_of_a_process_that_saves_several_forms[few-threads]",
    "tests/storage/test_lent.py::test_what_a_killed_process_did_not_copy_is_not_stored",
    "tests/storage/test_lent_rows.py::test_no_row_has_two_owners_in_any_order[0]",
    "tests/storage/test_lent_rows.py::test_no_row_has_two_owners_in_any_order[1]",
    "tests/storage/test_lent_rows.py::test_no_row_has_two_owners_in_any_order[2]",
    "tests/storage/test_lent_rows.py::test_no_row_has_two_owners_in_any_order[4]",
    "tests/storage/test_lent_rows.py::test_no_row_has_two_owners_in_any_order[5]",
    "tests/storage/test_model.py::test_any_order_of_calls[shape0-0.1]",
    "tests/storage/test_queues_exit.py::test_the_interpreter_ends_with_a_full_queue[0.5-0]",
    "tests/storage/test_queues_model.py::test_the_machine_finds[CancelsNothing]",
    "tests/storage/test_queues_model.py::test_the_machine_finds[ForgetsErrors]",
    "tests/storage/test_queues_model.py::test_the_machine_finds[LastFirst]",
    "tests/storage/test_queues_model.py::test_the_machine_finds[RunsAll]",
    "tests/storage/test_remote.py::test_a_block_that_is_there_when_the_deadline_passes_is_no_miss",
    "tests/storage/test_remote.py::test_a_body_that_is_cut_is_resumed_from_its_first_missing_byte[0-FIN]",
    "tests/storage/test_remote.py::test_a_body_that_is_cut_is_resumed_from_its_first_missing_byte[0-RST]",
    "tests/storage/test_remote.py::test_a_body_that_is_cut_is_resumed_from_its_first_missing_byte[1-FIN]",
    "tests/storage/test_remote.py::test_a_body_that_is_cut_is_resumed_from_its_first_missing_byte[1-RST]",
    "tests/storage/test_remote.py::test_a_damaged_object_counts_as_missing_until_a_save_writes_it_anew[segments1]",
    "tests/storage/test_remote.py::test_a_load_asks_no_bucket_what_it_has[1]",
    "tests/storage/test_remote.py::test_a_load_asks_no_bucket_what_it_has[3]",
    "tests/storage/test_remote.py::test_a_path_that_flips_a_bit_costs_no_object[segments1]",
    "tests/storage/test_remote.py::test_a_stall_longer_than_the_read_timeout_is_resumed",
    "tests/storage/test_remote.py::test_a_storm_of_503_opens_the_breaker_which_closes_again",
    "tests/storage/test_remote.py::test_a_wipe_takes_nothing_beside_the_prefix",
    "tests/storage/test_remote.py::test_a_wrong_object_is_a_miss_and_can_be_written_again[empty-None]",
    "tests/storage/test_remote.py::test_no_number_of_retries_outlasts_the_retry_timeout[fault1]",
    "tests/storage/test_remote.py::test_rows_may_be_written_once_a_save_has_returned[parts]",
    "tests/storage/test_remote.py::test_the_side_that_changed_a_compressed_object_is_found[frame-segments1]",
    "tests/storage/test_remote.py::test_what_a_store_answers_becomes_a_reason[401 Unauthorized\\nx-refused]",  # noqa: E501
    "tests/storage/test_row_queue.py::test_staging_of_one_block_lets_all_calls_end[0]",
    "tests/storage/test_row_queue.py::test_staging_of_one_block_lets_all_calls_end[2]",
    "tests/storage/test_row_queue.py::test_staging_of_one_block_lets_all_calls_end[3]",
    "tests/storage/test_rows_together.py::test_rows_that_are_taken_together",
    "tests/storage/test_rows_together.py::test_the_comparison_finds_rows_with_a_bug[EvictsAll]",
    "tests/storage/test_sized_rows.py::test_the_model_finds_rows_with_a_bug[LosesPages]",
    "tests/storage/test_slots.py::test_calls_that_wait_for_each_other_go_on",
    "tests/storage/test_space.py::test_a_chain_in_two_folders_loses_its_end[another model]",
    "tests/storage/test_space.py::test_one_bound_holds_over_all_forms[True]",
    "tests/storage/test_store.py::test_a_load_by_layer_that_staging_cannot_hold_at_once[2]",
    "tests/storage/test_store.py::test_a_process_that_ends_while_it_reads_loses_no_block[ring]",
    "tests/storage/test_store.py::test_two_splits_of_one_axis_are_read_beside_each_other[m1-layers-True]",
    "tests/storage/test_store.py::test_two_splits_of_one_axis_are_read_beside_each_other[m6-layers-False]",
    "tests/storage/test_store.py::test_two_splits_of_one_axis_are_read_beside_each_other[m7-layers-True]",
    "tests/tasks/test_ports.py::test_a_long_step_is_found",
    "tests/tasks/test_ports.py::test_ports_run_in_short_steps_and_beside_a_thread_that_holds_the_interpreter[idle]",
    "tests/tasks/test_runtime.py::test_the_end_of_the_interpreter_waits_for_work",
    "tests/tasks/test_schedules.py::test_a_thread_that_loops_and_waits_for_nothing_is_an_error[0.003]",
    "tests/test_docs.py::test_a_page_s_code_runs[as it is-docs/extending.md]",
    "tests/test_docs.py::test_a_page_s_code_runs[cuda without a driver-docs/extending.md]",
    "tests/test_docs.py::test_the_examples_of_extending_keep_their_contract[transport-portakv_examples.channel_transport:ChannelTransport]",
    "tests/test_ext.py::test_a_backend_loads_neither_stores_nor_migration",
    "tests/test_import.py::test_plugs_bring_no_engine",
    "tests/test_ready.py::test_its_end_is_reported[import atexit, sys; atexit.register(print, 'end', file=sys.stderr)-0-end\\n]",  # noqa: E501
    "tests/test_ready.py::test_its_end_is_reported[raise SystemExit(3)-3-]",
    "tests/view/test_overlap.py::test_sums_are_found_as_a_search_of_all_finds_them",
    "tests/view/test_read_only.py::test_a_process_survives_it",
    "tests/view/test_slicing.py::test_factors_of_blocks_or_tokens_in_any_order[4-block]",
    "tests/witness/test_faults.py::test_right_heads_of_another_number_of_ranks_are_accepted[False-2-8]",
    "tests/witness/test_faults.py::test_right_heads_of_another_number_of_ranks_are_accepted[True-2-8]",
    "tests/witness/test_fingerprint.py::test_the_kernel_has_the_sums_of_torch[heads inside tokens]",
}
#: Tables of many like cases: a sixth of them is in the default run, the others in .ci/full. Which
#: ones follows from their names, so that no parameter is left out as a whole.
LARGE = {
    "tests/backends/test_ascend_npu.py::test_which_op_serves",
    "tests/backends/test_every_backend.py::test_a_bad_id_moves_nothing_and_is_told",
    "tests/backends/test_every_backend.py::test_bad_blocks_on_either_side",
    "tests/backends/test_every_backend.py::test_every_byte_lands",
    "tests/backends/test_every_backend.py::test_no_state_of_torch_s_changes_a_copy",
    "tests/backends/test_every_backend.py::test_threads_share_a_launch[compiled]",
    "tests/backends/test_mlu.py::test_each_kind_of_cache_goes_by_its_op",
    "tests/backends/test_mlu.py::test_padding_and_block_tables",
    "tests/backends/test_rows_kernel.py::test_a_seeded_bug_is_caught",
    "tests/backends/test_triton.py::test_the_generated_code_has_the_vector_width",
    "tests/benchmarks/test_benchmarks_migration.py::test_one_wrong_byte_is_seen_and_one_elsewhere",
    "tests/cli/test_explain.py::test_explain_takes_every_preset",
    "tests/conformance/test_conform_honest.py::test_each_claim_is_tested_within_the_others",
    "tests/conformance/test_pack_mutants.py::test_every_mutant_is_caught",
    "tests/connector/test_connector.py::test_a_batch_in_slices_is_checked_before_its_first_copy",
    "tests/connector/test_in_graph.py::test_a_load_stands_behind_the_chunk_and_before_reads_of_the_cache",
    "tests/copy/test_ambient_state.py::test_every_backend_passes_its_self_check",
    "tests/copy/test_ambient_state.py::test_no_ambient_state_changes_what_is_moved",
    "tests/copy/test_between.py::test_every_byte_of_every_shape",
    "tests/copy/test_block_order.py::test_blocks_come_behind_their_producer",
    "tests/copy/test_block_order.py::test_ids_of_one_call_cross_together_without_a_wait",
    "tests/copy/test_block_order.py::test_memory_that_everybody_forgets",
    "tests/copy/test_block_order.py::test_two_devices",
    "tests/copy/test_blocks.py::test_every_byte_lands",
    "tests/copy/test_blocks.py::test_skipped_blocks",
    "tests/copy/test_checked_once.py::test_bad_ids_of_encoded_rows_are_read_once",
    "tests/copy/test_checked_once.py::test_encoded_rows_are_checked_once",
    "tests/copy/test_checked_once.py::test_padding_of_encoded_rows_is_left_out_of_all_layers",
    "tests/copy/test_detached.py::test_every_byte_of_many_lands",
    "tests/copy/test_inside.py::test_blocks_between_two_views",
    "tests/copy/test_inside.py::test_ids_of_the_host_travel_with_as_many_launches_as_it_takes",
    "tests/copy/test_ordering.py::test_a_copy_waits_for_its_producer",
    "tests/copy/test_pitfalls.py::test_lists_of_any_length_make_and_order",
    "tests/copy/test_properties.py::test_every_destination",
    "tests/copy/test_rotated_overflow.py::test_blocks_that_do_not_fit_are_named_by_the_callers_numbers",
    "tests/copy/test_rotated_overflow.py::test_other_rows_have_their_own_numbers",
    "tests/copy/test_terms.py::test_blocks_in_part",
    "tests/host/test_host_ambient.py::test_small_copies",
    "tests/host/test_memcpy.py::test_a_source_whose_elements_share_addresses",
    "tests/host/test_memcpy_device.py::test_a_copy_waits_for_its_producer",
    "tests/host/test_memcpy_device.py::test_every_byte_lands",
    "tests/host/test_pinned.py::test_no_memory",
    "tests/host/test_small.py::test_values",
    "tests/host/test_small_inline.py::test_every_count",
    "tests/integrations/test_lmcache_ops.py::test_blocks_there_and_back",
    "tests/integrations/test_lmcache_ops.py::test_slots_by_addresses",
    "tests/integrations/test_matrix.py::test_a_release_that_is_not_served",
    "tests/integrations/test_sglang_settings.py::test_a_release_without_the_interface",
    "tests/integrations/test_transformers.py::test_a_model_goes_on_behind_a_prefix",
    "tests/integrations/test_transformers_changes.py::test_a_hook_changes_a_layer_after_its_attention",
    "tests/integrations/test_transformers_changes.py::test_a_model_goes_on_after_a_change",
    "tests/integrations/test_transformers_hybrids.py::test_a_next_turn_goes_on_as_the_cache_would",
    "tests/integrations/test_transformers_hybrids.py::test_what_is_left_out_is_noticed",
    "tests/integrations/test_vllm_ranks.py::test_states_of_other_numbers_of_ranks_are_found",
    "tests/interconnect/test_pageable.py::test_an_interrupt_leaves_the_ring_usable",
    "tests/interconnect/test_peer.py::test_the_kernel_reads_a_peers_rows_and_asks_nothing_of_pinned_memory",
    "tests/interconnect/test_pieces.py::test_every_byte_of_any_layout",
    "tests/interconnect/test_pieces.py::test_what_strategies_meet",
    "tests/interconnect/test_pieces.py::test_wide_runs_stay_pieces",
    "tests/interconnect/test_staged.py::test_every_byte",
    "tests/interconnect/test_staged.py::test_every_copy_of_the_table",
    "tests/interconnect/test_staged.py::test_other_transfers_of_one_launch",
    "tests/interconnect/test_staged.py::test_what_is_kept_of_a_transfer_serves_no_other",
    "tests/interconnect/test_zero_copy.py::test_a_seeded_bug_is_caught",
    "tests/interconnect/test_zero_copy.py::test_every_cut",
    "tests/migrate/test_described.py::test_a_view_of_a_preset_is_rebuilt_at_other_addresses",
    "tests/migrate/test_marks.py::test_a_pull_that_ends_before_its_offer_is_complete",
    "tests/migrate/test_marks.py::test_an_offer_that_ends_before_it_is_complete_ends_the_pull",
    "tests/migrate/test_marks.py::test_owners_of_a_half_raise_separate_marks",
    "tests/migrate/test_marks_processes.py::test_rows_of_another_process_come_as_it_writes_them",
    "tests/migrate/test_pull.py::test_nothing_of_the_callers_settings_matters",
    "tests/serving/test_handover_hybrids.py::test_each_group_matters",
    "tests/serving/test_handover_hybrids.py::test_requests_cross",
    "tests/serving/test_hybrids.py::test_a_load_without_a_group_is_noticed",
    "tests/serving/test_hybrids.py::test_kept_blocks_are_not_missed",
    "tests/serving/test_rehearsal.py::test_the_caches_keep_their_bytes",
    "tests/serving/test_rehearsal.py::test_the_kernels_of_a_real_pull_are_prepared",
    "tests/serving/test_scheduler_side.py::test_any_walk_of_an_engine",
    "tests/serving/test_store_server.py::test_walks_of_ranks_that_join_copy_stop_and_die",
    "tests/serving/test_worker_side.py::test_walks_of_an_engine_over_a_block_store",
    "tests/storage/test_chains.py::test_predecessors_are_there_again",
    "tests/storage/test_engine.py::test_a_forked_child_is_refused",
    "tests/storage/test_forms.py::test_each_form_has_its_own_blocks_under_the_same_keys",
    "tests/storage/test_partial_loads.py::test_rows_of_a_negative_block_are_not_written",
    "tests/storage/test_remote.py::test_a_wrong_object_is_a_miss_and_can_be_written_again",
    "tests/storage/test_space.py::test_a_kill_while_a_form_gives_way",
    "tests/storage/test_store.py::test_ranks_of_another_size_load_what_others_saved",
    "tests/storage/test_store.py::test_two_splits_of_one_axis_are_read_beside_each_other",
}
#: Examples of a property test in each run; .ci/full draws more.
EXAMPLES = 25

_frozen = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Load the profile before any test module is imported, so that decorators can read it."""
    patch_points.guard()
    # It reads the constants of every module, and keeps them below the current folder otherwise: a
    # process in another folder would read all modules again.
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(config.rootpath / ".hypothesis"))
    # Warnings of faults that last come whenever the loop looks, also into another test's log.
    logging.getLogger("portakv.graph.alarms").setLevel(logging.ERROR)
    with suppress(ImportError):
        # Its monitor, a thread, would wait by locks that a schedule simulates.
        bars: Any = importlib.import_module("tqdm").tqdm
        bars.monitor_interval = 0
    if name := os.environ.get("SIMDEV_NAME"):
        simdev.load(name)  # a child of own_process: its modules may look at the device
    if "PYTEST_XDIST_WORKER" in os.environ:
        # A worker has one core: threads of several workers would wait for each other, seconds long.
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # The machine's load, not the code, decides how long an example takes: no time is judged.
    checks = (HealthCheck.too_slow,)
    settings.register_profile(
        "fixed",
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=checks,
    )
    settings.load_profile("fixed")
    if (examples := config.getoption("--fuzz")) is not None:
        fixed = settings.get_profile("fixed")
        settings.register_profile(
            "fuzz", fixed, derandomize=False, max_examples=examples, print_blob=True
        )
        settings.load_profile("fuzz")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let SIGINT interrupt, also in a process that was started in the background and ignores it.

    No callback of a collection of garbage, such as Hypothesis's, runs meanwhile: Python ignores an
    interrupt that is raised in one.
    """
    callbacks = gc.callbacks[:]
    gc.callbacks.clear()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    gc.callbacks[:] = callbacks


_SIMDEV = "privateuseone"  # torch's own name for the simulated device
#: What a test with the fixture `accelerator` runs on, each with the marker of its device.
ACCELERATORS = [
    pytest.param(torch.device(_SIMDEV, 0), id="simdev", marks=pytest.mark.simdev),
    pytest.param(torch.device("cuda", 0), id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=[pytest.param(torch.device("cpu"), id="cpu"), *ACCELERATORS])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Yield the host, the simulated device, and a CUDA device if there is one."""
    yield request.param
    _check_simdev(request.param)


@pytest.fixture(params=ACCELERATORS)
def accelerator(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Yield the devices with streams: the simulated device, and a CUDA device if there is one."""
    yield request.param
    _check_simdev(request.param)


def _check_simdev(used: torch.device) -> None:
    """Check that no work of the test on the simulated device touched freed memory."""
    if used.type == torch.device(_SIMDEV).type:
        for index in range(2):
            torch.accelerator.synchronize(torch.device(_SIMDEV, index))
        assert not simdev.take_faults()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep the collected tests out of every later collection of garbage: tests cause many.

    What the collection of tests left is frozen as well: 20 MB are cheaper than to look for them
    among a million objects.
    """
    _freeze(session.config)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Keep out of them what tests leave for good, such as modules and torch's compiled programs."""
    modules = len(sys.modules) > item.config.stash[_frozen] + MANY_MODULES
    if modules or (nextitem is not None and nextitem.path != item.path):
        gc.collect()
        _freeze(item.config)


def _freeze(config: pytest.Config) -> None:
    _let_loggers_propagate()
    gc.freeze()
    config.stash[_frozen] = len(sys.modules)


def _let_loggers_propagate() -> None:
    """Have the records of all loggers reach the root, where pytest captures them.

    pytest adds its handlers to each logger that does not propagate as well, and removes them, six
    times for each test. torch has forty of them.
    """
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Load the simulated device before the first test that needs it."""
    own = item.get_closest_marker("own_process")
    simulates = item.get_closest_marker("simdev") is not None
    if not simulates and (own is None or not own.args[0]):
        return
    if simdev.available() is not None:
        return  # it is marked to be skipped
    if why := simulated.built():
        pytest.skip(f"The simulated device was not compiled. {why}")
    if simulates:
        simdev.load(os.environ.get("SIMDEV_NAME", "simdev"))


@pytest.fixture(scope="session", autouse=True)
def collect_dead_graphs() -> None:
    """Let a capture begin by the collection of garbage.

    Otherwise a graph of an earlier test may be destroyed in the middle of a capture, which ends it.
    """
    if torch.cuda.is_available():
        torch.compiler.config.force_cudagraph_gc = True


@pytest.fixture(autouse=True)
def forget_answers() -> Iterator[None]:
    """Forget the answers about the build of torch, which a test may have patched."""
    yield
    cuda.why_not.cache_clear()
    link.why_not.cache_clear()


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark as wide what takes seconds, and all but a sixth of the cases of a large table."""
    large = item.nodeid.partition("[")[0] in LARGE and zlib.crc32(item.nodeid.encode()) % 6
    if (large or item.nodeid in LONG) and not item.get_closest_marker("gpu"):
        item.add_marker(pytest.mark.full)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave opt-in tests out unless `-m` names their marker; skip tests of devices that are absent.

    Tests of the simulated device come last: once loaded it stays torch's accelerator in a process,
    and each worker runs its tests in this order.
    """
    expression = config.getoption("-m")
    left_out = {mark for mark in OPT_IN if not re.search(rf"\b{mark}\b", expression)}
    selected: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        (dropped if marks & left_out else selected).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = selected
    items.sort(key=lambda item: item.get_closest_marker("simdev") is not None)
    if worker := getattr(config, "workerinput", None):
        from support.scheduling import tell_groups

        tell_groups(items, worker)
    absent = {
        "gpu": None if torch.cuda.is_available() else NO_GPU,
        "simdev": simdev.available(),
        "own_process": simdev.available(),
    }
    for item in items:
        for mark, reason in absent.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
