# SPDX-License-Identifier: Apache-2.0
"""`portakv demo`: each thing that it claims to prove, made to fail."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest
import torch
from support.command_line import registered, run, run_json
from support.small_backends import small_backend, wipe

from portakv import AdaptiveConnector, KVView, Transfer
from portakv.cli import demo
from portakv.cli.demo import FOUNDING, Founding, fitted, pool_bytes, run_model
from portakv.runtime.devices import usual_device

SMALL = replace(FOUNDING, layers=3, tokens=24, heads=2, dim=8, block_size=8, pool=2)
PAYLOAD = 3 * 2 * 24 * 2 * 8 * 2
POOL = 3 * 2 * 48 * 2 * 8 * 2
DEVICE = usual_device()
pytestmark = pytest.mark.xdist_group("transformers")  # one process imports it, for ten seconds


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds of a scenario of a few kilobytes."""
    monkeypatch.setattr("portakv.cli.demo.FOUNDING", SMALL)
    monkeypatch.setattr(demo, "ROUNDS", 3)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    part = {"skipped": "left out by a test", "story": []}
    monkeypatch.setattr("portakv.cli.demo.run_model", lambda device: part)


# the first part


def test_without_transformers_the_model_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, demo.EXAMPLE, raising=False)
    code, out, _ = run("demo", "--device", "cpu")
    assert (code, "pip install -e '.[demo]'" in out, "all right through" in out) == (0, True, True)


def test_a_release_of_transformers_that_is_not_served_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (demo.EXAMPLE, "portakv.integrations.transformers.caches"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    real = metadata.version

    def version(name: str) -> str:
        return "4.57" if name == "transformers" else real(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    assert "expects transformers 5.17 and newer" in run_model(DEVICE)["skipped"]
    assert "4.57 is installed" in capsys.readouterr().out


def test_a_missing_example_is_not_blamed_on_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "EXAMPLE", "portakv.cli.no_such_example")
    with pytest.raises(ModuleNotFoundError, match="no_such_example"):
        run_model(DEVICE)


def test_logits_that_changed_make_the_demo_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdaptiveConnector, "from_gpu", lambda *_, **__: Transfer())
    code, out, _ = run("demo", "--device", "cpu")
    assert (code, "logits    NOT bit-identical" in out) == (1, True)


# the second part: its check of bytes


