# SPDX-License-Identifier: Apache-2.0
"""`Witness`: compare the fingerprints of restored blocks with those of the stored blocks."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, compress, count
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch

from portakv.arguments import flag, instance, invalid, items, naming, number, one_of, whole
from portakv.arguments import nbytes as as_bytes
from portakv.errors import InvalidTerms, LayoutError, PortaKVError, SlotError, Unsupported
from portakv.runtime.devices import capturing, refuse_capture
from portakv.runtime.rate_limited_log import RateLimitedLog
from portakv.runtime.transfer import event_pool
from portakv.view import IdList, KVView
from portakv.view.index import as_ids
from portakv.witness.faults import (
    Difference,
    Evidence,
    Fault,
    Name,
    Other,
    Sharding,
    WrongRows,
    is_of_sharding,
    name_fault,
    sentence_of,
    shifts_of,
)
from portakv.witness.fingerprint import Fingerprints, Sums, fingerprints_of
from portakv.witness.report import new_file, write_report
from portakv.witness.table import KEY, FileRing, Ring, Table, read_file

Check: TypeAlias = Literal["off", "sample", "all"]
Action: TypeAlias = Literal["log", "recompute", "raise"]
#: Calls whose fingerprints the device has not computed; further calls to `stored` take none.
_PENDING = 256
#: Faults of one look at the device that are compared with the whole table for their name. Those
#: that may be right rows of a lost version are always compared.
_NAMED = 64
#: The most files about faults of one kind, and of all kinds.
REPORTS_OF_KIND = 4
REPORTS = 32
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass
class Figures:
    """Counts of the blocks of one group since the witness was made.

    Attributes:
        fingerprinted: stored blocks whose fingerprints were taken.
        compared: restored blocks that were compared with a known fingerprint.
        unknown: restored blocks that should be compared, but have no known fingerprint.
        older: restored blocks that equal an older version of their key, or the rows that another
            number of ranks has stored, which are accepted. They are the last version then.
        faults: by their kind.
        dropped: fingerprints that the table evicted, or that were not taken since the device lags.
        reports: files that were written.
    """

    fingerprinted: int = 0
    compared: int = 0
    unknown: int = 0
    older: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    reports: int = 0


class _Group(NamedTuple):
    """What a witness has of one group."""

    name: str
    view: KVView
    fingerprints: Fingerprints
    ring: Ring
    figures: Figures


class _Step:
    """The fingerprints of the blocks of one call.

    Args:
        group: of the blocks.
        keys, blocks: as the call has them.
        chosen: the positions whose fingerprints are taken.
        sums: on the device, int64 ``[chosen, count]``.
        comparison: of the restored blocks; None for stored ones.
        loaded: positions whose sums only count if the block had right rows before.
    """

    def __init__(
        self,
        group: _Group,
        keys: Sequence[bytes],
        blocks: npt.NDArray[np.int64],
        chosen: Sequence[int],
        sums: torch.Tensor,
        comparison: Comparison | None,
        loaded: Collection[int],
    ) -> None:
        self.group = group
        self.keys = keys
        self.blocks = blocks
        self.chosen = chosen
        self.comparison = comparison
        self.loaded = loaded
        self._event: torch.Event | None = None
        self._device = sums.device
        self._sums = sums
        if sums.device.type != "cpu":
            # Copied to pinned memory, so that no host waits. The memory of the sums on the device
            # is free for later work of this stream.
            self._sums = torch.empty(sums.shape, dtype=torch.int64, device="cpu", pin_memory=True)
            self._sums.copy_(sums, non_blocking=True)
            self._event = event_pool(sums.device).recorded(None)

    def is_done(self) -> bool:
        """Return whether the sums are on the host."""
        return self._event is None or self._event.query()

    def arrived(self) -> Sums:
        """Return the sums, int64 ``[chosen, count]``; block the host until they are here."""
        if self._event is not None:
            self._event.synchronize()
            event_pool(self._device).release(self._event)
            self._event = None
        return self._sums.numpy()


class _Suspect(NamedTuple):
    """A block whose rows differ from all versions that are accepted.

    Attributes:
        step: of the block.
        at: its position among the keys of the step.
        evidence: by which its fault gets a name.
    """

    step: _Step
    at: int
    evidence: Evidence


class Comparison:
    """The comparison of the restored blocks of one call of `Witness.restored`."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self._faults = list[Fault]()
        self._step: _Step | None = None  # until it is settled

    @property
    def is_done(self) -> bool:
        """Return whether `faults` waits for nothing."""
        return self._step is None or self._step.is_done()

    @property
    def faults(self) -> list[Fault]:
        """Return the faults. Block the host until the device has computed the fingerprints.

        Raises:
            WrongRows: there is a fault, and the witness has ``action="raise"``.
        """
        if self._step is not None:
            self._witness.settle(wait=True)
        if self._faults and self._witness.action == "raise":
            raise WrongRows(self._faults)
        return list(self._faults)

    @property
    def failed(self) -> set[int]:
        """Return the engine's blocks that it computes again.

        Those with a fault if the witness has ``action="recompute"``, else none. Blocks the host
        and raises as `faults`.
        """
        faults = self.faults
        if self._witness.action != "recompute":
            return set()
        return {fault.block for fault in faults}


