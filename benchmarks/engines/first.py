# SPDX-License-Identifier: Apache-2.0
"""Time the first hand-over and the first load of engines next to later ones.

Engines have computed prompts before, so that vLLM's own kernels are built. A hand-over is timed
from the prefill engine's answer, and a load from its request, until the first token. The first one
misses its target if it takes more than twice the median of later ones. A row also has the modules,
threads and kernels of PortaKV that the engine made during the first one.

    python -m portakv_benchmarks.engines.first FOLDER [--tiny] [--only hand-over,host,disk]
        [--length TOKENS] [--rounds COUNT]

``FOLDER`` gets the logs and ``first.json``, and has the disk that is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from portakv_benchmarks.engines.handover import (
    ANSWER,
    TO_PREFILL,
    Engines,
    Notes,
    check_weights,
)
from portakv_benchmarks.engines.handover_side import DECODE, PREFILL, PullFigures
from portakv_benchmarks.shared.harness import Row, Rows, short

#: The most that the first one takes, as a multiple of the median of later ones.
MOST = 2.0
#: The role of an engine with a store.
STORES = "kv_both"
#: What is timed: a hand-over, and a load from the host's memory and from a disk.
HANDED = "hand-over"
HOST = "host"
DISK = "disk"
KINDS = (HANDED, HOST, DISK)
#: Bytes of the stores: all prompts of a run.
ROOM = 24 << 30
ROOM_ON_CPU = 1 << 30


class First:
    """Engines whose first hand-over and first loads are timed.

    Args:
        engines: not started yet.
        kinds: of `KINDS`.
        length: of the prompts, in tokens.
        rounds: later hand-overs, and later loads of each kind.
        note: takes a line of progress.
    """

    def __init__(
        self,
        engines: Engines,
        kinds: Sequence[str],
        length: int,
        rounds: int,
        note: Callable[..., None],
    ) -> None:
        self._engines = engines
        self._kinds = kinds
        self._length = length
        self._rounds = rounds
        self._note = note
        self._seeds = count(1)

    def start(self, room: int) -> None:
        """Start all engines together, and let each compute prompts."""
        engines = self._engines
        small, large = engines.pair.blocks
        staging = room // 8
        if HANDED in self._kinds:
            engines.begin("prefill", PREFILL, 0, small)
            engines.begin("decode", DECODE, 1, large)
        if HOST in self._kinds:
            engines.begin(HOST, STORES, 0, small, store={"host": room, "staging": staging})
        if DISK in self._kinds:
            folder = str(engines.folder / "stored")
            disk = {"host": 0, "staging": staging, "folder": folder, "capacity": room}
            engines.begin(DISK, STORES, 1, small, store=disk)
        engines.join()
        check_weights(next(iter(engines.sides.values())))
        for name in engines.sides:
            self._compute(name)
            engines[name].do("collect")
            engines[name].do("news")  # vLLM's own

    def _compute(self, name: str) -> None:
        """Let an engine compute a prompt, and find another one in its own cache: vLLM builds
        kernels for both."""
        for _ in range(2):
            seed = next(self._seeds)
            for _ in range(2):
                self._engines[name].do("ask", self._length, seed, ANSWER)

    def hand_over(self) -> Row:
        """Hand a prompt over; times are milliseconds."""
        seed = next(self._seeds)
        prefill = self._engines["prefill"]
        decode = self._engines["decode"]
        computed = prefill.do("ask", self._length, seed, 1, TO_PREFILL)
        answer = decode.do("ask", self._length, seed, ANSWER, computed["params"])
        (pull,) = map(PullFigures._make, decode.do("pulls"))
        return {
            "ms": 1e3 * (answer["first"] - computed["ended"]),
            "queued_ms": 1e3 * (pull.began - answer["began"]),
            "pull_ms": 1e3 * pull.seconds,
            "seen_ms": 1e3 * pull.seen,
            "right": pull.error is None and pull.nbytes > 0,
            "news": decode.do("news"),
        }

    def load(self, name: str) -> Row:
        """Have an engine find a prompt in its store alone; times are milliseconds."""
        seed = next(self._seeds)
        engine = self._engines[name]
        computed = engine.do("ask", self._length, seed, ANSWER)
        engine.do("settle")
        engine.do("forget")
        engine.do("news")
        answer = engine.do("ask", self._length, seed, ANSWER)
        return {
            "ms": 1e3 * (answer["first"] - answer["began"]),
            "computed_ms": 1e3 * (computed["first"] - computed["began"]),
            "right": answer["cached"] > self._length // 2
            and answer["tokens"] == computed["tokens"],
            "news": engine.do("news"),
        }

    def run(self) -> Rows:
        """Return a row for each kind."""
        kinds: dict[str, Callable[[], Row]] = {
            HANDED: self.hand_over,
            HOST: partial(self.load, HOST),
            DISK: partial(self.load, DISK),
        }
        rows: Rows = []
        for kind in self._kinds:
            once = kinds[kind]
            made = list[Row]()
            for _ in range(1 + self._rounds):
                made.append(once())
                self._note(kind, **made[-1])
            rows.append(judged(kind, self._length, made))
        return rows


def judged(kind: str, length: int, made: Sequence[Row]) -> Row:
    """Return the row of a kind: the first time, the median of later ones, and their ratio."""
    first = made[0]
    later = made[1:]
    middle = median(each["ms"] for each in later)
    ratio = first["ms"] / middle
    right = all(each["right"] for each in made)
    row: Row = {
        "kind": kind,
        "tokens": length,
        "first_ms": short(first["ms"]),
        "later_ms": short(middle),
        "least_ms": short(min(each["ms"] for each in later)),
        "most_ms": short(max(each["ms"] for each in later)),
        "rounds": len(later),
        "ratio": short(ratio),
        "verified": right,
        "met": right and ratio <= MOST,
        "news": {what: names for what, names in first["news"].items() if names},
    }
    for name in ("queued_ms", "pull_ms", "seen_ms", "computed_ms"):
        if name in first:
            row[f"first_{name}"] = short(first[name])
            row[f"later_{name}"] = short(median(each[name] for each in later))
    return row


def shown(row: Row) -> str:
    """Return a row as a line."""
    verdict = "met" if row["met"] else "MISSED"
    if not row["verified"]:
        verdict = "WRONG"
    return (
        f"{row['kind']}, {row['tokens']} tokens: first {row['first_ms']} ms, median of "
        f"{row['rounds']} later ones {row['later_ms']} ms ({row['least_ms']} to "
        f"{row['most_ms']}), ratio {row['ratio']}: {verdict}"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 1 if a target was missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, separated by commas")
    parser.add_argument("--length", type=int, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=20, help="later hand-overs and loads")
    args = parser.parse_args(words)

    args.folder.mkdir(parents=True, exist_ok=True)
    note: Any = Notes(args.folder / "first.jsonl")
    engines = Engines("tiny" if args.tiny else "8b", args.folder, note)
    length = args.length or (961 if args.tiny else 4097)
    try:
        kinds = [kind for kind in KINDS if kind in args.only.split(",")]
        first = First(engines, kinds, length, args.rounds, note)
        first.start(ROOM_ON_CPU if args.tiny else ROOM)
        rows = first.run()
    except BaseException:
        print(engines.logged(), file=sys.stderr)
        raise
    finally:
        engines.close()
    (args.folder / "first.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(shown(row))
        print(json.dumps(row))
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
