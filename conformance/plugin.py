# SPDX-License-Identifier: Apache-2.0
"""The suite under pytest: what is judged, which cases, in which order, and how each one ended.

Loaded by `options` where ``--portakv-backend`` is given. What happens is appended to the file of
``--portakv-events`` as JSON lines, flushed at once, so that a parent process can tell where a
crash came.
"""

from __future__ import annotations

import json
import random
import time
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings

from portakv import BackendUnavailable

from . import saved
from .claims import AREAS, NOT_CLAIMED
from .facility import Facility
from .judging import Judge, find_home
from .options import PACKAGE
from .records import CaseRecord, Status
from .shapes import HOMES, Workshop
from .subject import Subject, subject

#: Examples of each drawn case in certification; ``--portakv-fuzz`` replaces them.
EXAMPLES = {"core": 40, "full": 120}
UNAVAILABLE = 3  # exit code
_BIG = 6 << 30  # bytes that the largest cases take on a device
_JUDGE = pytest.StashKey[Judge]()
_REPORTS = pytest.StashKey[dict[str, pytest.TestReport]]()


class Suite:
    """One run of the suite on one subject; pytest calls its hooks."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.profile: str = config.getoption("--portakv-profile")
        self.fuzz: int | None = config.getoption("--portakv-fuzz")
        self.seed = _seed(config.getoption("--portakv-seed"), self.fuzz)
        self.subject = _subject(config)
        self.facility = Facility(self.subject.device, self.subject.emulated)
        self.events: str | None = config.getoption("--portakv-events")
        self.only = _only(config.getoption("--portakv-only"))
        self.examples: str | None = config.getoption("--portakv-examples")
        self._load_settings()

    def _load_settings(self) -> None:
        """Loaded before any case is imported; no case has a number of examples of its own."""
        settings.register_profile(
            "portakv",
            max_examples=self.fuzz or EXAMPLES[self.profile],
            database=None,
            deadline=None,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        settings.load_profile("portakv")

    # -- which cases, and in which order --------------------------------------------------------

    def pytest_report_header(self) -> list[str]:
        """What is judged, where, and from which seed."""
        fuzz = f", {self.fuzz} examples in each drawn case" if self.fuzz else ""
        return [
            f"portakv: {self.subject.target} as {self.subject.name!r} on {self.subject.device}"
            f"{' (emulated)' if self.subject.emulated else ''}",
            f"portakv: profile {self.profile}, seed {self.seed}{fuzz}",
        ]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keep the profile's cases that make sense on this device, the most telling first."""
        mine = [item for item in items if PACKAGE in item.path.parents]
        dropped = [item for item in mine if not self._belongs(item)]
        kept = [item for item in mine if item not in set(dropped)]
        kept.sort(key=lambda item: AREAS.index(_mark(item, "area", "core")))
        if self.only is not None:
            unknown = sorted(self.only - {case_id(item) for item in kept})
            if unknown:
                raise pytest.UsageError(
                    f"{len(unknown)} ids are not in profile {self.profile!r} on "
                    f"{self.subject.device}, the first of them {unknown[0]!r}."
                )
            dropped += [item for item in kept if case_id(item) not in self.only]
            kept = [item for item in kept if case_id(item) in self.only]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if PACKAGE not in item.path.parents] + kept
        self._tell({"event": "list", "ids": [case_id(item) for item in kept]})

    def _belongs(self, item: pytest.Item) -> bool:
        if _mark(item, "profile", "core") == "full" and self.profile == "core":
            return False
        for mark in item.iter_markers("needs"):
            met, why = self._has(mark.args[0])
            if not met:
                if why:
                    self._tell({"event": "missing", "reason": f"{case_id(item)}: {why}"})
                return False
        return True

    def _has(self, need: str) -> tuple[bool, str]:
        """Whether this device has what a case needs; a sentence where it should have had it."""
        streams = self.facility.streams
        if need == "host":
            return not streams, ""
        if need == "accelerator":
            return streams, ""
        if need == "graphs":
            return self.facility.graphs, ""
        if need == "two devices":
            found = self.facility.devices()
            missing = f"it needs two devices of type {self.subject.device.type}, found {found}."
            return found > 1, missing if self.subject.emulated else ""
        if need == "memory":
            wanted = self.subject.device.type != "cpu" and not self.subject.emulated
            missing = f"it needs {_BIG >> 30} GiB of free memory on {self.subject.device}."
            return wanted and self.facility.spare() > _BIG, missing if wanted else ""
        raise pytest.UsageError(f"A case needs {need!r}, which the plugin does not know.")

    def seed_of(self, name: str) -> int:
        """The seed of one case: another for each, all from the run's."""
        return (self.seed << 32) ^ zlib.crc32(name.encode())

    # -- how each one ends ----------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Tell of the case before and after it; a wrapper, so that a crash lies in between."""
        if PACKAGE not in item.path.parents:
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
            record = self._record(item, time.perf_counter() - began)
            self._tell({"event": "end", "case": json.loads(record.line())})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
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
        status, reason, details = _outcome(item, judge)
        record = CaseRecord(
            id=case_id(item),
            area=_mark(item, "area", "core"),
            profile=_mark(item, "profile", "core"),
            claim=_mark(item, "claim", ""),
            status=status,
            seconds=round(seconds, 4),
            examples=judge.examples if judge else 0,
            tags=_tags(item),
            reason=reason,
            details=details,
            replay=self._replay(item),
        )
        if status == "failed" and judge is not None and judge.failing is not None:
            record.example = self._save(record, judge)
        return record

    def _save(self, record: CaseRecord, judge: Judge) -> str:
        """Write the failing example, as far as it was built from a structure; its file name."""
        if self.examples is None or judge.failing is None:
            return ""
        name = f"example-{zlib.crc32(record.id.encode()):08x}.json"
        about = {
            "case": record.id, "backend": self.subject.target, "device": str(self.subject.device),
            "seed": self.seed, "reason": record.reason,
        }  # fmt: skip
        try:
            saved.save(judge.failing, Path(self.examples) / name, about)
        except ValueError:  # tensors that no arrangement describes
            return ""
        return name

    def _replay(self, item: pytest.Item) -> str:
        name, _, test = case_id(item).partition("::")
        module = "portakv_conformance." + name.removesuffix(".py").replace("/", ".")
        options = self.config.option
        device, fuzz = options.portakv_device, f" --portakv-fuzz {self.fuzz}" if self.fuzz else ""
        emulated = " --portakv-emulated" if options.portakv_emulated else ""
        return (
            f"python -m pytest --pyargs '{module}::{test}' "
            f"--portakv-backend {options.portakv_backend} --portakv-device {device}{emulated} "
            f"--portakv-profile {self.profile} --portakv-seed {self.seed}{fuzz}"
        )

    def _tell(self, event: dict[str, Any]) -> None:
        if self.events is not None:
            # Opened each time: a forked or crashing case can take no buffered line along.
            with open(self.events, "a", encoding="utf-8") as file:
                file.write(json.dumps(event, ensure_ascii=False) + "\n")


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


