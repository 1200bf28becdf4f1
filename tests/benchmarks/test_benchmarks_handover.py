# SPDX-License-Identifier: Apache-2.0
"""How the benchmark of hand-overs judges answers, sums up rounds, and hands rows over to a host."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from portakv_benchmarks.engines import handover_hosts
from portakv_benchmarks.engines.checkpoint import WEIGHTS, write_checkpoint
from portakv_benchmarks.engines.first import First, judged
from portakv_benchmarks.engines.handover import Engines, Notes, rows_of
from portakv_benchmarks.engines.handover_faults import KINDS, PREEMPTED, row_of
from portakv_benchmarks.engines.handover_ranks import Ranks
from portakv_benchmarks.engines.handover_side import drawn_prompt
from portakv_benchmarks.engines.judging import Verdict, compare
from portakv_benchmarks.engines.models import PAIRS
from portakv_benchmarks.shared.tables import print_results

MACHINE = {"device": "a device", "torch": "2", "python": "3"}


def answer(*steps: tuple[int, float, int, float], tokens: list[int] | None = None) -> Any:
    """Return an answer; each step has the best two tokens and their logarithms."""
    made = [first for first, *_ in steps] if tokens is None else tokens
    best = [[[first, high], [second, low]] for first, high, second, low in steps]
    return {"tokens": made, "best": best}


EXPECTED = answer((5, -0.1, 6, -3.0), (7, -0.70, 8, -0.71), (9, -0.2, 1, -4.0))


def test_equal_answers() -> None:
    assert compare(EXPECTED, EXPECTED, 0.05) == Verdict.SAME
    near = answer((5, -0.11, 6, -3.0), (7, -0.70, 8, -0.71), (9, -0.2, 1, -4.0))
    assert compare(near, EXPECTED, 0.05) == Verdict.EQUAL


def test_tokens_that_are_nearly_as_likely() -> None:
    """After such a token, the answers are those of different texts."""
    other = answer((5, -0.1, 6, -3.0), (8, -0.70, 7, -0.71), (2, -0.2, 3, -4.0))
    assert compare(other, EXPECTED, 0.05) == Verdict.TIE
    assert compare(other, EXPECTED, 0.005) == Verdict.WRONG


@pytest.mark.parametrize(
    "other",
    [
        answer((6, -0.1, 5, -3.0), (7, -0.70, 8, -0.71), (9, -0.2, 1, -4.0)),
        answer((5, -0.3, 6, -3.0), (7, -0.70, 8, -0.71), (9, -0.2, 1, -4.0)),
        answer((5, -0.1, 6, -3.0), (4, -0.70, 8, -0.71), (9, -0.2, 1, -4.0)),
        answer((5, -0.1, 6, -3.0)),
    ],
    ids=["another token", "another probability", "a token that is not near", "too short"],
)
def test_wrong_answers(other: Any) -> None:
    assert compare(other, EXPECTED, 0.05) == Verdict.WRONG


def rounds(*firsts: float, **more: Any) -> list[dict[str, Any]]:
    return [{"first": first, "verdict": Verdict.SAME, **more} for first in firsts]


def handed(pull: float, raw: float | None, verdict: str = Verdict.SAME) -> dict[str, Any]:
    made: dict[str, Any] = {
        "first": 0.1,
        "after_prefill": 0.2,
        "prefill": 0.5,
        "queued": 0.001,
        "pull": pull,
        "seen": 0.002,
        "rest": 0.008,
        "nbytes": 10**9,
        "strategy": "mapped",
        "error": None,
        "verdict": verdict,
    }
    return made if raw is None else {**made, "raw": raw, "raw_right": True}


def test_rounds_are_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    made = {
        "recompute": rounds(0.5, 1.0, 1.0),
        "handed over": [handed(0.010, 0.009), handed(0.020, 0.010), handed(0.010, 0.010)],
        "handed over alike": [handed(0.1, None, Verdict.WRONG)] * 3,
    }
    rows = rows_of(PAIRS["tiny"], 961, made)
    assert [row["op"] for row in rows] == [
        "recompute",
        "blocks 32 -> 64",
        "blocks 32 -> 64",
        "blocks 32 -> 32",
        "blocks 32 -> 32",
    ]
    assert rows[1]["of_off"] == 0.1  # of 0.2, 0.1 and 0.1
    assert rows[1]["after_prefill_ms"] == 200
    assert rows[2]["of_raw"] == 0.9  # of 0.9, 0.5 and 1
    assert rows[2]["gb_per_s"] == 100
    assert "of_raw" not in rows[4]
    assert [row["verified"] for row in rows] == [True, True, True, False, False]
    fault = row_of("revoked", Counter({"answers": 3, "pulled": 1, Verdict.WRONG: 1}), control=True)
    print_results({"machine": MACHINE, "rows": [*rows, fault], "left_out": []})
    shown = capsys.readouterr().out
    assert "WRONG" in shown
    assert "preemp" in shown


def test_a_pull_that_failed_is_no_success() -> None:
    failed = {**handed(0.01, None), "error": "OfferGone"}
    rows = rows_of(PAIRS["tiny"], 961, {"recompute": rounds(1.0), "handed over": [failed]})
    assert not rows[1]["verified"]


def test_a_control_without_wrong_answers_fails() -> None:
    right = Counter({"answers": 3, Verdict.SAME: 3})
    assert row_of("revoked", right)["verified"]
    assert not row_of("revoked", right, control=True)["verified"]


def test_faults_are_a_hundred_answers() -> None:
    faults = [numbers[0] for kind, numbers in KINDS.items() if kind != "none"]
    assert sum(faults) == 100
    assert all(number % PREEMPTED == 0 for number in KINDS["prefill engine preempts"])


def test_prompts_end_one_token_after_a_block() -> None:
    for pair in PAIRS.values():
        assert all(length % pair.blocks[0] == 1 for length in (*pair.lengths, 32 * 31 + 1))
        assert pair.alike in pair.lengths or not pair.lengths
    assert drawn_prompt(100, 5, 1) == drawn_prompt(100, 5, 1) != drawn_prompt(100, 5, 2)


def test_progress_is_written_as_it_comes(tmp_path: Path) -> None:
    note = Notes(tmp_path / "lines")
    note("a round", first=0.25)
    (line,) = (tmp_path / "lines").read_text().splitlines()
    assert json.loads(line)["first"] == 0.25


SHORT = handover_hosts.Case(layers=2, tokens=97, rounds=2)


def test_rows_by_staging_become_the_same_tokens() -> None:
    rows = handover_hosts.measure(torch.device("cpu"), SHORT)
    assert [row["verified"] for row in rows] == [True, True]


def test_rows_that_do_not_come_are_seen() -> None:
    rows = handover_hosts.measure(torch.device("cpu"), SHORT, lambda *_: 1.0)
    assert [row["verified"] for row in rows] == [False, False]


class Side:
    """An engine without a process, whose answers a test sets."""

    def __init__(self, made: Started, environment: dict[str, str], name: str) -> None:
        self.environment = environment
        self.waits = 0
        self._made = made
        self._name = name

    def begin(self, *_: Any) -> None:
        """Begin nothing."""

    def end(self, _: float) -> dict[str, float]:
        """Return what a start gives."""
        self.waits += 1
        return {"token_bytes": 8.0}

    def do(self, call: str, *args: Any) -> Any:
        """Return the answer to a call."""
        if call == "pulls":
            return [[0.0, 0.001, 0.002, 8, "mapped", None]] if self._made.pulls else []
        length, seed, _, *params = args
        if params and self._name != "decode":
            self._made.prefill = self._name
        token = 5 + seed % 7
        wrong = self._name == "decode" and self._made.prefill == "swapped"
        steps = ((token, -0.1, 6, -3.0), (7, -0.7, 8, -2.0), (9, -0.2, 1, -4.0))
        made = answer(*steps, tokens=[1, 2, 3] if wrong else None)
        return {**made, "cached": length - 1, "params": {"do_remote_prefill": True}}

    def close(self) -> None:
        """End the process."""


class Started:
    """The engines that have begun.

    Attributes:
        sides: by the names of their processes.
        prefill: the name of the engine that has computed the latest prompt for another one.
        pulls: the decode engine brings rows; else it computes prompts.
    """

    def __init__(self) -> None:
        self.sides = dict[str, Side]()
        self.prefill = ""
        self.pulls = True

    def __call__(self, words: Any, environment: dict[str, str], name: str, *_: Any) -> Any:
        self.sides[name] = Side(self, environment, name)
        return self.sides[name]


def engines_of(started: Started, folder: Path) -> Engines:
    return Engines("ranks-tiny", folder, Notes(None), started)


def test_each_rank_has_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    started = Started()
    engines = engines_of(started, tmp_path)
    engines.begin("one", "kv_consumer", 1, 64)
    engines.begin("two", "kv_producer", 0, 32, tensor_parallel_size=2)
    environments = [side.environment for side in started.sides.values()]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == ["5", "4,5"]
    assert [each.get("VLLM_WORKER_MULTIPROC_METHOD") for each in environments] == [None, "spawn"]


def test_engines_that_have_started_are_not_awaited_again(tmp_path: Path) -> None:
    started = Started()
    engines = engines_of(started, tmp_path)
    for name in ("first", "second"):
        engines.begin(name, "kv_consumer", 0, 64)
        engines.join()
    assert [side.waits for side in started.sides.values()] == [1, 1]


@pytest.mark.parametrize("few", [True, False])
def test_two_ranks_hand_over_to_one(few: bool, tmp_path: Path) -> None:
    started = Started()
    ranks = Ranks(engines_of(started, tmp_path), Notes(None), few)
    assert ranks.start() == []
    assert ("swapped" in started.sides) is not few
    (row,) = ranks.run()
    assert (row["shape"], row["op"]) == ("TP 2 -> 1, blocks 32 -> 64", "guarded")
    assert row["answers"] == row["pulled"] == (2 if few else 6)
    assert row["wrong"] == 0
    assert row["verified"]
    (control,) = ranks.control()
    assert control["wrong"] == control["answers"] == row["answers"]
    assert control["op"] == "guard off"
    assert control["verified"]
    assert [*tmp_path.rglob(WEIGHTS)]
    ranks.close()
    assert not [*tmp_path.rglob(WEIGHTS)]


def test_answers_without_pulled_rows_are_no_success(tmp_path: Path) -> None:
    """A decode engine that computes each prompt proves nothing."""
    started = Started()
    started.pulls = False
    ranks = Ranks(engines_of(started, tmp_path), Notes(None), few=True)
    ranks.start()
    (row,) = ranks.run()
    assert row["computed"] == 2
    assert not row["verified"]


def test_weights_are_those_of_a_llama(tmp_path: Path) -> None:
    """Equal in each run, as each rank reads its part of them."""
    config = PAIRS["ranks-tiny"].model.config
    made = list[dict[str, torch.Tensor]]()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_checkpoint(config, tmp_path / name)
        made.append(load_file(tmp_path / name / WEIGHTS))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert len(made[0]) == 3 + 9 * config["num_hidden_layers"]
    assert made[0]["model.layers.3.self_attn.k_proj.weight"].shape == (4 * 64, 256)
    assert json.loads((tmp_path / "first" / "config.json").read_text()) == config


class StoringSide:
    """An engine with a store: answers of hits differ from those of a prompt that is computed.

    Args:
        forgets: ``forget`` empties the engine's own cache.
        right_bytes: loads bring the bytes that were stored.
    """

    def __init__(self, forgets: bool = True, right_bytes: bool = True) -> None:
        self._forgets = forgets
        self._right_bytes = right_bytes
        self._own = set[int]()
        self._stored = set[int]()
        self._counts = {"loads": 0, "landed_blocks": 0, "failed_loads": 0}

    def do(self, what: str, *arguments: int) -> Any:
        if what == "ask":
            return self._ask(arguments[0], arguments[1])
        if what == "counts":
            return dict(self._counts)
        if what == "forget" and self._forgets:
            self._own.clear()
        return {}

    def _ask(self, length: int, seed: int) -> Any:
        whole = (length - 1) // 32
        made = {"began": 0.0, "first": 0.5, "cached": 32 * whole, "tokens": [seed, 1]}
        if seed in self._own:
            return made
        self._own.add(seed)
        if seed in self._stored:
            self._counts["loads"] += 1
            self._counts["landed_blocks"] += whole
            return made if self._right_bytes else {**made, "tokens": [seed, 3]}
        self._stored.add(seed)
        return {**made, "cached": 0, "tokens": [seed, 2]}


@pytest.mark.parametrize(
    ("side", "right", "landed"),
    [
        (StoringSide(), True, 30),
        (StoringSide(forgets=False), False, 0),
        (StoringSide(right_bytes=False), False, 30),
    ],
    ids=["a load", "a hit in the engine's own cache", "wrong bytes"],
)
def test_loads_are_compared_with_hits(
    tmp_path: Path, side: StoringSide, right: bool, landed: int
) -> None:
    engines: Any = Engines("tiny", tmp_path, Notes(None), process=no_process)
    engines.sides["host"] = side
    first = First(engines, ["host"], 961, 2, Notes(None))
    (row,) = first.run()
    engines.sides.clear()
    assert row["verified"] == right
    assert row["met"] == right
    assert row["blocks"] == landed


def test_the_first_hand_over_to_an_engine_with_peers_has_a_target() -> None:
    made = [{"ms": ms, "right": True, "news": {}} for ms in (50.0, 20.0, 22.0, 18.0)]
    assert not judged("peers", 961, made)["met"]
    assert judged("peers", 961, [{**made[0], "ms": 40.0}, *made[1:]])["met"]
    without = judged("hand-over", 961, made)
    assert (without["met"], without["target"], without["ratio"]) == (True, None, 2.5)


def no_process(*_: object, **__: object) -> Any:
    raise AssertionError("no engine is started")
