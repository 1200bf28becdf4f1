# SPDX-License-Identifier: Apache-2.0
"""The suite under pytest: the subject, the cases, their order, and the result of each.

Loaded by `options` if ``--portakv-backend`` is passed. Events are appended to the file of
``--portakv-events`` immediately, so that a parent process knows which case crashed.
"""

from __future__ import annotations

import gc
import os
import random
import time
import zlib
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from portakv.errors import PortaKVError
from portakv_conformance.cases import AREAS, Bench
from portakv_conformance.draw import saved
from portakv_conformance.draw.by_hand import BASE_LAYOUTS, DIRECTIONS, Shape, Workshop
from portakv_conformance.evidence import environment
from portakv_conformance.evidence.verdict import WRONG
from portakv_conformance.judge.device_support import Facility
from portakv_conformance.judge.judging import Judge, arguments_of, find_base_layout
from portakv_conformance.judge.subject import SIMULATED, Subject, subject
from portakv_conformance.record import CaseRecord, JsonObject
from portakv_conformance.run.options import about, case_id, is_case, mark_of
from portakv_conformance.run.outcome import outcome
from portakv_conformance.run.request import chosen
from portakv_conformance.run.worker import Share, append

#: Examples of each drawn case in certification; ``--portakv-fuzz`` replaces them.
EXAMPLES = {"core": 20, "full": 60}
UNAVAILABLE = 3  # exit code
_BIG = 6 << 30  # bytes that the largest cases take on a device
_NOT_ALONE = "This one copy alone, with nothing before or alongside it, does not show it."
_JUDGE = pytest.StashKey[Judge]()
_REPORTS = pytest.StashKey[dict[str, pytest.TestReport]]()


class DeviceAlive:
    """Check an accelerator after a case failed on it: torch's own work there, and a small copy
    through the backend if that has worked before."""

    def __init__(self, subject: Subject, facility: Facility) -> None:
        self._subject = subject
        self._facility = facility
        self._copies = False  # whether the small copy is known to work

    def learn(self) -> None:
        """Note that a case has passed, and find out whether the small copy works."""
        if self._facility.streams and not self._copies:
            self._copies = not self._fault(copy=True)

    def lost(self) -> str:
        """Return the error that everything raises since the case that failed; empty if the device
        works."""
        if not self._facility.streams:
            return ""
        # An error of the failed case may be delivered by the next call, and only by that one.
        return self._fault(self._copies) and self._fault(self._copies)

    def _fault(self, copy: bool) -> str:
        try:
            self._facility.synchronize()
            torch.ones(8, device=self._subject.device).cpu()
            if copy:
                bench = find_base_layout(self._subject, BASE_LAYOUTS)
                case = Workshop(str(self._subject.device), 0, bench).gather(Shape(), [1])
                self._subject.copy(*arguments_of(case), count=case.count).synchronize()
        except Exception as error:  # a driver's error may be of any kind
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        return ""


class Elsewhere(Facility):
    """The facilities of a kind of device that is not here; good for collecting only."""

    def __init__(self, kind: str) -> None:
        device: Any = SimpleNamespace(type=kind, index=0)  # torch knows no device that is not here
        super().__init__(device, emulated=kind == SIMULATED)

    def devices(self) -> int:
        return 1 if self.device.type == "cpu" else 2

    def spare(self) -> int:
        return 1 << 62

    def synchronize(self) -> None:
        """Do nothing: there is nothing to wait for."""


