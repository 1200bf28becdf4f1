# SPDX-License-Identifier: Apache-2.0
"""Time the hand-over from a prefill engine to a decode engine, each on one device, and judge the
answers by those of a single engine.

For each length of prompts, in turns: the decode engine computes a new prompt; another new prompt is
computed by the prefill engine, and pulled by the decode engine; as many bytes are copied between
the same devices without PortaKV. With NIXL installed, vLLM's NixlConnector hands prompts over
between two further engines.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch

from portakv_benchmarks.engines.handover_side import DECODE, NIXL, OURS, PREFILL, PullFigures
from portakv_benchmarks.engines.judging import Answers, Verdict
from portakv_benchmarks.engines.models import PAIRS, Pair
from portakv_benchmarks.shared.far import Far
from portakv_benchmarks.shared.harness import Row, Rows, short

#: Seconds for an engine to start: the first ones of a machine compile kernels.
STARTING = 240.0
#: The same on a CPU, whose few cores start all engines, and may be busy. It only ends a hang.
STARTING_ON_CPU = 1800.0
PATIENCE = 120.0  # seconds for an answer
ANSWER = 16  # tokens
#: Terms of both engines: no lease ends, and no pull is given up, because the machine is busy.
PATIENT = {"lease": 300.0, "timeout": 60.0}
LATER = 0.02  # seconds
TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
#: The first port of engines, and ports between two engines. NIXL listens at the last one.
PORT = 29500
APART = 10


class Engines:
    """Engines in processes of their own, each on a device, or each of its ranks on one.

    Args:
        pair: the name of a pair.
        folder: for a folder of the engines.
        note: takes a line of progress.
        process: starts the process of an engine, as `Far` does.

    Attributes:
        folder: has the model's configuration and the logs.
    """

    def __init__(
        self,
        pair: str,
        folder: Path,
        note: Callable[..., None],
        process: Callable[..., Far] = Far,
    ) -> None:
        self.pair: Pair = PAIRS[pair]
        self._name = pair
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self._note = note
        self.sides = dict[str, Far]()
        self.token_bytes = 0.0
        self._process = process
        self._starting = list[str]()
        atexit.register(self.close)

    def begin(
        self,
        name: str,
        role: str,
        place: int,
        blocks: int,
        connector: str | None = OURS,
        hand_over: Any = (),
        store: Any = (),
        **terms: Any,
    ) -> None:
        """Begin to start an engine.

        Args:
            place: of its device among those that are visible. Other ranks have the devices after
                that.
            terms: of vLLM's ``LLM``, besides those of the pair's model.
        """
        number = len(self.sides)
        port = int(os.environ.get("VLLM_PORT", PORT)) + APART * number
        more = {"VLLM_PORT": str(port), "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port + APART - 1)}
        devices = visible_devices()
        ranks = terms.get("tensor_parallel_size", 1)
        if devices:
            places = range(place, place + ranks)
            more["CUDA_VISIBLE_DEVICES"] = ",".join(devices[n % len(devices)] for n in places)
        if ranks > 1:  # a process that has used a device cannot fork the workers
            more["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        words = ["portakv_benchmarks.engines.handover_side", self._name, str(self.folder)]
        log = self.folder / f"{name}.log"
        side = self._process(words, more, name, log, PATIENCE)
        self.sides[name] = side
        self._starting.append(name)
        extra: Any = dict(store) or {"hand_over": {**PATIENT, **dict(hand_over)}}
        side.begin("start", connector, role, blocks, terms, extra)

    def join(self) -> None:
        """Wait until the engines have started that `begin` has begun to start.

        One with NIXL that does not start is left out. Raises `RuntimeError` for another one.
        """
        limit = STARTING if visible_devices() else STARTING_ON_CPU
        starting = self._starting
        self._starting = []
        for name in starting:
            side = self.sides[name]
            try:
                made = side.end(limit)
            except RuntimeError as error:
                why = f"{error}; {self.last_errors(name)}"
                if not name.startswith(NIXL):
                    raise RuntimeError(why) from error
                self._note(f"{name} is left out: {why}")
                self.sides.pop(name).close()
                continue
            self._note(f"{name} has started", **made)
            self.token_bytes = made["token_bytes"]

    def last_errors(self, name: str) -> str:
        """Return the last error in an engine's log."""
        log = self.folder / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line] or lines[-1:]
        return " | ".join(errors[-2:])

    def logged(self) -> str:
        """Return the end of all logs."""
        parts = list[str]()
        for log in sorted(self.folder.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-60:]
            parts += [f"--- {log.name}", *lines]
        return "\n".join(parts)

    def __getitem__(self, name: str) -> Far:
        return self.sides[name]

    def close(self) -> None:
        """Kill all engines."""
        for side in self.sides.values():
            side.close()
        self.sides.clear()


