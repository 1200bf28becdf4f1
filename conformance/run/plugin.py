# SPDX-License-Identifier: Apache-2.0
"""The suite under pytest: what is judged, which cases, in which order, and how each one ended.

Loaded by `options` where ``--portakv-backend`` is given. What happens is appended to the file of
``--portakv-events`` as JSON lines, flushed at once, so that a parent process can tell where a
crash came.
"""

from __future__ import annotations

import os
import random
import time
import zlib
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from portakv import BackendUnavailable
from portakv_conformance.cases import Bench
from portakv_conformance.draw import saved
from portakv_conformance.draw.by_hand import DIRECTIONS, HOMES, Shape, Workshop
from portakv_conformance.evidence.verdict import WRONG
from portakv_conformance.judge.claims import AREAS
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import Judge, asked_of, find_home
from portakv_conformance.judge.subject import Subject, subject
from portakv_conformance.record import CaseRecord
from portakv_conformance.run.options import about, case_id, is_case, mark_of
from portakv_conformance.run.outcome import outcome
from portakv_conformance.run.request import Options, chosen
from portakv_conformance.run.worker import Share, append, writable

#: Examples of each drawn case in certification; ``--portakv-fuzz`` replaces them.
EXAMPLES = {"core": 20, "full": 60}
UNAVAILABLE = 3  # exit code
_BIG = 6 << 30  # bytes that the largest cases take on a device
_NOT_ALONE = "This one copy alone, with nothing before it or beside it, does not show it."
_JUDGE = pytest.StashKey[Judge]()
_REPORTS = pytest.StashKey[dict[str, pytest.TestReport]]()


class DeviceAlive:
    """Asked after a case that failed on an accelerator: torch's own work there, and a small copy
    through the backend if that has worked before."""

    def __init__(self, subject: Subject, facility: Facility) -> None:
        self._subject, self._facility = subject, facility
        self._copies: bool | None = None

    def learn(self) -> None:
        """A case has passed: find out, once, whether the small copy works."""
        if self._facility.streams and self._copies is None:
            self._copies = self._fault(copies=True) == ""

    def lost(self) -> str:
        """What everything raises since the case that failed just now; empty where all is well."""
        if not self._facility.streams:
            return ""
        copies = self._copies is True
        # An error of the failed case may be delivered by the next call, and only by that one.
        return self._fault(copies=copies) and self._fault(copies=copies)

    def _fault(self, *, copies: bool) -> str:
        try:
            self._facility.synchronize()
            torch.ones(8, device=self._subject.device).cpu()
            if copies:
                home = find_home(self._subject, HOMES)
                case = Workshop(str(self._subject.device), 0, home).gather(Shape(), [1])
                self._subject.copy(*asked_of(case), count=case.count).synchronize()
        except Exception as error:  # a driver's error may be of any kind
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        return ""