class Suite:
    """One run of the suite on one subject; pytest calls its hooks."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        self.profile: str = option("--portakv-profile")
        self.fuzz: int | None = option("--portakv-fuzz")
        drawn = random.SystemRandom().randrange(1 << 31) if self.fuzz else 0
        seed: int | None = option("--portakv-seed")
        self.seed = drawn if seed is None else seed
        self.events: str | None = option("--portakv-events")
        # A failure before this line is a broken installation, a later one the backend's.
        self._tell({"event": "loading"})
        self.subject = self._find(config)
        listed = option("--portakv-listed")
        own = self.subject
        self.facility = Elsewhere(listed) if listed else Facility(own.device, own.emulated)
        self.share = Share(Path(shared)) if (shared := option("--portakv-share")) else None
        self.examples: str | None = option("--portakv-examples")
        self.alive = DeviceAlive(self.subject, self.facility)
        self._lone = 0  # cases left out for want of a second device
        # Loaded before any case is imported; no case sets its own number of examples.
        settings.register_profile(
            "portakv",
            max_examples=self.fuzz or EXAMPLES[self.profile],
            database=None,
            deadline=None,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            print_blob=False,
            report_multiple_bugs=False,  # one failure, the one whose example is kept
        )
        settings.load_profile("portakv")

    def _find(self, config: pytest.Config) -> Subject:
        """Return the subject, and report it as an event; exit with code 3 and the reason if it is
        not available."""
        requested, emulated = map(config.getoption, ("--portakv-device", "--portakv-emulated"))
        try:
            judged = subject(config.getoption("--portakv-backend"), requested, emulated=emulated)
            if self.events is not None:
                claims = environment.plain(judged.can)
                self._tell(
                    {
                        "event": "subject",
                        "backend": environment.describe_backend(judged),
                        "environment": environment.describe_environment(judged, requested),
                        "capabilities": claims if isinstance(claims, dict) else {"": claims},
                        "trace": [str(decision) for decision in judged.trace],
                    }
                )
            return judged
        except PortaKVError as error:
            why = str(error)
        except ValueError as error:
            self._refuse(str(error))
        except Exception as error:  # a backend may fail in any way while it states its claims
            why = f"It failed: {type(error).__name__}: {error}"
        self._tell({"event": "unavailable", "reason": why})
        pytest.exit(why, returncode=UNAVAILABLE)

    def _refuse(self, why: str) -> NoReturn:
        """Report that the request is not valid, and end pytest."""
        self._tell({"event": "usage", "reason": why})
        raise pytest.UsageError(why)

    def pytest_report_header(self) -> list[str]:
        """Return the subject, its device and the seed."""
        fuzz = f", {self.fuzz} examples in each drawn case" if self.fuzz else ""
        who = f"{self.subject.target} as {self.subject.name!r} on {self.subject.device}"
        who += " (emulated)" if self.subject.emulated else ""
        return [f"portakv: {who}", f"portakv: profile {self.profile}, seed {self.seed}{fuzz}"]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keep the profile's cases that make sense on this device, the most telling first."""
        own = [item for item in items if is_case(item)]
        self._lone = 0
        retained = {case_id(item): item for item in own if self._belongs(item)}
        profile = sorted(retained, key=lambda id: AREAS.index(mark_of(retained[id], "area")))
        ids = profile
        only = config.getoption("--portakv-only")
        if only is not None:
            words = Path(only).read_text(encoding="utf-8").split("\n")
            ids, unknown = chosen(profile, sorted(set(filter(None, words))))
            if unknown:
                self._refuse(
                    f"Expected a case, got {unknown[0]!r}, but no id of the profile "
                    f"{self.profile!r} on {self.subject.device} begins so; `portakv conform "
                    f"--list` prints the ids."
                )
        wanted = set(ids)
        config.hook.pytest_deselected(items=[i for i in own if case_id(i) not in wanted])
        items[:] = [item for item in items if not is_case(item)] + [retained[id] for id in ids]
        pairs = [id for id in ids if "two devices" in _needs(retained[id])]
        self._tell(
            {
                "event": "list",
                "cases": {id: about(retained[id]) for id in ids},
                "profile": profile,
                "two devices": pairs,
                "lone": self._lone,
            }
        )

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
        """Return True if this device has what a case needs; and a sentence if it should have had
        it."""
        streams = self.facility.streams
        where = self.subject.device
        plain = {"host": not streams, "accelerator": streams, "graphs": self.facility.graphs}
        if need in plain:
            return plain[need], ""
        if need == "two devices":
            count = self.facility.devices()
            if self.subject.emulated:
                return count > 1, f"it needs two devices of type {where.type}, found {count}."
            # With one real device it is not a fault of the machine, but a report says so.
            self._lone += count < 2 and where.type != "cpu"
            return count > 1, ""
        if need == "memory":
            # An emulated device's takes no room before it is touched.
            enough = self.facility.emulated or self.facility.spare() > _BIG
            missing = f"it needs {_BIG >> 30} GiB of free memory on {where}."
            return streams and enough, missing if streams else ""
        raise pytest.UsageError(f"Expected a need that the plugin knows, got {need!r}.")

    def seed_of(self, name: str) -> int:
        """Return the seed of one case: another one for each case, all from the seed of the run."""
        return (self.seed << 32) ^ zlib.crc32(name.encode())

    def pytest_collection_finish(self) -> None:
        """Keep torch and the cases out of the collections of garbage that pytest and cases make."""
        gc.collect()
        gc.freeze()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run the shared cases that no other worker has taken."""
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

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Report a case before and after it; a wrapper, so that a crash lies in between."""
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
        """Report the end of a case. If nothing more can be judged in this process, end it, so that
        another process goes on where the device works."""
        reports = item.stash[_REPORTS]
        judge = item.stash.get(_JUDGE, None)
        status, reason, details = outcome(reports, judge, self.subject.flaw)
        where = self.subject.device
        record = CaseRecord(
            case_id(item),
            **about(item),
            status=status,
            seconds=round(seconds, 4),
            examples=judge.examples if judge else 0,
            declined=len(judge.declined) if judge else 0,
            reason=reason,
            details=details,
        )
        if record.status == "passed" and record.examples:
            self.alive.learn()
        if why := self.alive.lost() if record.status in WRONG else "":
            record.reason += f" After it everything on {where} fails in this process ({why})."
        elif record.status == "failed":  # elsewhere no example can be judged again
            self._save(record, judge)
        self._tell({"event": "end", "case": asdict(record)})
        if why and self.events is None:
            pytest.exit(f"Nothing more can be judged on {where}: {why}", returncode=1)
        if why:
            self._tell({"event": "retired", "reason": why})
            os._exit(1)  # an orderly end might hang on the device

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Fail every case of a backend that does not state its claims."""
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
        """Report that the run came to its end."""
        self._tell({"event": "finish"})

    def _save(self, record: CaseRecord, judge: Judge | None) -> None:
        """Write the failing example, as far as it was built from a structure and fails also on its
        own: what only a stream or an earlier call made wrong passes when it is replayed."""
        if self.examples is None or judge is None or judge.failing is None:
            return
        name = f"example-{zlib.crc32(record.id.encode()):08x}.json"
        origin = {
            "case": record.id,
            "backend": self.subject.target,
            "device": str(self.subject.device),
            "emulated": self.subject.emulated,
            "seed": self.seed,
            "reason": record.reason,
            "direct": judge.direct,
            "end": judge.end,
        }
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

    def _tell(self, event: JsonObject) -> None:
        if self.events is not None:
            append(self.events, event)


def _needs(item: pytest.Item) -> list[str]:
    return [mark.args[0] for mark in item.iter_markers("needs")]


def pytest_configure(config: pytest.Config) -> None:
    """Find the subject."""
    config.pluginmanager.register(Suite(config), "portakv-suite")


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Suite:
    """Return the run that a case is part of."""
    plugin = pytestconfig.pluginmanager.get_plugin("portakv-suite")
    assert isinstance(plugin, Suite)
    return plugin


@pytest.fixture(name="subject", scope="session")
def _the_subject(suite: Suite) -> Subject:
    return suite.subject


@pytest.fixture(scope="session")
def facility(suite: Suite) -> Facility:
    """Return streams and delays of the device."""
    return suite.facility


@pytest.fixture
def judge(request: pytest.FixtureRequest, suite: Suite) -> Judge:
    """Return a judge for the copies of this case, with a separate seed."""
    made = Judge(suite.subject, suite.facility, suite.seed_of(case_id(request.node)))
    request.node.stash[_JUDGE] = made
    return made


@pytest.fixture(autouse=True)
def _settled(facility: Facility) -> Iterator[None]:
    """Wait after each case, so no case leaves work on the device to the next one."""
    yield
    facility.synchronize()


@pytest.fixture(scope="session")
def base_layout(subject: Subject) -> str:
    """Return the first layout of the library's self-check that the backend takes."""
    return find_base_layout(subject, BASE_LAYOUTS)


@pytest.fixture
def bench(judge: Judge, base_layout: str) -> Bench:
    """Return a bench of the judged device, with caches in a layout that the backend takes."""
    return Bench(str(judge.subject.device), judge.seed, base_layout, judge=judge)


@pytest.fixture(params=DIRECTIONS)
def direction(request: pytest.FixtureRequest) -> str:
    """Return the direction: rows go out of a cache, or into it."""
    return str(request.param)


@pytest.fixture
def workshop(judge: Judge) -> Bench:
    """Return a bench of the judged device."""
    return Bench(str(judge.subject.device), judge.seed, judge=judge)