class Witness:
    """Compares restored blocks with the blocks that were stored under the same keys.

    An engine reports blocks when their rows are complete, and again when a load has restored them.
    A fingerprint of the rows is taken at both times, on the device. One thread uses a witness.

    Args:
        views: a paged view of the engine's cache, or one for each group by its name.
        check: which blocks: none, those that ``rate`` chooses, or all.
        rate: the part of the keys that ``sample`` chooses, from 0 to 1. Equal keys are chosen
            alike in all groups, processes and ranks.
        action: on a fault: log it; also return the block in `Comparison.failed`; or raise it when
            the comparison is read.
        nbytes: of host memory for fingerprints of all groups; new ones evict the oldest.
        file: has the fingerprints, so that they survive a restart. Each rank needs its own file.
        others: files of other ranks; a fault may get its name by their fingerprints.
        rank, ranks: the number of this rank, among those that divide the heads in order.
        shardings: of each engine with another number of ranks the files of all its ranks, in
            order. It rounds otherwise too. Rows that it has stored for the same heads are
            accepted as an older version; else a fault may get its name by them.
        older: rows of an older version of a key are accepted, or a fault. An engine that computes
            a block again rounds otherwise, so that both versions are right. After a change of the
            weights an older version is wrong.
        reports: a folder for files about faults, at most 4 of each kind and 32 in all; None: no
            files.
        report_bytes: the most bytes of rows in such a file.
        about: versions of the engine and its connector, for the files.

    Attributes:
        check, action: as passed.

    Raises:
        LayoutError: a view is not paged; the text names the group.
        Unsupported: a group cannot be fingerprinted; the text names it and the reason.
        InvalidTerms: a value that an argument cannot have; a file that is torn, in use, or of
            other groups.
    """

    def __init__(
        self,
        views: KVView | Mapping[str, KVView],
        *,
        check: Check = "sample",
        rate: float = 1 / 16,
        action: Action = "log",
        nbytes: int = 256 << 20,
        file: str | PathLike[str] | None = None,
        others: Sequence[str | PathLike[str]] = (),
        rank: int = 0,
        ranks: int = 1,
        shardings: Sequence[Sequence[str | PathLike[str]]] = (),
        older: Literal["accept", "fault"] = "accept",
        reports: str | PathLike[str] | None = None,
        report_bytes: int = 64 << 20,
        about: Mapping[str, str] | None = None,
    ) -> None:
        self.check = one_of("check", check, ("off", "sample", "all"))
        self.action = one_of("action", action, ("log", "recompute", "raise"))
        self._limit = number("rate", rate, 0.0, 1.0, "a number from 0 to 1") * 2**32
        self._accepts_older = one_of("older", older, ("accept", "fault")) == "accept"
        self._others = _paths("others", others)
        self._ranks = whole("ranks", ranks, 1)
        self._rank = whole("rank", rank, 0, self._ranks - 1)
        self._shardings = [
            _paths("shardings", each) for each in items("shardings", shardings, "lists of paths")
        ]
        if not all(self._shardings):
            raise invalid("shardings", "the files of all ranks of each engine", [])
        self._accepts_shardings = self._accepts_older
        self._files = dict[Path, dict[str, FileRing]]()  # read for a batch
        self._sharded = dict[str, set[bytes]]()  # keys in files of shardings at the start, by group
        self._reports = None if reports is None else _path("reports", reports)
        self._report_bytes = as_bytes("report_bytes", report_bytes)
        if about is not None and not isinstance(about, Mapping):
            raise invalid("about", "versions by their names", about)
        self._about = dict(about or {})
        self._lines = RateLimitedLog(_log)
        self._pending = deque[_Step]()
        self._right = dict[str, set[bytes]]()  # keys with right rows, by group, of a settled batch
        self._groups = dict[str, _Group]()
        self._table: Table | None = None
        if self.check == "off":
            return
        named = {"": views} if isinstance(views, KVView) else views
        if not isinstance(named, Mapping) or not named:
            raise invalid("views", "a view, or a view of each group by its name", views)
        fingerprints = {name: _fingerprints_of(name, view) for name, view in named.items()}
        geometries = {name: each.geometry for name, each in fingerprints.items()}
        path = None if file is None else _path("file", file)
        self._table = Table(geometries, as_bytes("nbytes", nbytes, 1), path)
        for name, view in named.items():
            ring = self._table.rings[name]
            self._groups[name] = _Group(name, view, fingerprints[name], ring, Figures())
        for path in chain(*self._shardings):
            for name, found in self._read_file(path).items():
                self._sharded.setdefault(name, set()).update(found.keys())

    @property
    def block_bytes(self) -> dict[str, int]:
        """Return the bytes of the fingerprint of a block of each group."""
        return {x.name: x.fingerprints.geometry.nbytes for x in self._groups.values()}

    def stored(
        self,
        blocks: IdList,
        keys: Sequence[bytes],
        group: str = "",
        *,
        first: Collection[int] = (),
        loaded: Collection[int] = (),
    ) -> None:
        """Take fingerprints of blocks whose rows are complete.

        The device computes them on its current stream, and the host waits for nothing.

        Args:
            blocks: the engine's blocks, on the host.
            keys: the engine's hash of each block, at most 64 bytes.
            group: the name of the view.
            first: positions in ``keys`` that are taken whatever the rate, such as those of the
                first block of a request; but not if a former version of the key was not taken.
            loaded: positions of blocks that a load has restored, and whose last tokens the engine
                has computed again. They are taken if the load has been compared and was right.

        Raises:
            SlotError: blocks that the view does not have, or on a device.
            InvalidTerms: an unknown group, a key that is not bytes, or another number of keys.
            LayoutError: the memory of a view was replaced.
        """
        if self.check == "off":
            return
        for name, positions in (("first", first), ("loaded", loaded)):
            if not isinstance(positions, Collection):
                raise invalid(name, "positions in keys", positions)
        self.settle()
        (of, ids) = self._read(blocks, keys, group)
        chosen = self._chosen(keys)
        if len(chosen) < len(keys):  # a key that is compared has all its versions
            places = range(len(keys))
            wanted = {keys[at] for at in first if at in places}
            taken = self._coming(of).union(x for x in wanted if not of.ring.was_dropped(x))
            some = {*chosen, *compress(count(), map(of.ring.keys.__contains__, keys))}
            some.update(compress(count(), map(taken.__contains__, keys)))
            chosen = sorted(some)
            of.ring.lose(key for at, key in enumerate(keys) if at not in some)
        if not chosen and not self._pending:
            of.ring.forget(ids.tolist())
            return
        if len(self._pending) >= _PENDING:
            of.figures.dropped += len(chosen)
            of.ring.lose(_at(keys, chosen))
            chosen = []
        self._begin(of, keys, ids, chosen, None, loaded)

    def restored(self, blocks: IdList, keys: Sequence[bytes], group: str = "") -> Comparison:
        """Compare blocks that a load has restored with the fingerprints of their keys.

        The rows have landed, for work on the current stream of the device. The device computes
        there, and the host waits for nothing until the comparison is read.

        Keys that the rate does not choose are compared too if their fingerprints are known.

        Args:
            blocks, keys, group: as for `stored`.

        Raises as `stored`.
        """
        comparison = Comparison(self)
        if self.check == "off":
            return comparison
        if len(self._pending) >= _PENDING:
            self.settle()
        (of, ids) = self._read(blocks, keys, group)
        coming = self._coming(of)
        wanted = self._chosen(keys)
        known = of.ring.keys
        chosen: Sequence[int] = range(len(keys))
        if not all(map(known.__contains__, keys)):
            taken = coming.union(self._sharded.get(of.name, set()).intersection(_at(keys, wanted)))
            chosen = [at for at, key in enumerate(keys) if key in known or key in taken]
            of.figures.unknown += len({*wanted}.difference(chosen))
        if len(ids):
            self._begin(of, keys, ids, chosen, comparison)
        return comparison

    def settle(self, wait: bool = False) -> None:
        """Count, name and log what the device has computed.

        ``wait``: block the host until the device has computed all fingerprints. `stored` settles
        too, without a wait.
        """
        flag("wait", wait)
        suspects = list[_Suspect]()
        while self._pending and (wait or self._pending[0].is_done()):
            step = self._pending.popleft()
            if step.comparison is None:
                self._remember(step)
            else:
                step.comparison._step = None
                suspects += self._compare(step)
        if suspects:
            self._report(suspects)
        self._right.clear()
        self._files.clear()

    def renew(self) -> None:
        """Accept no rows that were stored before this call, as after a change of the weights.

        Restored rows of before are the fault "older version", also with ``older="accept"``, and
        those of another number of ranks are the fault "other sharding". Blocks the host until the
        device has computed all fingerprints.
        """
        self.settle(wait=True)
        self._accepts_shardings = False
        for group in self._groups.values():
            group.ring.renew()

    def figures(self) -> dict[str, Figures]:
        """Return the counts of each group, of the calls that are settled."""
        return {
            x.name: replace(
                x.figures,
                faults=Counter(x.figures.faults),
                dropped=x.figures.dropped + x.ring.dropped,
            )
            for x in self._groups.values()
        }

    def close(self) -> None:
        """Settle all calls, and release the table and its file. Later calls check nothing."""
        if self._table is None:
            return
        table = self._table
        self._table = None
        try:
            self.settle(wait=True)
        finally:
            self.check = "off"
            table.close()

    def _read(
        self, blocks: IdList, keys: Sequence[bytes], group: str
    ) -> tuple[_Group, npt.NDArray[np.int64]]:
        """Return the group and the blocks of a call; raise as `stored`."""
        of = self._groups.get(group) if isinstance(group, str) else None
        if of is None:
            one_of("group", group, self._groups)
            raise AssertionError(group)
        with naming("blocks", "block ids on the host"):
            ids = as_ids(blocks)
        if ids.device.type != "cpu":
            raise SlotError(
                f"Expected blocks on the host, got a tensor on {ids.device}. Pass a list."
            )
        if not isinstance(keys, Sequence) or len(ids) != len(keys):
            raise invalid("keys", f"a key for each of {len(ids)} blocks", keys)
        for key in _wrong_keys(keys):
            raise invalid("keys", f"bytes, at most {KEY} of a key", key)
        device = of.view.device
        if device.type != "cpu" and capturing(device):
            raise refuse_capture("Taking fingerprints", "the blocks of each replay differ")
        return of, ids.numpy().astype(np.int64)  # a copy: callers use their memory again

    def _coming(self, of: _Group) -> set[bytes]:
        """Return the keys of a group whose fingerprints the device computes."""
        coming = set[bytes]()
        for step in self._pending:
            if step.group is of and step.comparison is None:
                coming.update(_at(step.keys, step.chosen))
        return coming

    def _chosen(self, keys: Sequence[bytes]) -> Sequence[int]:
        """Return the positions of the keys that the rate chooses."""
        if self.check == "all":
            return range(len(keys))
        return [*compress(count(), map(self._limit.__gt__, map(crc32, keys)))]

    def _begin(
        self,
        of: _Group,
        keys: Sequence[bytes],
        ids: npt.NDArray[np.int64],
        chosen: Sequence[int],
        comparison: Comparison | None,
        loaded: Collection[int] = (),
    ) -> None:
        """Launch the fingerprints of the chosen blocks of a call."""
        some = ids if len(chosen) == len(ids) else ids[np.asarray(chosen, np.intp)]
        if chosen:
            sums = of.fingerprints.of(some)
        else:
            sums = torch.empty((0, of.fingerprints.geometry.count), dtype=torch.int64, device="cpu")
        step = _Step(of, tuple(keys), ids, chosen, sums, comparison, frozenset(loaded))
        if comparison is not None:
            comparison._step = step
        self._pending.append(step)

    def _remember(self, step: _Step) -> None:
        """Add the fingerprints of stored blocks to the table."""
        of = step.group
        sums = step.arrived()
        blocks = step.blocks.tolist()
        chosen = step.chosen
        if step.loaded:
            right = [
                at not in step.loaded or of.ring.key_in(blocks[at]) == step.keys[at]
                for at in chosen
            ]
            chosen = [*compress(chosen, right)]
            sums = sums[right]
        of.ring.forget(blocks)
        if chosen:
            keys = _at(step.keys, chosen)
            of.ring.add(keys, _at(blocks, chosen), sums)
            of.figures.fingerprinted += len(keys)

    def _compare(self, step: _Step) -> list[_Suspect]:
        """Return the blocks of a load whose rows are not those of an accepted version."""
        of = step.group
        ring = of.ring
        suspects = list[_Suspect]()
        all_sums = step.arrived()
        keys = _at(step.keys, step.chosen)
        # The sums by head alone tell of each byte; those by segment say where it is.
        agree = ring.agree(keys, all_sums[:, : of.fingerprints.geometry.head_sums])
        right = [at for at, agrees in zip(step.chosen, agree, strict=True) if agrees]
        others = list[int]()  # positions in keys: right, but not the last version
        blocks = step.blocks.tolist()
        of.figures.compared += len(right)
        for n, key in enumerate(keys):
            if agree[n]:
                continue
            at = step.chosen[n]
            sums = all_sums[n]
            versions = ring.versions(key)
            current = [known for known in versions if not known.is_old]
            is_version = any(np.array_equal(x.sums, sums) for x in versions)
            # Without a version of its own a key may be known in a file of another sharding.
            sharded = not versions and key in self._sharded.get(of.name, ())
            if not (current or is_version or sharded):
                of.figures.unknown += 1
                continue
            of.figures.compared += 1
            accepted = current if self._accepts_older else current[:1]
            nth = next((n for n, x in enumerate(accepted) if np.array_equal(x.sums, sums)), None)
            if not is_version and self._accepts(of, key, sums):
                nth = len(versions) + 1
            if nth is None:
                evidence = self._evidence(of, key, sums, blocks[at])
                suspects.append(_Suspect(step, at, evidence))
                continue
            of.figures.older += nth > 0
            right.append(at)
            others.append(n)
        rights = _at(step.keys, right)
        self._right.setdefault(of.name, set()).update(rights)
        ring.forget(blocks)
        ring.rest(_at(blocks, right), rights)
        if others:  # a tier has these versions, so that they are the last to be forgotten
            places = [blocks[step.chosen[n]] for n in others]
            ring.add([keys[n] for n in others], places, all_sums[others])
        return suspects

    def _accepts(self, of: _Group, key: bytes, sums: Sums) -> bool:
        """Return whether rows are those that another number of ranks has stored under their key."""
        own = of.fingerprints.geometry
        return self._accepts_shardings and any(
            is_of_sharding(own, sums, self._rank, self._ranks, sharding)
            for sharding in self._in_shardings(of.name, key)
        )

    def _evidence(self, of: _Group, key: bytes, sums: Sums, block: int) -> Evidence:
        """Return the evidence of a fault."""
        ring = of.ring
        former = ring.key_in(block)
        before = [] if former is None else ring.versions(former)
        return Evidence(
            of.fingerprints.geometry,
            sums,
            # The ring may take other rows before a fault has its name.
            [known.sums.copy() for known in ring.versions(key)],
            [known._replace(sums=known.sums.copy()) for known in before],
            ring,
            key,
            block,
            partial(self._known_in, self._others, of.name, key),
            partial(self._in_shardings, of.name, key),
            lambda: any(key in right for name, right in self._right.items() if name != of.name),
        )

    def _report(self, suspects: Sequence[_Suspect]) -> None:
        """Name faults, count and log them, and write files about them."""
        named = list[tuple[_Suspect, Name, Difference]]()
        for nth, suspect in enumerate(suspects):
            evidence = suspect.evidence
            lost = not evidence.versions or evidence.ring.was_dropped(evidence.key)
            (name, difference) = name_fault(evidence, thorough=lost or nth < _NAMED)
            # A version that the table has lost, or that an engine with as many ranks has stored,
            # may still be in a tier, and its rows are right.
            if lost and not name.is_explained and difference.may_be_rounded:
                figures = suspect.step.group.figures
                figures.compared -= 1
                figures.unknown += 1
                continue
            named.append((suspect, name, difference))

        shifted = _shifts(named)
        for nth, (suspect, name, difference) in enumerate(named):
            if nth in shifted:
                versus = f"{name.versus}, {shifted[nth]:+} blocks away in the call"
                name = name._replace(kind="shifted blocks", versus=versus)
            self._add(suspect, name, difference)

    def _add(self, suspect: _Suspect, name: Name, difference: Difference) -> None:
        """Count and log a fault, and write a file about it."""
        step = suspect.step
        of = step.group
        block = int(step.blocks[suspect.at])
        fault = Fault(
            of.name,
            suspect.evidence.key,
            block,
            difference.layers,
            difference.differing_heads,
            difference.tokens,
            name.kind,
            name.versus,
            sentence_of(of.name, suspect.evidence.key, block, name, difference),
        )
        of.figures.faults[name.kind] += 1
        fault = replace(fault, report=self._written(fault, name, difference, of))
        text = fault.sentence
        if self.action == "recompute":
            text += " The engine computes the block again."
        if fault.report is not None:
            text += f" See: portakv witness show {fault.report}"
        self._lines.warning(f"{of.name} {name.kind}", "%s", text, lines=1)
        assert step.comparison is not None
        step.comparison._faults.append(fault)

    def _written(self, fault: Fault, name: Name, difference: Difference, of: _Group) -> Path | None:
        """Write a file about a fault, unless there are enough; return its path."""
        kinds = Counter[str]()
        for group in self._groups.values():
            kinds.update(group.figures.faults)
        total = sum(group.figures.reports for group in self._groups.values())
        if self._reports is None or kinds[name.kind] > REPORTS_OF_KIND or total >= REPORTS:
            return None
        stem = f"{name.kind.replace(' ', '-')}-{fault.key.hex()[:16]}-block{fault.block}"
        try:
            self._reports.mkdir(parents=True, exist_ok=True)
            path = new_file(self._reports, stem)
            write_report(
                path,
                fault,
                name,
                difference,
                of.fingerprints,
                of.view,
                self._about,
                self._report_bytes,
            )
        except (OSError, RuntimeError, ValueError, PortaKVError) as error:
            self._lines.warning("reports", "A file about a fault cannot be written: %s", error)
            return None
        of.figures.reports += 1
        return path

    def _known_in(self, paths: Sequence[Path], group: str, key: bytes) -> Iterator[Other]:
        """Yield the fingerprints of a key in files of ranks."""
        for path in paths:
            if path not in self._files:
                self._files[path] = self._read_file(path)
            if group in self._files[path]:
                ring = self._files[path][group]
                for known in ring.versions(key):
                    yield Other(str(path), ring.geometry, known.sums, known.is_old)

    def _in_shardings(self, group: str, key: bytes) -> Iterator[Sharding]:
        """Yield the fingerprints of a key in each engine with another number of ranks."""
        for paths in self._shardings:
            yield [[*self._known_in([path], group, key)] for path in paths]

    def _read_file(self, path: Path) -> dict[str, FileRing]:
        """Return the ring of each group of a rank's file; none, with a log, of a wrong file."""
        try:
            return read_file(path)
        except (OSError, InvalidTerms) as error:
            self._lines.warning(str(path), "Fingerprints of another rank: %s", error, lines=1)
            return {}