class Suite:
    """One run of the suite on one subject; pytest calls its hooks."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.profile: str = config.getoption("--portakv-profile")
        self.fuzz: int | None = config.getoption("--portakv-fuzz")
        drawn = random.SystemRandom().randrange(1 << 31) if self.fuzz else 0
        seed: int | None = config.getoption("--portakv-seed")
        self.seed = drawn if seed is None else seed
        self.subject = _subject(config)
        self.facility = Facility(self.subject.device, self.subject.emulated)
        self.events: str | None = config.getoption("--portakv-events")
        share = config.getoption("--portakv-share")
        self.share = None if share is None else Share(Path(share))
        self.examples: str | None = config.getoption("--portakv-examples")
        self.alive = DeviceAlive(self.subject, self.facility)
        self._lone = 0  # cases left out for want of a second device
        # Loaded before any case is imported; no case has a number of examples of its own.
        settings.register_profile(
            "portakv", max_examples=self.fuzz or EXAMPLES[self.profile], database=None,
            deadline=None, phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck), print_blob=False,
            report_multiple_bugs=False,  # one failure, the one whose example is kept
        )  # fmt: skip
        settings.load_profile("portakv")

    # -- which cases, and in which order --------------------------------------------------------

    def pytest_report_header(self) -> list[str]:
        """What is judged, where, and from which seed."""
        fuzz = f", {self.fuzz} examples in each drawn case" if self.fuzz else ""
        who = f"{self.subject.target} as {self.subject.name!r} on {self.subject.device}"
        who += " (emulated)" if self.subject.emulated else ""
        return [f"portakv: {who}", f"portakv: profile {self.profile}, seed {self.seed}{fuzz}"]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keep the profile's cases that make sense on this device, the most telling first."""
        mine = [item for item in items if is_case(item)]
        self._lone = 0
        kept = {case_id(item): item for item in mine if self._belongs(item)}
        profile = sorted(kept, key=lambda id: AREAS.index(mark_of(kept[id], "area")))
        ids, only = profile, config.getoption("--portakv-only")
        if only is not None:
            words = Path(only).read_text(encoding="utf-8").split("\n")
            ids, unknown = chosen(profile, sorted(set(filter(None, words))))
            if unknown:
                raise pytest.UsageError(
                    f"Profile {self.profile!r} on {self.subject.device} has no case "
                    f"{unknown[0]!r}; `portakv conform --list` prints the ids."
                )
        wanted = set(ids)
        config.hook.pytest_deselected(items=[i for i in mine if case_id(i) not in wanted])
        items[:] = [item for item in items if not is_case(item)] + [kept[id] for id in ids]
        pairs = [id for id in ids if "two devices" in _needs(kept[id])]
        self._tell({
            "event": "list", "cases": {id: about(kept[id]) for id in ids}, "profile": profile,
            "two devices": pairs, "lone": self._lone,
        })  # fmt: skip

    def _belongs(self, item: pytest.Item) -> bool:
        if mark_of(item, "profile") == "full" and self.profile == "core":
            return False
        for need in _needs(item):
            met, why = self._has(need)
            if why and not met:
                self._tell({"event": "missing", "reason": f"{case_id(item)}: {why}"})
            if not met:
                return False
        return True

    def _has(self, need: str) -> tuple[bool, str]:
        """Whether this device has what a case needs; a sentence where it should have had it."""
        streams = self.facility.streams
        plain = {"host": not streams, "accelerator": streams, "graphs": self.facility.graphs}
        if need in plain:
            return plain[need], ""
        where, emulated = self.subject.device, self.subject.emulated
        if need == "two devices":
            found = self.facility.devices()
            missing = f"it needs two devices of type {where.type}, found {found}."
            if found < 2 and where.type != "cpu" and not emulated:
                self._lone += 1  # no fault of the machine, but a report says so
            return found > 1, missing if emulated else ""
        if need == "memory":
            # An emulated device's takes no room before it is touched.
            enough = self.facility.emulated or self.facility.spare() > _BIG
            missing = f"it needs {_BIG >> 30} GiB of free memory on {where}."
            return streams and enough, missing if streams else ""
        raise pytest.UsageError(f"A case needs {need!r}, which the plugin does not know.")

    def seed_of(self, name: str) -> int:
        """The seed of one case: another for each, all from the run's."""
        return (self.seed << 32) ^ zlib.crc32(name.encode())

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Where the cases are shared, run those that nobody else has taken."""
        if self.share is None or session.testsfailed or session.config.option.collectonly:
            return None
        for item in session.items:
            if is_case(item) and not self.share.take(case_id(item)):
                continue
            # Which case comes next is not known yet, so nothing is kept for it.
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
        return True

    # -- how each one ends ----------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Tell of the case before and after it; a wrapper, so that a crash lies in between."""
        if not is_case(item):
            return (yield)
        self._tell({"event": "start", "id": case_id(item)})
        item.stash[_REPORTS] = {}
        drawn: Any = getattr(item, "obj", None)
        if hasattr(drawn, "hypothesis"):  # now, since all parameters of a test share it
            hypothesis.seed(self.seed_of(case_id(item)))(drawn)
        began = time.perf_counter()
        try:
            return (yield)
        finally:
            self._end(item, time.perf_counter() - began)

    def _end(self, item: pytest.Item, seconds: float) -> None:
        """Tell how a case ended. If nothing more can be judged in this process, end it, so that
        another goes on where the device works."""
        record, where = self._record(item, seconds), self.subject.device
        if record.status == "passed" and record.examples:
            self.alive.learn()
        if why := self.alive.lost() if record.status in WRONG else "":
            lost = f"Behind it everything on {where} fails in this process ({why})."
            record.reason = f"{record.reason} {writable(lost)}"
        elif record.status == "failed":  # elsewhere no example can be judged again
            self._save(record, item.stash.get(_JUDGE, None))
        self._tell({"event": "end", "case": asdict(record)})
        if why and self.events is None:
            pytest.exit(f"Nothing more can be judged on {where}: {why}", returncode=1)
        if why:
            self._tell({"event": "retired", "reason": why})
            os._exit(1)  # an orderly end might hang on the device

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Of a backend that does not say what it claims no case can be judged."""
        if is_case(item) and self.subject.flaw:
            pytest.fail(self.subject.flaw, pytrace=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Keep the reports of a case's phases."""
        report = yield
        if _REPORTS in item.stash:
            item.stash[_REPORTS][report.when] = report
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """The run came to its end."""
        self._tell({"event": "finish"})

    def _record(self, item: pytest.Item, seconds: float) -> CaseRecord:
        judge = item.stash.get(_JUDGE, None)
        reports = item.stash[_REPORTS]
        status, reason, details = outcome(reports, judge, self.subject.flaw)
        return CaseRecord(
            case_id(item), **about(item), status=status, seconds=round(seconds, 4),
            examples=judge.examples if judge else 0, declined=len(judge.declined) if judge else 0,
            reason=writable(reason), details=writable(details), replay=self._replay(item),
        )  # fmt: skip

    def _save(self, record: CaseRecord, judge: Judge | None) -> None:
        """Write the failing example, as far as it was built from a structure and fails also on its
        own: what only a stream or an earlier call made wrong passes when it is replayed."""
        if self.examples is None or judge is None or judge.failing is None:
            return
        name = f"example-{zlib.crc32(record.id.encode()):08x}.json"
        origin = {
            "case": record.id, "backend": self.subject.target, "device": str(self.subject.device),
            "emulated": self.subject.emulated, "seed": self.seed, "reason": record.reason,
            "direct": judge.direct, "end": judge.end,
        }  # fmt: skip
        file = Path(self.examples) / name
        try:
            saved.save(judge.failing, file, origin)
        except ValueError:  # tensors that no arrangement describes
            return
        if saved.replay(file, self.subject) is None:
            file.unlink()
            record.reason = f"{record.reason} {_NOT_ALONE}"
        else:
            record.example = name

    def _replay(self, item: pytest.Item) -> str:
        name, _, test = case_id(item).partition("::")
        module = "portakv_conformance." + name.removesuffix(".py").replace("/", ".")
        given = self.config.option
        asked = Options(
            given.portakv_backend, given.portakv_device, self.profile, self.seed, self.fuzz or 0,
            emulated=given.portakv_emulated,
        )  # fmt: skip
        words = " ".join(asked.suite_options())
        return f"python -m pytest --pyargs '{module}::{test}' {words}"

    def _tell(self, event: dict[str, Any]) -> None:
        if self.events is not None:
            append(self.events, event)


