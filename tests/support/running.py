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
#: Cases that start processes or compilers for seconds, and have a relative in the default run.
LONG = {
    "tests/backends/test_hip_code.py::test_amds_runtime_says_that_there_is_no_device",
    "tests/backends/test_hip_code.py::test_without_the_words_for_amd_the_check_fails[words1-B of LDS]",  # noqa: E501
    "tests/backends/test_pack_kernel.py::test_every_byte_is_as_the_format_says[cpu-16x576-3bits-block token dim]",  # noqa: E501
    "tests/backends/test_pack_kernel.py::test_every_byte_of_the_text_for_amd[16x128-4bits-kv block token head dim]",  # noqa: E501
    "tests/backends/test_pack_kernel.py::test_every_byte_of_the_text_for_amd[16x576-3bits-block token dim]",  # noqa: E501
    "tests/benchmarks/test_benchmarks_command.py::test_most_suites_need_torch_and_numpy_alone",
    "tests/benchmarks/test_benchmarks_host.py::test_plots_of_a_recorded_result[h200-host-ratio interference]",  # noqa: E501
    "tests/cli/test_doctor.py::test_beside_an_accelerator[simdev]",
    "tests/cli/test_store_serve.py::test_a_service_without_standard_streams_ends_in_order[how1]",
    "tests/conformance/test_conform_suite_run.py::test_exit_codes",
    "tests/conformance/test_rope_faults.py::test_without_a_fault_all_cases_pass",
    "tests/core/test_library.py::test_a_compiler_that_links_nothing_does_not_count[127]",
    "tests/core/test_library.py::test_a_library_of_another_contract_is_rejected[no function]",
    "tests/examples/test_offload_transformers.py::test_the_example_is_bit_identical_and_its_control_is_not[pageable]",
    "tests/examples/test_prefix_store.py::test_a_second_engine_finds_the_prefix_in_a_remote_store",
    "tests/graph/test_meter.py::test_nothing_is_imported_unless_it_is_asked_for[portakv.graph]",
    "tests/graph/test_meter.py::test_nothing_is_imported_unless_it_is_asked_for[portakv.storage]",
    "tests/host/test_pinned.py::test_a_process_that_ends",
    "tests/host/test_pinned.py::test_calls_of_compiled_functions[allocated-aot_eager]",
    "tests/host/test_pinned.py::test_calls_of_compiled_functions[registered_in_place-eager]",
    "tests/host/test_pool_interrupts.py::test_an_interrupt_loses_no_block[PinnedPool]",
    "tests/integrations/test_transformers_changes.py::test_a_compiled_model_generates[eager]",
    "tests/integrations/test_transformers_changes.py::test_any_calls_give_what_transformers_cache_gives[simdev-inference]",
    "tests/integrations/test_transformers_changes.py::test_any_calls_give_what_transformers_cache_gives[simdev-no grad]",  # noqa: E501
    "tests/integrations/test_transformers_changes.py::test_compiled_calls_of_a_cache[aot_eager]",
    "tests/integrations/test_transformers_faults.py::test_a_disk_that_fails_in_a_load[EIO-control]",
    "tests/integrations/test_transformers_faults.py::test_a_disk_that_fails_in_a_load[ENOSPC-control]",
    "tests/integrations/test_transformers_faults.py::test_a_disk_that_fails_in_a_load[ENOSPC-guarded]",
    "tests/integrations/test_transformers_faults.py::test_a_disk_that_fails_in_a_save[ENOSPC]",
    "tests/integrations/test_transformers_faults.py::test_a_disk_that_fails_in_a_save[a hang]",
    "tests/integrations/test_transformers_faults.py::test_damaged_blocks_are_computed[swapped]",
    "tests/integrations/test_transformers_faults.py::test_damaged_blocks_come_without_their_checks[swapped]",
    "tests/interconnect/test_choose_devices.py::test_pages_cross_by_a_copy_engine_for_any_ids[simdev-False-layers-h2d]",
    "tests/interconnect/test_choose_devices.py::test_pages_cross_by_a_copy_engine_for_any_ids[simdev-True-layers-d2h]",
    "tests/interconnect/test_staged.py::test_streams_have_staging_of_their_own[small-simdev-h2d]",
    "tests/migrate/test_channel.py::test_strangers_who_take_all_descriptors_do_not_hold_up_those_who_are_served",
    "tests/migrate/test_channel.py::test_the_interpreters_end_closes",
    "tests/migrate/test_channel_stopped.py::test_no_side_blames_the_secret_of_a_process_that_was_stopped[tcp]",
    "tests/migrate/test_checksum_kernel.py::test_amds_hiprtc_compiles_the_kernel",
    "tests/migrate/test_marks_processes.py::test_an_owner_that_is_killed_before_its_rows_are_complete[whole-mapped]",
    "tests/migrate/test_marks_processes.py::test_offers_and_pulls_that_end_at_any_moment[6-staging]",
    "tests/migrate/test_marks_processes.py::test_owners_that_are_killed_at_any_moment[6-staging]",
    "tests/migrate/test_models.py::test_the_example_computes_in_two_processes[cpu]",
    "tests/migrate/test_named.py::test_an_owner_that_is_killed_ends_the_wait_of_its_pulls_alone",
    "tests/migrate/test_named.py::test_an_owner_that_is_stopped_delays_no_other",
    "tests/migrate/test_named.py::test_an_owner_that_wakes_late_is_waited_for",
    "tests/migrate/test_named.py::test_stopped_owners_are_asked_together",
    "tests/migrate/test_pull_processes.py::test_killed_at_any_moment_nothing_leaks_and_nobody_hangs[10]",
    "tests/migrate/test_pull_soak.py::test_no_stale_row_at_readers_that_are_killed[mapped-26-host]",
    "tests/migrate/test_resources.py::test_a_channel_and_a_store_need_no_shared_memory_folder[mount -t tmpfs -o ro none]",  # noqa: E501
    "tests/migrate/test_resources.py::test_few_descriptors_are_an_error_or_enough[disk]",
    "tests/migrate/test_weights_in_flight.py::test_the_end_of_the_process_cancels_a_pull_in_flight",
    "tests/migrate/test_weights_staged.py::test_a_reader_that_dies_releases_the_owners_staging",
    "tests/migrate/test_weights_staged.py::test_weights_that_another_host_shares_cross_by_tcp",
    "tests/migrate/transports/test_distributed.py::test_an_owner_killed_in_mid_chunk_is_told_by_the_channel",
    "tests/runtime/test_devices.py::test_a_backend_is_judged_on_its_own_kind[npu]",
    "tests/runtime/test_devices.py::test_a_broken_package_s_own_words[immediately]",
    "tests/runtime/test_devices.py::test_a_package_that_torch_did_not_load_serves[npu]",
    "tests/serving/test_handovers.py::test_any_walk_of_two_engines[1]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_owner_of_an_offer[cpu-staging-control]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_owner_of_an_offer[cpu-staging-guarded]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_owner_of_an_offer[simdev-mapped-control]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_owner_of_an_offer[simdev-mapped-guarded]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_owner_of_an_offer[simdev-staging-control]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_owner_of_an_offer[simdev-staging-guarded]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_store_server_of_a_load[simdev-control]",
    "tests/serving/test_owner_killed_in_a_replay.py::test_the_store_server_of_a_load[simdev-guarded]",
    "tests/serving/test_scheduler_side.py::test_any_walk_of_an_engine[12]",
    "tests/storage/test_disk.py::test_killed_at_random[few-threads]",
    "tests/storage/test_disk.py::test_restarted_while_writes_are_in_flight[threads]",
    "tests/storage/test_forms.py::test_any_calls_bring_right_bytes_or_nothing[3]",
    "tests/storage/test_interrupts.py::test_an_interrupt_at_any_line_leaves_nothing[leaving]",
    "tests/storage/test_kills.py::test_kills_at_random[few-threads]",
    "tests/storage/test_kills.py::test_kills_of_a_process_that_saves_several_forms[few-ring]",
    "tests/storage/test_lent.py::test_what_a_killed_process_did_not_copy_is_not_stored",
    "tests/storage/test_remote.py::test_a_load_asks_no_bucket_what_it_has[3]",
    "tests/tasks/test_ports.py::test_a_port_runs_in_short_steps_and_beside_a_thread_that_holds_the_interpreter[pull-idle]",
    "tests/tasks/test_ports.py::test_a_port_runs_in_short_steps_and_beside_a_thread_that_holds_the_interpreter[store server-busy]",  # noqa: E501
    "tests/tasks/test_ports.py::test_a_port_runs_in_short_steps_and_beside_a_thread_that_holds_the_interpreter[store server-idle]",  # noqa: E501
    "tests/tasks/test_ports.py::test_a_port_runs_in_short_steps_and_beside_a_thread_that_holds_the_interpreter[store-busy]",
    "tests/tasks/test_ports.py::test_a_port_runs_in_short_steps_and_beside_a_thread_that_holds_the_interpreter[store-idle]",
    "tests/tasks/test_schedules.py::test_a_thread_that_loops_and_waits_for_nothing_is_an_error[0.003]",
    "tests/test_ext.py::test_a_backend_loads_neither_stores_nor_migration",
    "tests/test_import.py::test_plugs_bring_no_engine",
}
#: Tables of many like cases: a sixth of them is in the default run, the others in .ci/full. Which
#: ones follows from their names, so that no parameter is left out as a whole.
LARGE = {
    "tests/backends/test_every_backend.py::test_every_byte_lands",
    "tests/backends/test_every_backend.py::test_no_state_of_torch_s_changes_a_copy",
    "tests/cli/test_explain.py::test_explain_takes_every_preset",
    "tests/copy/test_between.py::test_every_byte_of_every_shape",
    "tests/copy/test_block_order.py::test_memory_that_everybody_forgets",
    "tests/copy/test_blocks.py::test_every_byte_lands",
    "tests/copy/test_blocks.py::test_skipped_blocks",
    "tests/copy/test_checked_once.py::test_bad_ids_of_encoded_rows_are_read_once",
    "tests/copy/test_checked_once.py::test_encoded_rows_are_checked_once",
    "tests/copy/test_checked_once.py::test_padding_of_encoded_rows_is_left_out_of_all_layers",
    "tests/copy/test_ordering.py::test_a_copy_waits_for_its_producer",
    "tests/copy/test_pitfalls.py::test_lists_of_any_length_make_and_order",
    "tests/copy/test_properties.py::test_every_destination",
    "tests/copy/test_terms.py::test_blocks_in_part",
    "tests/host/test_host_ambient.py::test_small_copies",
    "tests/host/test_memcpy.py::test_a_source_whose_elements_share_addresses",
    "tests/host/test_memcpy_device.py::test_every_byte_lands",
    "tests/host/test_pinned.py::test_no_memory",
    "tests/host/test_small.py::test_values",
    "tests/host/test_small_inline.py::test_every_count",
    "tests/integrations/test_lmcache_ops.py::test_blocks_there_and_back",
    "tests/integrations/test_lmcache_ops.py::test_slots_by_addresses",
    "tests/integrations/test_matrix.py::test_a_release_that_is_not_served",
    "tests/integrations/test_sglang_settings.py::test_a_release_without_the_interface",
    "tests/interconnect/test_pieces.py::test_every_byte_of_any_layout",
    "tests/interconnect/test_pieces.py::test_what_strategies_meet",
    "tests/interconnect/test_pieces.py::test_wide_runs_stay_pieces",
    "tests/interconnect/test_staged.py::test_every_byte",
    "tests/interconnect/test_staged.py::test_every_copy_of_the_table",
    "tests/interconnect/test_staged.py::test_other_transfers_of_one_launch",
    "tests/interconnect/test_staged.py::test_what_is_kept_of_a_transfer_serves_no_other",
    "tests/interconnect/test_zero_copy.py::test_every_cut",
    "tests/migrate/test_described.py::test_a_view_of_a_preset_is_rebuilt_at_other_addresses",
    "tests/serving/test_scheduler_side.py::test_any_walk_of_an_engine",
    "tests/serving/test_store_server.py::test_walks_of_ranks_that_join_copy_stop_and_die",
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
