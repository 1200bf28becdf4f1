# SPDX-License-Identifier: Apache-2.0
"""Two engines that hand requests over, by the hooks of vLLM's connector, without vLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support import ready
from support.vllm_stub import write_vllm
from support.waits import LIMIT

from portakv.errors import InvalidTerms
from portakv.integrations.vllm.caches import roles_of
from portakv.serving.handover import HandoverTerms

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What has happened in a process with a stand-in of vLLM."""
    folder = tmp_path_factory.mktemp("vllm")
    write_vllm(folder)
    paths = [str(folder), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = ready.run("-m", "support.vllm_handover_hooks", env=environment, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return {**made, "log": done.stderr}


def test_rows_of_a_prompt_cross_to_other_blocks(seen: dict[str, Any]) -> None:
    """The scheduler is offered the whole prompt, which a worker pulls outside of its steps."""
    assert seen["offered"] == [40, True]
    assert seen["right"]
    assert seen["decode"]["pulled_tokens"] == 40


def test_a_first_hand_over_makes_nothing_that_the_start_has_not_made(seen: dict[str, Any]) -> None:
    """No module is imported, and no kind of thread begins: the start has rehearsed it."""
    at_start = {*seen["at_start"]}
    assert {"portakv.backends.reference", "portakv loop"} <= at_start
    assert {*seen["later"]} - at_start == set()
    assert seen["blank"] == [False, False]


def test_blocks_are_retained_until_the_rows_are_released(seen: dict[str, Any]) -> None:
    assert seen["retained"] is True
    assert seen["sent"] == [[], ["p"]]
    assert seen["prefill"] == {
        "requests": 0,
        "jobs": 0,
        "failed_keys": 0,
        "offers": 1,
        "offers_taken": 1,
    }


def test_a_request_carries_the_keys_of_vllms_proxies(seen: dict[str, Any]) -> None:
    assert {"do_remote_prefill", "do_remote_decode", "portakv"} <= {*seen["keys"]}


def test_a_second_pull_is_reported_as_a_failed_load(seen: dict[str, Any]) -> None:
    """With the blocks that have no rows of their own."""
    assert seen["failed"] == [[], [1, 6, 7, 8, 9]]
    assert seen["decode"]["failed_pulls"] == 1
    assert "its readers have taken it" in seen["log"]


def test_a_ticket_of_another_prompt_is_not_used(seen: dict[str, Any]) -> None:
    assert seen["other"] == [0, False]
    assert "Expected a ticket for the same prompt" in seen["log"]


def test_requests_that_end_here_are_not_offered(seen: dict[str, Any]) -> None:
    assert seen["ended"] == [False, None]


def test_a_preempted_prompt_that_is_to_be_handed_over_is_computed_anew(
    seen: dict[str, Any],
) -> None:
    """Else it may end with its output in flight, and has no rows to offer."""
    assert seen["delivers"] == [True, False]


def test_tokens_that_were_found_nowhere_are_counted(seen: dict[str, Any]) -> None:
    """Once for a lookup; those that come from another engine, and that the engine has, are not."""
    assert seen["computed"] == 40
    assert seen["decode"]["computed"] == 40  # of the ticket of another prompt, not of the pulls


def test_lines_have_the_form_of_the_engines_own(seen: dict[str, Any]) -> None:
    """Each once, from INFO on; one says at the start where blocks are stored."""
    lines = seen["log"].splitlines()
    assert [line for line in lines if not line.startswith("vLLM ")] == []
    starts = [line for line in lines if "PortaKV stores" in line]
    assert starts == [
        "vLLM INFO portakv.serving.local: PortaKV stores blocks of 64 tokens in 1 MiB of host "
        "memory, with 1 MiB of staging. 0 are there. This process serves them."
    ]


@pytest.mark.parametrize(
    ("role", "extra", "offers", "pulls", "stores"),
    [
        ("kv_both", {"host": 1}, None, None, True),
        ("kv_both", {}, None, None, True),
        ("kv_both", {"host": 1, "spans": True}, None, None, True),
        ("kv_both", {"hand_over": {}}, True, True, True),
        ("kv_producer", {"spans": True}, True, False, False),
        ("kv_producer", {}, True, False, False),
        ("kv_producer", {"folder": "/a", "hand_over": {"lease": 5.0}}, True, False, True),
        ("kv_consumer", {"hand_over": {"timeout": 5.0}}, False, True, False),
        ("kv_consumer", {"host": 1}, False, True, True),
    ],
)
def test_what_an_engine_does_by_its_role(
    role: str, extra: dict[str, Any], offers: bool | None, pulls: bool | None, stores: bool
) -> None:
    handing, has_store, store, spans = roles_of(role, extra)
    assert has_store is stores
    assert store == {x: value for x, value in extra.items() if x not in ("hand_over", "spans")}
    assert spans is ("spans" in extra)
    if offers is None:
        assert handing is None
    else:
        assert handing == (HandoverTerms.of(extra.get("hand_over", {})), offers, pulls)


def test_spans_that_are_neither_on_nor_off_are_refused() -> None:
    with pytest.raises(InvalidTerms, match=r"kv_connector_extra_config: .*spans.* got 'yes'"):
        roles_of("kv_both", {"spans": "yes"})