def _seed(asked: int | None, fuzz: int | None) -> int:
    if asked is not None:
        return asked
    return random.SystemRandom().randrange(1 << 31) if fuzz else 0


def _only(file: str | None) -> set[str] | None:
    if file is None:
        return None
    return {line for line in Path(file).read_text(encoding="utf-8").splitlines() if line}


def case_id(item: pytest.Item) -> str:
    """The id of a case: the file relative to this package, and what pytest calls the test."""
    return f"{item.path.relative_to(PACKAGE).as_posix()}::{item.nodeid.partition('::')[2]}"


def _mark(item: pytest.Item, name: str, default: str) -> str:
    mark = item.get_closest_marker(name)
    return default if mark is None else str(mark.args[0])


def _tags(item: pytest.Item) -> dict[str, str]:
    tags: dict[str, str] = {}
    for mark in item.iter_markers("tags"):
        tags = {**mark.kwargs, **tags}
    return tags


def _outcome(item: pytest.Item, judge: Judge | None) -> tuple[Status, str, str]:
    """Status, a sentence and the details of a case whose phases have all ended."""
    reports = item.stash[_REPORTS]
    for when in ("setup", "call", "teardown"):
        report = reports.get(when)
        if report is None or report.passed:
            continue
        if report.skipped:
            return "error", "The case skipped itself; a case of the suite never does.", ""
        status: Status = "failed" if when == "call" else "error"
        return status, _sentence(report), _details(report)
    if "call" not in reports:
        return "error", "The case did not come to its end.", ""
    if NOT_CLAIMED in item.stash:
        return "not-claimed", item.stash[NOT_CLAIMED], ""
    if judge is not None and judge.declined and not judge.examples:
        return "not-claimed", f"The backend declines the plan: {judge.declined[0]}", ""
    return "passed", "", ""


def _sentence(report: pytest.TestReport) -> str:
    """The message of the exception, without its type where it is an assertion's."""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = str(getattr(crash, "message", report.longrepr)).strip()
    message = message.removeprefix("AssertionError: ").partition("\nassert ")[0]
    message = message.partition("\nFalsifying example")[0]
    return message.partition(" The case was ")[0].strip()


def _details(report: pytest.TestReport) -> str:
    parts = [report.longreprtext]
    parts += [f"--- {name}\n{content}" for name, content in report.sections]
    return "\n".join(parts)[-20_000:]


# -- what cases ask for --------------------------------------------------------------------------


def _suite(request: pytest.FixtureRequest) -> Suite:
    suite = request.config.pluginmanager.get_plugin("portakv-suite")
    assert isinstance(suite, Suite)
    return suite


@pytest.fixture(name="subject", scope="session")
def _the_subject(request: pytest.FixtureRequest) -> Subject:
    """The backend that is judged."""
    return _suite(request).subject


@pytest.fixture(scope="session")
def facility(request: pytest.FixtureRequest) -> Facility:
    """Streams and delays of the device."""
    return _suite(request).facility


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this case."""
    return _suite(request).seed_of(case_id(request.node))


@pytest.fixture
def judge(request: pytest.FixtureRequest, subject: Subject, facility: Facility, seed: int) -> Judge:
    """Judges the copies of this case."""
    made = Judge(subject, facility, seed)
    request.node.stash[_JUDGE] = made
    return made


@pytest.fixture(autouse=True)
def _settled(request: pytest.FixtureRequest) -> Iterator[None]:
    """No case leaves work on the device to the next one."""
    yield
    suite = request.config.pluginmanager.get_plugin("portakv-suite")
    if suite is not None:
        suite.facility.synchronize()


@pytest.fixture(scope="session")
def home_layout(subject: Subject) -> str:
    """The first of the layouts of the library's self-check that the backend takes."""
    return find_home(subject, HOMES)


@pytest.fixture
def home(subject: Subject, seed: int, home_layout: str) -> Workshop:
    """Makes sides on the judged device, caches in a layout that the backend takes."""
    return Workshop(str(subject.device), seed, home_layout)


@pytest.fixture
def workshop(subject: Subject, seed: int) -> Workshop:
    """Makes sides on the judged device."""
    return Workshop(str(subject.device), seed)
