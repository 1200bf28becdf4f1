# SPDX-License-Identifier: Apache-2.0
"""Notes for the witness: which blocks of vLLM a step fills or loads, under which of its hashes.

No engine is imported.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import gcd
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias, cast

from portakv.arguments import invalid, number, one_of, text
from portakv.arguments import nbytes as as_bytes
from portakv.integrations import IntegrationError
from portakv.integrations.vllm.caches import groups_of
from portakv.serving import Group
from portakv.serving.local import check_names
from portakv.serving.plan import Blocks
from portakv.serving.scheduler import NO_STATES
from portakv.witness.witness import Action, Check

CHECKS = ("off", "sample", "all")
ACTIONS = ("log", "recompute", "raise")
OLDER = ("accept", "fault")
#: The name of the witness among vLLM's connectors. It cannot wrap itself.
WITNESS = "PortaKVWitness"


@dataclass(frozen=True)
class WitnessTerms:
    """The ``kv_connector_extra_config`` of the witness.

    Args:
        connector: the name of the wrapped connector, as vLLM's ``kv_connector``.
        connector_module_path: its module; None: vLLM knows the name.
        connector_extra_config: the terms of the wrapped connector.
        check: which blocks have fingerprints: ``off``, ``sample`` or ``all``.
        rate: the part of blocks for ``sample``, above 0 and at most 1.
        action: with a fault: ``log``, ``recompute`` or ``raise``.
        nbytes: of host memory in each worker for fingerprints.
        file: the file that keeps fingerprints after a restart; None: none is kept.
        older: accept an older version of a block, or treat it as a fault.
        report: the folder for reports of faults; None: no reports are written.

    Raises `InvalidTerms` for a wrong value.
    """

    connector: str
    connector_module_path: str | None = None
    connector_extra_config: dict[str, Any] = field(default_factory=dict)
    check: Check = "sample"
    rate: float = 1 / 16
    action: Action = "log"
    nbytes: int = 256 << 20
    file: str | None = None
    older: str = "accept"
    report: str | None = None

    def __post_init__(self) -> None:
        text("connector", self.connector)
        if self.connector == WITNESS:
            do = "Name the connector whose loads it compares."
            raise invalid("connector", "another connector than the witness", self.connector, do)
        for name in ("connector_module_path", "file", "report"):
            value = getattr(self, name)
            if value is not None:
                text(name, value)
        if not isinstance(self.connector_extra_config, dict):
            expected = "an object with the terms of the wrapped connector"
            raise invalid("connector_extra_config", expected, self.connector_extra_config)
        one_of("check", self.check, CHECKS)
        one_of("action", self.action, ACTIONS)
        one_of("older", self.older, OLDER)
        number("rate", self.rate, 0, 1, "a part from 0 to 1")
        if self.rate == 0:
            do = 'Pass check "off" for no comparison.'
            raise invalid("rate", "a part of blocks above 0", self.rate, do)
        as_bytes("nbytes", self.nbytes, 1)

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> WitnessTerms:
        """Return the terms in a ``kv_connector_extra_config``. Raises `InvalidTerms`."""
        check_names(extra, [*cls.__dataclass_fields__])
        if "connector" not in extra:
            raise invalid(
                "connector",
                "the name of the connector that the witness wraps",
                None,
                'Add it to kv_connector_extra_config, such as "OffloadingConnector".',
            )
        return cls(**extra)


def check_policy(terms: WitnessTerms, policy: str) -> None:
    """Raise `IntegrationError` if vLLM would end a request with a fault instead of computing it.

    ``policy``: vLLM's ``kv_load_failure_policy``.
    """
    if terms.check != "off" and terms.action == "recompute" and policy != "recompute":
        raise IntegrationError(
            f"Expected kv_load_failure_policy 'recompute' for action 'recompute' of the witness, "
            f"got {policy!r}, which ends a request instead. Set it to 'recompute'."
        )


def check_parallel(parallel: Any) -> None:
    """Raise `IntegrationError` for ranks that divide the tokens of a block among each other."""
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        many = getattr(parallel, name, 1)
        if many != 1:
            raise IntegrationError(
                f"Expected ranks that have all tokens of a block for the witness, got {name} "
                f"{many}. Set check to 'off', or leave --{name.replace('_', '-')} out."
            )


Keyed: TypeAlias = list[tuple[int, bytes]]  # the engine's blocks, with their keys


class Filled(NamedTuple):
    """The blocks of a group of layers that a step fills, in columns: a step may fill hundreds, and
    each rank reads them.

    Attributes:
        blocks: the engine's ids.
        keys: the engine's hash of the tokens up to the end of each block, after a `renew` with a
            number at its end.
        first: positions of the first block that a request fills.
        loaded: positions of blocks that a load has brought, and whose last token the engine
            computes again.
    """

    blocks: list[int]
    keys: list[bytes]
    first: list[int]
    loaded: list[int]

    def add(self, made: Keyed, first: bool, loaded: bool) -> None:
        """Add blocks with their keys. ``first``: they begin with the first of a request."""
        begin = len(self.blocks)
        for block, key in made:
            self.blocks.append(block)
            self.keys.append(key)
        if first:
            self.first.append(begin)
        if loaded:
            self.loaded.extend(range(begin, len(self.blocks)))


class Load(NamedTuple):
    """The blocks that a connector loads for a request.

    Attributes:
        request: its name.
        waits: the request waits until the connector reports the end. Else the load ends in its
            step.
        keys: by group, of each of the engine's blocks that it brings the key, as in `Filled`; first
            tokens first.
    """

    request: str
    waits: bool
    keys: dict[int, dict[int, bytes]]

    def brings(self, blocks: Collection[int]) -> bool:
        """Return whether the load brings one of the engine's blocks."""
        return any(not keys.keys().isdisjoint(blocks) for keys in self.keys.values())

    def before(self, failed: Collection[int]) -> Load:
        """Return the load without the first failed block and those after it, which the engine
        computes.

        With several groups an engine computes all blocks of a failed load: nothing is left.
        """
        if len(self.keys) > 1:
            return self._replace(keys={})
        kept = {
            group: dict(takewhile(lambda each: each[0] not in failed, keys.items()))
            for group, keys in self.keys.items()
        }
        return self._replace(keys=kept)


