# SPDX-License-Identifier: Apache-2.0
"""Traces of the hooks of vLLM's connector: which hooks an engine calls, with what, and the answers.

A trace has names for requests and prompts, and numbers of tokens, but no token and no row. Loads
and saves end after a fixed number of steps, so that two recordings of one engine are equal.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from portakv.copy.layer_words import End
from portakv.errors import PortaKVError
from portakv.serving import Plan, Report
from portakv.serving.worker import Blocks
from portakv.storage.work import Handle, Mask

#: Steps after which a save has released its blocks, and after which a load or save has ended.
RELEASED = 1
ENDED = 2
#: What is asked at any time, and changes nothing.
QUERIES = {"has_connector_metadata", "statistics"}
#: What depends on the time. A trace has the call, without figures.
FIGURES = "get_kv_connector_stats"
#: Sides of events. What the harness does is of the side `ENGINE`.
SCHEDULER = "scheduler"
WORKER = "worker"
ENGINE = "engine"
#: Events of the harness: a part of the trace begins; the next load loses a block.
PART = "part"
LOSE = "lose"


class Event(NamedTuple):
    """A call of a hook: its arguments and its answer, as plain values of JSON."""

    side: str
    hook: str
    arguments: list[Any]
    answer: Any = None

    @property
    def plain(self) -> bool:
        """Return whether it has no answer, and nothing but a number as an argument."""
        few = self.arguments == [] or [type(each) for each in self.arguments] == [int]
        return self.answer is None and few and self.side != ENGINE

    def __str__(self) -> str:
        number = "".join(f" {each}" for each in self.arguments)
        return f"{self.side}.{self.hook}{number}"


class Trace(NamedTuple):
    """What an engine has called.

    Attributes:
        about: how it was recorded, and the sizes of the engine.
        events: in their order.
    """

    about: dict[str, Any]
    events: list[Event]


# --- the pace of a worker


class PacedEnd:
    """The end of a load or save, or the release of its blocks, after a number of steps."""

    def __init__(self, pace: Pace, steps: int) -> None:
        self._pace = pace
        self._past = pace.steps + steps

    def done(self) -> bool:
        """Return whether so many steps have passed since the step that began it."""
        return self._pace.steps > self._past

    def wait(self, stream: Any = None, /) -> None:
        """Return: the copies have ended."""


class PacedTransfer(PacedEnd):
    """A load or save whose copies have ended, and whose end the engine learns later."""

    def __init__(self, pace: Pace, moved: Handle, lost: int | None = None) -> None:
        super().__init__(pace, ENDED)
        with suppress(PortaKVError):
            moved.wait()
        self._landed = np.array(moved.landed)
        if lost is not None:
            self._landed[lost] = False
        self.is_issued = False
        self.layers: Sequence[End] = ()
        self.released = None if moved.released is None else PacedEnd(pace, RELEASED)

    @property
    def landed(self) -> Mask:
        """Return the blocks that landed."""
        return self._landed

    def cancel(self) -> bool:
        """Return False: no block is left to start."""
        return False


class PacedBlocks:
    """The blocks of a group of layers, at the pace of a worker."""

    def __init__(self, pace: Pace, blocks: Blocks) -> None:
        self._pace = pace
        self._blocks = blocks
        self.form = blocks.form

    def save(self, *args: Any, **terms: Any) -> Any:
        """Save blocks, and wait for the copies."""
        return PacedTransfer(self._pace, self._blocks.save(*args, **terms))

    def load(self, *args: Any, **terms: Any) -> Any:
        """Load blocks, and wait for the copies; one may be lost."""
        lost = self._pace.lost
        self._pace.lost = None
        return PacedTransfer(self._pace, self._blocks.load(*args, **terms), lost)


class Pace:
    """Counts the steps of a worker, whose loads and saves end after a number of them.

    Attributes:
        steps: so far.
        lost: the place of the block that the next load loses; None: it loses none.
    """

    def __init__(self, store: Any) -> None:
        self.steps = 0
        self.lost: int | None = None
        open_blocks = store.open

        def open_paced(*args: Any) -> list[Blocks]:
            return [PacedBlocks(self, blocks) for blocks in open_blocks(*args)]

        store.open = open_paced

    def count(self, worker_side: Any) -> None:
        """Count the steps of a worker side, each of which ends with a call of `save`."""
        save = worker_side.save

        def count_step(plan: Plan) -> None:
            save(plan)
            self.steps += 1

        worker_side.save = count_step


# --- what is written of arguments and answers


def described_plan(plan: Plan, name: Callable[[str], str]) -> dict[str, Any] | None:
    """Return a plan without keys; None for one with nothing to do."""
    made: dict[str, Any] = {}
    for kind in ("loads", "saves"):
        jobs = [
            [job.number, name(job.request), job.first, len(job.keys), lists(job.blocks)]
            for job in getattr(plan, kind)
        ]
        if jobs:
            made[kind] = jobs
    if plan.stop:
        made["stop"] = [*plan.stop]
    if plan.retained:
        made["retained"] = [name(each) for each in plan.retained]
    if plan.idle:
        made["idle"] = True
    return made or None


def described_report(report: Report) -> dict[str, Any]:
    """Return a report, with what is empty left out."""
    made: dict[str, Any] = {}
    if report.missing:
        made["missing"] = [[each, sorted(lost)] for each, lost in sorted(report.missing.items())]
    if report.released:
        made["released"] = [*report.released]
    return made


def lists(blocks: Iterable[Iterable[int]] | None) -> list[list[int]] | None:
    """Return the blocks of each group as lists."""
    return None if blocks is None else [[int(each) for each in ids] for ids in blocks]


class Recorder:
    """Records the calls of a connector's hooks by the engine, but not of hooks by hooks.

    Attributes:
        events: recorded so far.
        pace: of the worker that was opened last.
    """

    def __init__(self, paced: bool = True) -> None:
        self.events = list[Event]()
        self.pace: Pace | None = None
        self._paced = paced
        self._inside = False
        self._requests = dict[str, Any]()
        self._names = dict[str, str]()
        self._prompts = dict[tuple[int, ...], int]()
        self._layers = dict[str, int]()

    def part(self, title: str) -> None:
        """Note that another part of the trace begins."""
        self.events.append(Event(ENGINE, PART, [title]))

    def lose(self, place: int) -> None:
        """Let the next load lose a block."""
        assert self.pace is not None
        self.pace.lost = place
        self.events.append(Event(ENGINE, LOSE, [place]))

    @contextmanager
    def recording(self, connector: type) -> Iterator[None]:
        """Record the hooks of all objects of a class."""
        own = {name: each for name, each in vars(connector).items() if name in hooks_of(connector)}
        for name in hooks_of(connector):
            setattr(connector, name, self._noted(name, getattr(connector, name)))
        try:
            yield
        finally:
            for name in hooks_of(connector):
                if name in own:
                    setattr(connector, name, own[name])
                else:
                    delattr(connector, name)

    def _noted(self, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(connector: Any, *args: Any, **terms: Any) -> Any:
            if self._inside:
                return call(connector, *args, **terms)
            role = args[1] if hook == "__init__" else connector.role
            side = role.name.lower()
            arguments = self._arguments(hook, args)
            if hook == FIGURES and self._paced:  # they come once a second
                self.events.append(Event(side, hook, arguments))
                return None
            self._inside = True
            try:
                answer = call(connector, *args, **terms)
            finally:
                self._inside = False
            self.events.append(Event(side, hook, arguments, self._answer(hook, answer)))
            if self._paced:
                self._set_pace(hook, side, connector)
            return answer

        return noted

    def _set_pace(self, hook: str, side: str, connector: Any) -> None:
        """Let loads and saves end after a number of steps."""
        if hook == "__init__" and side == WORKER:
            self.pace = Pace(connector.store)
        elif hook.startswith("register"):
            assert self.pace is not None
            self.pace.count(connector.worker_side)

    def _arguments(self, hook: str, args: Sequence[Any]) -> list[Any]:
        """Return what is written of the arguments of a hook."""
        describe = getattr(self, f"_of_{hook}", None)
        return [] if describe is None else describe(*args)

    def _name(self, request: str) -> str:
        return self._names[request]

    def _tokens(self, request: str) -> int:
        return len(self._requests[request].all_token_ids)

    def _of_on_new_request(self, request: Any) -> list[Any]:
        name = self._names[request.request_id] = f"r{len(self._names)}"
        self._requests[request.request_id] = request
        tokens = tuple(request.all_token_ids)
        return [name, self._prompts.setdefault(tokens, len(self._prompts)), len(tokens)]

    def _of_get_num_new_matched_tokens(self, request: Any, computed: int) -> list[Any]:
        name = request.request_id
        return [self._name(name), self._tokens(name), computed]

    def _of_update_state_after_alloc(self, request: Any, blocks: Any, tokens: int) -> list[Any]:
        return [self._name(request.request_id), lists(blocks.get_block_ids()), tokens]

    def _of_build_connector_meta(self, output: Any) -> list[Any]:
        many = output.num_scheduled_tokens
        new = [
            [
                self._name(each.req_id),
                self._tokens(each.req_id),
                each.num_computed_tokens,
                many[each.req_id],
                lists(each.block_ids),
            ]
            for each in output.scheduled_new_reqs
        ]
        cached = output.scheduled_cached_reqs
        old = [
            [
                self._name(name),
                self._tokens(name),
                computed,
                many[name],
                lists(ids),
                name in cached.resumed_req_ids,
            ]
            for name, ids, computed in zip(
                cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
            )
        ]
        gone = sorted(self._name(name) for name in output.preempted_req_ids or ())
        return [new, old, gone] if new or old or gone else []

    def _of_update_connector_output(self, output: Any) -> list[Any]:
        sent = sorted(self._name(name) for name in output.finished_sending or ())
        return [sent] if sent else []

    def _of_request_finished(self, request: Any, blocks: Any) -> list[Any]:
        name = request.request_id
        return [self._name(name), self._tokens(name)]

    _of_request_finished_all_groups = _of_request_finished

    def _of_register_kv_caches(self, caches: dict[str, Any]) -> list[Any]:
        self._layers = {name: number for number, name in enumerate(caches)}
        return [len(caches)]

    def _of_wait_for_layer_load(self, layer: str, *_: Any) -> list[Any]:
        return [self._layers.setdefault(layer, len(self._layers))]

    _of_save_kv_layer = _of_wait_for_layer_load

    def _of_get_transfer_results(self, finished: Iterable[str]) -> list[Any]:
        names = sorted(self._name(name) for name in finished)
        return [names] if names else []

    def _answer(self, hook: str, answer: Any) -> Any:
        """Return what is written of the answer of a hook."""
        if hook == "build_connector_meta":
            return described_plan(answer.plan, self._name)
        if hook == "build_connector_worker_meta":
            return None if answer is None else described_report(answer.report)
        if hook == "get_transfer_results":
            kinds = ("finished_sending", "finished_recving", "failed_recving")
            ends = {kind: sorted(map(self._name, getattr(answer, kind) or ())) for kind in kinds}
            return {kind: names for kind, names in ends.items() if names} or None
        if hook == "get_block_ids_with_load_errors":
            return sorted(answer) or None
        if hook in ANSWERS:
            return [*answer] if isinstance(answer, tuple) else answer
        return None


#: Hooks whose answers are plain values.
ANSWERS = {
    "get_num_new_matched_tokens",
    "has_pending_block_frees",
    "request_finished",
    "request_finished_all_groups",
    "reset_cache",
}


def hooks_of(connector: type) -> list[str]:
    """Return the names of the methods that an engine calls on a connector."""
    names = [
        name
        for name in dir(connector)
        if not name.startswith("_")
        and name not in QUERIES
        and inspect.isfunction(inspect.getattr_static(connector, name))
    ]
    return ["__init__", *names]


# --- files


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace: a line for each event with values, and names for runs of plain ones."""
    phrases = dict[str, str]()
    lines = list[str]()
    for run in runs_of(trace.events):
        if run[0].plain:
            text = ", ".join(str(event) for event in run)
            lines.append(json.dumps(phrases.setdefault(text, f"run {len(phrases)}")))
        else:
            lines += [json.dumps([*event]) for event in run]
    named = {name: text for text, name in phrases.items()}
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in trace.about.items()]
    runs = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(text)}" for name, text in named.items())
    parts.append(f'"runs": {{\n  {runs}\n }}')
    parts.append('"events": [\n  ' + ",\n  ".join(lines) + "\n ]")
    path.write_text("{\n " + ",\n ".join(parts) + "\n}\n")


def read_trace(path: Path) -> Trace:
    """Read a trace that `write_trace` has written."""
    read = json.loads(path.read_text())
    runs = read.pop("runs")
    events = list[Event]()
    for line in read.pop("events"):
        if isinstance(line, str):
            events += [plain_event(text) for text in runs[line].split(", ")]
        else:
            events.append(Event(*line))
    return Trace(read, events)


def plain_event(text: str) -> Event:
    """Return an event from its text."""
    call, *numbers = text.split(" ")
    side, hook = call.split(".")
    return Event(side, hook, [int(number) for number in numbers])


def runs_of(events: Sequence[Event]) -> Iterator[list[Event]]:
    """Yield events in runs: of plain ones, or of others."""
    run = list[Event]()
    for event in events:
        if run and run[-1].plain is not event.plain:
            yield run
            run = []
        run.append(event)
    if run:
        yield run