def _path(name: str, value: object) -> Path:
    """Return a path; raise `InvalidTerms` unless it is a text or a path that is not empty."""
    if isinstance(value, (str, PathLike)) and str(value):
        return Path(value)
    raise invalid(name, "a path", value)


def _paths(name: str, values: object) -> list[Path]:
    """Return a list of paths; raise as `_path`."""
    return [_path(name, each) for each in items(name, values, "paths")]


def _fingerprints_of(name: str, view: KVView) -> Fingerprints:
    """Return the fingerprints of a group; raise with its name as `Witness`."""
    view = instance("views", view, KVView)
    try:
        return fingerprints_of(view)
    except LayoutError as error:
        raise LayoutError(f"Group {name!r} has no fingerprints. {error}") from error
    except Unsupported as error:
        raise Unsupported(f"A fingerprint of group {name!r}", str(error)) from error


def _shifts(named: Sequence[tuple[_Suspect, Name, Difference]]) -> dict[int, int]:
    """Return the faults whose rows are those of a key a few places away in the same call.

    The key is the position in ``named``, the value the number of places.
    """
    shifted = dict[int, int]()
    by_step = dict[int, list[int]]()
    for nth, (suspect, name, _) in enumerate(named):
        if name.kind in ("other block", "not written") and name.source is not None:
            by_step.setdefault(id(suspect.step), []).append(nth)
    for some in by_step.values():
        step = named[some[0]][0].step
        sources = {named[nth][0].at: named[nth][1].source or b"" for nth in some}
        moved = shifts_of(sources, step.keys)
        shifted |= {nth: moved[named[nth][0].at] for nth in some if named[nth][0].at in moved}
    return shifted


def _at(items: Sequence[T], positions: Sequence[int]) -> Sequence[T]:
    """Return the items at distinct positions; those of all in their own order."""
    return items if len(positions) == len(items) else [items[at] for at in positions]


def _wrong_keys(keys: Sequence[Any]) -> list[Any]:
    """Return keys that are not bytes, or too many of them."""
    if {*map(type, keys)} <= {bytes} and max(map(len, keys), default=0) <= KEY:
        return []
    return [key for key in keys if not isinstance(key, bytes) or len(key) > KEY]