def _needs(item: pytest.Item) -> list[str]:
    return [mark.args[0] for mark in item.iter_markers("needs")]


def pytest_configure(config: pytest.Config) -> None:
    """Find what is judged; exit code 3, with the reason, where it is not available."""
    config.pluginmanager.register(Suite(config), "portakv-suite")


def _subject(config: pytest.Config) -> Subject:
    name, device = config.getoption("--portakv-backend"), config.getoption("--portakv-device")
    try:
        return subject(name, device, emulated=config.getoption("--portakv-emulated"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    except BackendUnavailable as error:
        pytest.exit(str(error), returncode=UNAVAILABLE)


# -- what cases ask for --------------------------------------------------------------------------


def _suite(request: pytest.FixtureRequest) -> Suite:
    suite = request.config.pluginmanager.get_plugin("portakv-suite")
    assert isinstance(suite, Suite)
    return suite


@pytest.fixture(name="subject", scope="session")
def _the_subject(request: pytest.FixtureRequest) -> Subject:
    return _suite(request).subject


@pytest.fixture(scope="session")
def facility(request: pytest.FixtureRequest) -> Facility:
    """Streams and delays of the device."""
    return _suite(request).facility


@pytest.fixture
def judge(request: pytest.FixtureRequest, subject: Subject, facility: Facility) -> Judge:
    """Judges the copies of this case, from a seed of its own."""
    made = Judge(subject, facility, _suite(request).seed_of(case_id(request.node)))
    request.node.stash[_JUDGE] = made
    return made


@pytest.fixture(autouse=True)
def _settled(request: pytest.FixtureRequest) -> Iterator[None]:
    """No case leaves work on the device to the next one."""
    yield
    _suite(request).facility.synchronize()


@pytest.fixture(scope="session")
def home_layout(subject: Subject) -> str:
    """The first of the layouts of the library's self-check that the backend takes."""
    return find_home(subject, HOMES)


@pytest.fixture
def home(judge: Judge, home_layout: str) -> Bench:
    """Makes sides on the judged device, caches in a layout that the backend takes."""
    return Bench(str(judge.subject.device), judge.seed, home_layout, judge=judge)


@pytest.fixture(params=DIRECTIONS)
def direction(request: pytest.FixtureRequest) -> str:
    """Rows go out of a cache, and into it."""
    return str(request.param)


@pytest.fixture
def workshop(judge: Judge) -> Bench:
    """Makes sides on the judged device."""
    return Bench(str(judge.subject.device), judge.seed, judge=judge)