def visible_devices() -> list[str]:
    """Return the names of the devices that engines may have; none on a CPU."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed:
        return listed.split(",")
    return [str(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def check_weights(single: Far) -> None:
    """Raise `RuntimeError` if an engine's tokens do not depend on the prompt: they would judge
    nothing."""
    answers = [single.do("ask", 200, seed, ANSWER) for seed in (10**7, 10**7 + 1)]
    tokens = [each["tokens"] for each in answers]
    if tokens[0] == tokens[1] or len({*tokens[0]}) < 3:
        raise RuntimeError(f"Expected tokens that depend on the prompt, got {tokens}.")


class Measured:
    """The hand-over of a pair of engines.

    Args:
        pair: the name of a pair.
        folder: for the model's configuration and the logs.
        note: takes a line of progress.
    """

    def __init__(self, pair: str, folder: Path, note: Callable[..., None]) -> None:
        self.pair = PAIRS[pair]
        self.engines = Engines(pair, folder, note)
        self._note = note
        self._seeds = count(1)
        self._answers = Answers(self.engines.sides, ANSWER, 0.1)
        self._nixl = find_spec("nixl") is not None
        self._first = dict[str, float]()

    def start(self) -> Rows:
        """Start all engines together; serve a prompt with each, which compiles what is left."""
        engines = self.engines
        small, large = self.pair.blocks
        engines.begin("prefill", PREFILL, 0, small)
        engines.begin("decode", DECODE, 1, large)
        engines.begin("decode alike", DECODE, 1, small)
        engines.begin("single", PREFILL, -2, small, None)
        if self._nixl:
            engines.begin("nixl prefill", PREFILL, -2, small, NIXL)
            engines.begin("nixl decode", DECODE, -1, small, NIXL)
        engines.join()
        self._nixl &= {"nixl prefill", "nixl decode"} <= engines.sides.keys()
        check_weights(engines["single"])
        bytes_of_longest = 8 * int(max(self.pair.lengths) * engines.token_bytes // 8)
        engines["decode"].do("take_raw", engines["prefill"].do("give_raw", bytes_of_longest))
        for length in self.pair.lengths:
            self._computed("decode", length)
            self._handed("prefill", "decode", length)
        self._handed("prefill", "decode alike", self.pair.alike)
        if self._nixl:
            self._try_nixl()
        for side in engines.sides.values():
            side.do("collect")
        return []

    def _try_nixl(self) -> None:
        """Hand a prompt of each length over by NIXL; without success it is not measured."""
        try:
            for length in self.pair.lengths:
                self._handed("nixl prefill", "nixl decode", length)
        except RuntimeError as error:
            self._note(f"NIXL is left out: {error}")
            self._nixl = False

    def measure(self, length: int) -> Rows:
        """Return the rows of a length, in turns."""
        ways: dict[str, Callable[[], Row]] = {
            "recompute": partial(self._computed, "decode", length),
            "handed over": partial(self._handed, "prefill", "decode", length),
            "handed over later": partial(self._handed, "prefill", "decode", length, LATER),
        }
        if length == self.pair.alike:
            ways["handed over alike"] = partial(self._handed, "prefill", "decode alike", length)
        if self._nixl:
            ways["handed over by nixl"] = partial(
                self._handed, "nixl prefill", "nixl decode", length
            )
        made = defaultdict[str, list[Row]](list)
        for turn in range(self.pair.rounds):
            for way in list(ways) if turn % 2 else reversed(list(ways)):
                row = ways[way]()
                made[way].append(row)
                self._note(f"{length} tokens, {way}", **row)
        return rows_of(self.pair, length, made)

    def _computed(self, name: str, length: int) -> Row:
        """Let an engine compute a new prompt."""
        seed = next(self._seeds)
        answer = self.engines[name].do("ask", length, seed, ANSWER)
        verdict = self._answers.verdict(answer, length, seed, pulled=False)
        return {"first": answer["first"] - answer["began"], "verdict": verdict}

    def _handed(self, prefill: str, decode: str, length: int, later: float = 0.0) -> Row:
        """Hand a new prompt over. Times are seconds.

        Args:
            later: the time that passes before the decode engine gets the request. By then the
                prefill engine has made its offer, for which a pull waits otherwise.
        """
        seed = next(self._seeds)
        computed = self.engines[prefill].do("ask", length, seed, 1, TO_PREFILL)
        params = computed["params"]
        if not params or not params.get("do_remote_prefill"):
            raise RuntimeError(f"Expected an offer of {prefill}, got {params}.")
        sleep(later)
        answer = self.engines[decode].do("ask", length, seed, ANSWER, params)
        row: Row = {
            "first": answer["first"] - answer["began"],
            "after_prefill": answer["first"] - computed["ended"],
            "prefill": computed["ended"] - computed["began"],
        }
        pulled = True
        if not prefill.startswith(NIXL):
            (pull,) = map(PullFigures._make, self.engines[decode].do("pulls"))
            pulled = pull.error is None
            row |= {
                "queued": pull.began - answer["began"],
                "pull": pull.seconds,
                "seen": pull.seen,
                "rest": answer["first"] - pull.began - pull.seen,
                "nbytes": pull.nbytes,
                "strategy": pull.strategy,
                "error": pull.error,
            }
            if pulled and decode == "decode":
                copies = [self.engines[decode].do("copy_raw", pull.nbytes) for _ in range(2)]
                row["raw"] = copies[1][0]
                row["raw_right"] = copies[1][1]
        row["verdict"] = self._answers.verdict(answer, length, seed, pulled)
        return row

    def close(self) -> Rows:
        """End the engines."""
        self.engines.close()
        return []


def rows_of(pair: Pair, length: int, made: Mapping[str, Sequence[Row]]) -> Rows:
    """Return a row for each way to serve prompts of a length, with the ratio to ``recompute``.

    Args:
        made: the rounds of each way. Their times are seconds.
    """
    small, large = pair.blocks
    rows: Rows = []
    computed = [each["first"] for each in made["recompute"]]
    for way, each_round in made.items():
        later = ", later" if way.endswith("later") else ""
        to = large if later or way == "handed over" else small
        blocks = f"blocks {small} -> {to}{later}"
        verdicts = [each["verdict"] for each in each_round]
        first = [each["first"] for each in each_round]
        row: Row = {
            "kind": "engine_handover",
            "shape": f"{length} tokens, {pair.model.shape}",
            "tokens": length,
            "backend": NIXL if NIXL in way else "off" if way == "recompute" else OURS,
            "op": way if way == "recompute" else blocks,
            **_summary(first),
            "rounds": len(first),
            "of_off": short(median(a / b for a, b in zip(first, computed, strict=True))),
            "same_bits": sum(each == Verdict.SAME for each in verdicts),
            "near_ties": sum(each == Verdict.TIE for each in verdicts),
            "verified": Verdict.WRONG not in verdicts
            and all(each.get("error") is None for each in each_round)
            and all(each.get("raw_right", True) for each in each_round),
        }
        if way != "recompute":
            after = median(each["after_prefill"] for each in each_round)
            row["after_prefill_ms"] = short(1e3 * after)
            row["prefill_ms"] = short(1e3 * median(each["prefill"] for each in each_round))
        rows += [row, *_pull_rows(row, each_round)]
    return rows


def _pull_rows(row: Row, each_round: Sequence[Row]) -> Rows:
    """Return the row of the pulls alone, next to raw copies of the same bytes."""
    pulls = [each["pull"] for each in each_round if each.get("pull")]
    if not pulls:
        return []
    nbytes = each_round[0]["nbytes"]
    made: Row = {
        "kind": "engine_handover_pull",
        "shape": row["shape"],
        "tokens": row["tokens"],
        "op": row["op"],
        "backend": each_round[0]["strategy"],
        "payload_bytes": nbytes,
        **_summary(pulls),
        "queued_ms": short(1e3 * median(each["queued"] for each in each_round)),
        "seen_ms": short(1e3 * median(each["seen"] for each in each_round)),
        "rest_ms": short(1e3 * median(each["rest"] for each in each_round)),
        "gb_per_s": short(nbytes / median(pulls) / 1e9),
        "rounds": len(pulls),
        "verified": row["verified"],
    }
    raw = [each["raw"] for each in each_round if "raw" in each]
    if raw:
        ratios = [b / a for a, b in zip(pulls, raw, strict=True)]
        made["raw_ms"] = short(1e3 * median(raw))
        made["raw_gb_per_s"] = short(nbytes / median(raw) / 1e9)
        made["of_raw"] = short(median(ratios))
    return [made]


def _summary(seconds: Sequence[float]) -> Row:
    return {
        "p50_ms": short(1e3 * median(seconds)),
        "least_ms": short(1e3 * min(seconds)),
        "most_ms": short(1e3 * max(seconds)),
    }


class Notes:
    """Lines of progress: to the console, and as JSON to a file.

    Args:
        file: to which the lines are added; None: the console alone.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._began = perf_counter()

    def __call__(self, text: str, **fields: Any) -> None:
        elapsed = round(perf_counter() - self._began, 1)
        shown = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
        print(f"    {elapsed} s: {text} {shown}", flush=True, file=sys.stderr)
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps({"at": elapsed, "what": text, **fields}, default=str) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