@dataclass
class StepNotes:
    """The notes of a step, from the scheduler to its workers.

    Attributes:
        filled: by the number of a group, the blocks that are complete when the step has ended.
        loads: the loads that begin in the step.
    """

    filled: dict[int, Filled] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)


@dataclass
class _Request:
    """What is known of a request.

    Attributes:
        request: vLLM's object, which knows the hashes of its blocks.
        blocks: of each group, the engine's blocks from the first token on.
        noted: the blocks of tokens before this number have been noted, or were there before.
        due: no block ends after ``noted`` tokens and before this number.
        fresh: the groups in which the request has not filled a block.
        answer: the computed tokens, and whether a load waits, of the connector's latest answer.
        load: a load that may have failed.
        brought: loads have brought the rows before this token. A block that begins before it is not
            the engine's own.
        refused: a load has failed; the connector is not asked for another one.
        left_out: a load was left out.
    """

    request: Any
    blocks: list[list[int]]
    noted: int = 0
    due: int = 0
    fresh: set[int] = field(default_factory=set)
    answer: tuple[int, bool] = (0, False)
    load: Load | None = None
    brought: int = 0
    refused: bool = False
    left_out: bool = False


def served_groups(kv_cache_config: Any, tells: bool) -> tuple[list[Group | None], list[str]]:
    """Return the groups of layers, None for a group without fingerprints, and a sentence for each
    of these.

    ``tells``: the engine tells in each step which blocks have states.
    """
    groups = list[Group | None]()
    reasons = list[str]()
    for at, group in enumerate(kv_cache_config.kv_cache_groups):
        alone = SimpleNamespace(kv_cache_groups=[group])
        try:
            groups += groups_of(alone, tells, whole=True)
        except IntegrationError as error:
            groups.append(None)
            reasons.append(f"Blocks of group {at} are not compared: {error}")
    return groups, reasons