def test_the_check_of_a_chunk_and_of_pages_counts_wrong_bytes() -> None:
    made = Founding(torch.device("cpu"), SMALL)
    for ids in (made.slots.tolist(), made.blocks.tolist()):
        assert len(ids) == len(set(ids))
        assert sorted(ids) != ids
    made.poison()
    slots = made.slots.tolist()
    assert made.wrong_in_chunk(made.slots) > PAYLOAD // 2
    assert made.wrong_in_target(made.slots) > PAYLOAD // 2
    for layer in range(3):
        for at, slot in enumerate(slots):
            rows = made.pool[layer][:, slot // 8, slot % 8]
            made.chunk[:, layer, at] = rows.reshape(2, 16)
            rows = made.stored[:, layer, at].reshape(2, 2, 8)
            made.target[layer][:, slot // 8, slot % 8] = rows
    assert made.wrong_in_chunk(made.slots) == made.wrong_in_target(made.slots) == 0
    made.chunk.view(torch.uint8)[1, 2, 3, 4] ^= 1
    assert made.wrong_in_chunk(made.slots) == 1
    left = next(slot for slot in range(48) if slot not in slots)  # also outside of the slots
    made.target[1].view(torch.uint8)[1, left // 8, left % 8, 1, 0] ^= 1
    assert made.wrong_in_target(made.slots) == 1


# the second part: its backends


def rows_of(report: Any, backend: str) -> list[dict[str, Any]]:
    return [row for row in report["moves"] if row["backend"] == backend]


def test_every_backend_is_checked_and_timed() -> None:
    with registered(twin=small_backend("twin")):
        report = run_json("demo", "--device", "cpu")
    assert (report["ok"], report["chosen"]) == (True, "twin")
    model = report["model"]
    assert (model["skipped"], model["identical"], model["control_differs"]) == (None, True, True)
    assert any("bit-identical to" in line for line in model["story"])
    assert report["scenario"]["payload_bytes"] == PAYLOAD
    assert report["candidates"][-1]["name"] == "reference"
    assert [row["backend"] for row in report["moves"][:7]] == [*["torch"] * 3, *["twin"] * 4]
    plain = [row["call"] for row in rows_of(report, "torch")]
    assert plain == ["copy_", "indexing", "indexing"]
    for row in report["moves"]:  # one figure, whatever the rounds were like
        assert row["ratio"] == report["moves"][0]["seconds"] / row["seconds"]
    for name in ("twin", "reference"):
        rows = rows_of(report, name)
        assert [row["call"] for row in rows] == ["from_gpu", "to_gpu", "copy_blocks", "copy_blocks"]
        assert [row["checked"] for row in rows] == [PAYLOAD, POOL, PAYLOAD, POOL]
        assert all(row["wrong"] == 0 and row["seconds"] > 0 and row["ratio"] > 0 for row in rows)


def flip(view: KVView) -> None:
    """Flip one bit after a copy, except for the copies of the self-check."""
    if view.slots in (24, 48):
        view.owners[-1].view(torch.uint8).flatten()[-1] ^= 1


def fail(view: KVView) -> None:
    if view.slots in (24, 48):
        raise ValueError("out of ideas")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("wrong", "code", "message"),
    [
        (flip, 1, "all right through reference WRONG or missing through odd"),
        (fail, 1, "odd, from_gpu, 24 slots -> chunk, failed: ValueError: out of ideas"),
        (wipe, 0, "self-check failed"),
    ],
)
def test_a_backend_that_is_wrong_hides_no_other(wrong: Any, code: int, message: str) -> None:
    with registered(odd=small_backend("odd", spoil=wrong)):
        ran = run("demo", "--device", "cpu")
    text = " ".join(ran.out.split())
    assert ran.code == code
    assert message in text
    assert "all right through reference" in text
    assert text.count("1 wrong") == (4 if wrong is flip else 0)
    assert ("odd rejected" in text) is (wrong is wipe)  # and so not run


@pytest.mark.usefixtures("no_model")
def test_a_backend_may_refuse_a_copy_but_not_when_it_is_forced_and_then_it_runs_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picky = small_backend("picky", rejects=lambda plan: plan.src_step == 8)
    with registered(picky=picky):
        report = run_json("demo", "--device", "cpu")
        monkeypatch.setenv("PORTAKV_BACKEND", "picky")
        code, _, err = run("demo", "--device", "cpu")
        monkeypatch.setenv("PORTAKV_BACKEND", "reference")
        alone = run_json("demo", "--device", "cpu")
        output = run("demo", "--device", "cpu").out
    refused = [row["refused"] is not None for row in rows_of(report, "picky")]
    assert (refused, report["ok"]) == ([False, False, True, False], True)
    assert (code, "check dislikes this plan" in err) == (1, True)
    assert alone["forced"] == alone["chosen"] == "reference"
    assert {row["backend"] for row in alone["moves"]} == {"torch", "reference"}
    assert "PORTAKV_BACKEND=reference is set: that backend runs alone." in output
    assert "PORTAKV_BACKEND forces it" in output


# what is printed


@pytest.mark.parametrize("forced", ["", "reference"])
def test_the_demo_fits_80_columns(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTAKV_BACKEND", forced)
    monkeypatch.setattr("portakv.cli.demo.FOUNDING", replace(FOUNDING, layers=1))
    ran = run("demo", "--device", "cpu")
    assert ran.code == 0
    assert max(map(len, ran.out.splitlines())) <= 80
    for text in ("bit-identical to", "vs copy_", "128 slots -> chunk", "all right", "is chosen"):
        assert text in ran.out


# memory and time


@pytest.mark.parametrize(("free", "layers"), [(None, 32), (8 << 30, 32), (1 << 30, 16), (0, 1)])
def test_the_scenario_is_fitted_to_free_memory(free: int | None, layers: int) -> None:
    assert FOUNDING.payload == 64 << 20 < pool_bytes(FOUNDING)
    assert fitted(FOUNDING, free).layers == layers


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("fits", [True, False])
def test_what_the_demo_says_is_what_it_did(fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's weights, the backends by name, and what it did not run or scaled down."""
    if not fits:
        monkeypatch.setattr("portakv.cli.demo.free_memory", lambda device: POOL)
    output = " ".join(run("demo", "--device", "cpu").out.split())
    assert "a small Llama with random weights; nothing is downloaded" in output
    assert "of KV cache through reference 24 tokens" in output
    assert "every backend" not in output
    assert ("compiled on request" in output) == ("so the demo did not run it" in output)
    assert ("24 tokens of 1 layers" in output) is not fits
    message = "Scaled down: 3 layers would take more than half of the free memory of cpu."
    assert (message in output) is not fits


def test_times_are_medians_of_rounds_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of (copy_, work): the machine is busy in the second, the first is left out."""
    times = iter([9.0, 900.0, 1.0, 2.0, 10.0, 20.0, 1.0, 4.0])
    monkeypatch.setattr(demo, "seconds", lambda device, work: next(times))
    assert demo.interleaved(torch.device("cpu"), [int, int]) == [1.0, 4.0]