class BlockNotes:
    """Notes which blocks the steps of an engine fill and load, in its scheduler.

    The scheduler calls, in the order of a request's life: `offered` with the answer of the wrapped
    connector; `allocated` after it took blocks; `scheduled` in each step that computes tokens;
    `ended`. Once a step it calls `take`.

    A block is noted once its last token is known and computed. Drafts of speculative decoding are
    not known before they are accepted, and rows of rejected drafts are written again before that.

    Args:
        groups: of layers; None for a group without fingerprints.

    Attributes:
        left_out: requests whose loads were left out.
    """

    def __init__(self, groups: Sequence[Group | None]) -> None:
        self.left_out = 0
        sizes = [group.block_size for group in groups if group is not None]
        self.hash_size = min(sizes, default=1)  # tokens of a hash; vLLM may say another number
        self._unit = gcd(*sizes) or 1  # blocks of all groups end at multiples
        self._groups = groups
        self._requests = dict[str, _Request]()
        self._step = StepNotes()
        self._generation = 0
        self._suffix = b""  # of keys

    def offered(self, request: Any, computed: int, waits: bool) -> bool:
        """Note an answer of the wrapped connector; return whether it may be used.

        Not after a load of the request has failed: the connector would bring the same rows again.
        """
        state = self._requests.get(request.request_id)
        if state is None:
            state = _Request(request, [[] for _ in self._groups])
            self._requests[request.request_id] = state
        state.answer = computed, waits
        return not state.refused

    def leave_out(self, name: str) -> None:
        """Note that a load that was `offered` is left out. A request is counted once, although a
        scheduler asks again in each step in which it waits."""
        state = self._requests[name]
        self.left_out += not state.left_out
        state.left_out = True

    def allocated(
        self, request: Any, blocks: Blocks, tokens: int, groups: Iterable[int] | None = None
    ) -> None:
        """Note the load that the scheduler has decided on.

        Args:
            blocks: of each group, all blocks of the request.
            tokens: how many are loaded after the computed ones; 0: none.
            groups: the groups that the load restores; None: all.
        """
        state = self._requests.get(request.request_id)
        if state is None or not tokens:
            return
        computed, waits = state.answer
        state.blocks = [[*ids] for ids in blocks]
        past = computed + tokens
        state.brought = past
        keys = dict[int, dict[int, bytes]]()
        for at in range(len(self._groups)) if groups is None else groups:
            if some := dict(self._in_load(state, at, computed, past)):
                keys[at] = some
        state.load = Load(request.request_id, waits, keys)
        if keys:
            self._step.loads.append(state.load)

    def is_within_blocks(self, name: str, computed: int, many: int) -> bool:
        """Return whether a step ends no block of a request that has no new ones, or the request is
        not known. `scheduled` does nothing then, and takes longer."""
        state = self._requests.get(name)
        return state is None or state.noted <= computed <= state.due - many - 1

    def scheduled(
        self,
        name: str,
        computed: int,
        many: int,
        blocks: Blocks,
        anew: bool,
        states: Mapping[int, Mapping[int, int]] = NO_STATES,
    ) -> None:
        """Note the blocks of a request that a step fills.

        Args:
            computed: tokens that are computed before the step.
            many: tokens that the step computes, drafts among them.
            blocks: of each group the new blocks, or all of them if ``anew``.
            states: by a number of tokens, the blocks with the states after them, by group. Of
                groups whose states the engine tells.
        """
        state = self._requests.get(name)
        if state is None:
            return
        if anew:
            state.blocks = [[*ids] for ids in blocks]
            state.noted = computed
            state.fresh = {*range(len(self._groups))}
        else:
            for ids, more in zip(state.blocks, blocks, strict=False):
                ids += more
        state.noted = min(state.noted, computed)  # less after a failed load
        if computed < state.brought - 1:  # of a whole prompt the last token is computed again
            state.brought = computed
        state.due = 0
        known = min(computed + many, state.request.num_tokens)
        if known <= state.noted:
            return
        for at, group in enumerate(self._groups):
            if group is None:
                continue
            loaded = False
            if group.states is None or group.states == "every":
                whole = state.brought % group.block_size == 0
                loaded = whole and computed == state.brought - 1 and group.states is None
                own = state.brought - group.block_size if loaded else state.brought
                made = self._between(state, at, state.noted, known, own)
            elif group.states == "told":
                told = {tokens: ids.get(at, -1) for tokens, ids in states.items()}
                made = self._states(state, at, told, known)
            else:
                ends = {tokens: self._block_at(state, at, tokens) for tokens in (computed, known)}
                exact = known == computed + many
                kept = {
                    tokens: block
                    for tokens, block in ends.items()
                    if tokens > state.noted and (exact or tokens == computed)
                }
                made = self._states(state, at, kept, known)
            if not made:
                continue
            if at not in self._step.filled:
                self._step.filled[at] = Filled([], [], [], [])
            self._step.filled[at].add(made, first=not loaded and at in state.fresh, loaded=loaded)
            if not loaded:
                state.fresh.discard(at)
        state.noted = known
        state.due = (known // self._unit + 1) * self._unit

    def failed(self, blocks: Iterable[int], requests: Iterable[str]) -> None:
        """Note that loads have failed, by the engine's blocks or by the names of requests."""
        wrong = {*blocks}
        names = {*requests}
        if not wrong and not names:
            return
        for name, state in self._requests.items():
            load = state.load
            if load is not None and (name in names or load.brings(wrong)):
                state.refused = True

    def ended(self, name: str) -> None:
        """Forget a request."""
        self._requests.pop(name, None)

    def renew(self) -> None:
        """Have other keys from now on: rows of former steps are no longer right, such as after a
        change of weights."""
        self._generation += 1
        self._suffix = self._generation.to_bytes(4, "little")

    def take(self) -> StepNotes:
        """Return the notes of the step, and begin the next one."""
        step = self._step
        self._step = StepNotes()
        return step

    def _in_load(self, state: _Request, at: int, computed: int, past: int) -> Keyed:
        """Return the whole blocks of a group that a load brings, with their keys."""
        group = self._groups[at]
        if group is None:
            return []
        if group.states is not None:
            return self._states(state, at, {past: self._block_at(state, at, past)}, past)
        return self._between(state, at, max(computed, group.first_needed(past)), past)

    def _between(self, state: _Request, at: int, first: int, past: int, brought: int = 0) -> Keyed:
        """Return the blocks of a group that end after ``first`` and not after ``past`` tokens, with
        their keys.

        ``brought``: without blocks that begin before this token.
        """
        size = cast(Group, self._groups[at]).block_size
        ids = state.blocks[at]
        hashes = state.request.block_hashes
        each = size // self.hash_size  # hashes of a block
        if each * self.hash_size != size:
            return []
        end = self._suffix
        most = min(past // size, len(ids), len(hashes) // each)
        return [
            (ids[place], hashes[(place + 1) * each - 1] + end)
            for place in range(max(first // size, -(-brought // size)), most)
            if ids[place] >= 0
        ]

    def _states(self, state: _Request, at: int, ends: Mapping[int, int], past: int) -> Keyed:
        """Return the blocks with states at some ends of blocks, none after ``past`` tokens, with
        their keys."""
        size = cast(Group, self._groups[at]).block_size
        hashes = state.request.block_hashes
        made = Keyed()
        for tokens in sorted(ends):
            block = ends[tokens]
            place = tokens // self.hash_size - 1
            if tokens > past or tokens % size or tokens % self.hash_size or block < 0:
                continue
            if 0 <= place < len(hashes):
                made.append((block, hashes[place] + self._suffix))
        return made

    def _block_at(self, state: _Request, at: int, tokens: int) -> int:
        """Return the block of a group that ends after so many tokens; -1: none."""
        size = cast(Group, self._groups[at]).block_size
        place = tokens // size - 1
        ids = state.blocks[at]
        return ids[place] if tokens % size == 0 and 0 <= place < len(ids) else -1


class RankFiles(NamedTuple):
    """The files of fingerprints that concern a worker.

    Attributes:
        file: of the worker's own fingerprints; None: none are kept.
        others: of the other ranks that have the same layers.
        shardings: of each engine with another number of ranks that has been there before, the files
            of the ranks with these layers, in order.
    """

    file: Path | None
    others: list[Path]
    shardings: list[list[Path]]


def rank_files(
    file: str | None, worker: int, rank: int, ranks: int, workers: int, stages: int = 1
) -> RankFiles:
    """Return the files of fingerprints that concern a worker.

    A single worker has the file itself. Others have the number of ranks and the worker's number at
    the end of the name, so that engines with other numbers of ranks have files beside it.

    Args:
        worker: the number of the worker, among those of all copies of the engine.
        rank: of tensor parallelism, of ``ranks``.
        workers: as far as a worker knows: a copy may know those of its own engine alone.
        stages: of pipeline parallelism. Of another number of stages the layers differ, and no
            fingerprint is like another.
    """
    if file is None:
        return RankFiles(None, [], [])
    whole = Path(file)
    part = worker // ranks  # the number of the ranks that have one stage of one copy
    files = [Path(f"{file}.tp{ranks}.rank{part * ranks + each}") for each in range(ranks)]
    if workers == 1 and worker == 0:
        files = [whole]
    shardings = [[whole]] if ranks > 1 and stages == 1 and whole.exists() else []
    present = dict[int, dict[int, Path]]()
    for path in whole.parent.glob(f"{glob.escape(whole.name)}.tp*.rank*"):
        if numbers := re.fullmatch(
            r"\.tp([1-9]\d*)\.rank(\d+)", path.name.removeprefix(whole.name)
        ):
            present.setdefault(int(numbers[1]), {})[int(numbers[2])] = path
    for many in sorted(present.keys() - {ranks}):
        # A tier may have what any copy has stored.
        for first in range(part % stages * many, max(present[many]) + 1, stages * many):
            places = range(first, first + many)
            if all(place in present[many] for place in places):
                shardings.append([present[many][place] for place in places])
    own = files.pop(rank)
    return RankFiles(own, files, shardings)
