# SPDX-License-Identifier: Apache-2.0
"""`portakv explain --hooks URL`: print what the hooks of the connector cost a running engine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from typing import NamedTuple
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from portakv.cli.console import Column, print_json, print_prose, print_table
from portakv.cli.sides import in_time
from portakv.errors import InvalidTerms, PortaKVError
from portakv.serving.costs import BOUNDS, LIMIT

#: Seconds to wait for the engine's answer, and its bytes at most.
PATIENCE = 10.0
MOST = 64 << 20
#: A counter of the connector as Prometheus's text has it, with its labels and its value.
SAMPLE = re.compile(r"vllm:portakv_(\w+)_total(?:\{(.*)\})?\s+([-+.\deE]+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class HookCost(NamedTuple):
    """What a hook costs a step, in seconds.

    Attributes:
        side: that calls it, the scheduler or a worker.
        idle: mean of the steps without work; None: there was none.
        mean: of all steps.
    """

    hook: str
    side: str
    idle: float | None
    mean: float


class _Sample(NamedTuple):
    """A counter of one engine."""

    name: str
    labels: Mapping[str, str]
    value: float


def print_hooks(url: str, as_json: bool) -> int:
    """Print what each hook costs a step of the engine of a server.

    Args:
        url: of the server, or of its metrics.
        as_json: print one JSON value.

    Raises `InvalidTerms` for a text that is not an address, and `PortaKVError` for a server that
    does not answer, or whose engine has no connector of PortaKV.
    """
    url = _metrics_of(url)
    text = _read(url)
    steps, costs = costs_in(text)
    if not costs:
        raise PortaKVError(
            f"Expected an engine with PortaKVConnector at {url}, got metrics without its counters. "
            f"They come with the first step of the engine: send it a request, or start it with "
            f"--kv-transfer-config."
        )
    medians = medians_in(text)
    idle = sum(cost.idle or 0.0 for cost in costs)
    measured = any(cost.idle is not None for cost in costs)
    if as_json:
        hooks = [cost._asdict() for cost in costs]
        seconds = idle if measured else None
        about = {"url": url, "limit": LIMIT, "idle": seconds, "idle_medians": medians}
        print_json({**about, "steps": steps, "hooks": hooks})
        return 0
    columns = [Column("hook", whole=True), Column("side")]
    columns += [Column("a step without work", right=True), Column("a step", right=True)]
    rows = [[cost.hook, cost.side, _time(cost.idle), _time(cost.mean)] for cost in costs]
    total = _time(idle if measured else None)
    print_table(columns, [*rows, ["all", "", total, _time(sum(cost.mean for cost in costs))]])
    print()
    if not measured:
        print_prose("The engine has had no step without work for the connector.")
    else:
        verdict = "within" if idle <= LIMIT else "more than"
        limit = in_time(LIMIT)
        print_prose(f"A step without work costs {total}, {verdict} the limit of {limit}.")
    print_prose(
        "Means since the engine has started: of its scheduler, and of a worker. They include the "
        "time in which other processes had the core, so a busy machine has longer ones."
    )
    if medians:
        parts = " and ".join(f"{in_time(x)} ({side})" for side, x in medians.items())
        print_prose(
            f"The median of steps without work is about {parts}, estimated from counts of steps "
            f"within some times."
        )
    return 0


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else in_time(seconds)


def _metrics_of(url: str) -> str:
    """Return the address of the metrics of a server."""
    try:
        parts = urlsplit(url)
    except ValueError:  # half an IPv6 address
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InvalidTerms(
            f"Expected --hooks to be the address of a server, such as http://localhost:8000, got "
            f"{url!r}. Correct it."
        )
    return parts._replace(path=parts.path if parts.path.strip("/") else "/metrics").geturl()


def _read(url: str) -> str:
    """Return what a server answers."""
    try:
        with urlopen(url, timeout=PATIENCE) as answer:
            text: bytes = answer.read(MOST)
    except (URLError, HTTPException, OSError) as error:
        raise PortaKVError(
            f"Expected the metrics of an engine at {url}, got an error: {error}. Start the server, "
            f"or correct the address."
        ) from None
    return text.decode("utf-8", "replace")


def _samples(text: str) -> Iterator[_Sample]:
    """Yield the connector's counters in the metrics of a server."""
    for line in text.splitlines():
        found = SAMPLE.match(line)
        if found:
            yield _Sample(found[1], dict(LABEL.findall(found[2] or "")), float(found[3]))


def medians_in(text: str) -> dict[str, float]:
    """Return an estimate of the median seconds of steps without work, by side: of all engines of a
    server, on a line between the ends of the bucket that has the median.

    A side whose median is longer than the longest bucket has the end of that one.
    """
    within = dict[str, dict[float, float]]()
    steps = dict[str, float]()
    for name, labels, value in _samples(text):
        side = labels.get("side", "")
        if name == "idle_steps_within" and "seconds" in labels:
            of_side = within.setdefault(side, {})
            bound = float(labels["seconds"])
            of_side[bound] = of_side.get(bound, 0.0) + value
        elif name == "idle_steps":
            steps[side] = steps.get(side, 0.0) + value
    medians = dict[str, float]()
    for side, counts in sorted(within.items()):
        half = steps.get(side, 0.0) / 2
        before = 0.0
        for bound, many in sorted(counts.items()):
            medians[side] = bound
            if many >= half > before:
                start = max((each for each in BOUNDS if each < bound), default=0.0)
                medians[side] = start + (bound - start) * (half - before) / (many - before)
                break
            before = many
    return medians


def costs_in(text: str) -> tuple[dict[str, dict[str, float]], list[HookCost]]:
    """Return the steps of each side, and what each hook costs: of all engines of a server."""
    steps = dict[str, dict[str, float]]()
    seconds = dict[tuple[str, str], dict[str, float]]()
    for name, labels, value in _samples(text):
        side = labels.get("side", "")
        if name in ("steps", "idle_steps"):
            of_side = steps.setdefault(side, {"steps": 0.0, "idle_steps": 0.0})
            of_side[name] += value
        elif name in ("hook_seconds", "idle_hook_seconds"):
            key = side, labels.get("hook", "")
            of_hook = seconds.setdefault(key, {"hook_seconds": 0.0, "idle_hook_seconds": 0.0})
            of_hook[name] += value
    costs = list[HookCost]()
    for (side, hook), took in sorted(seconds.items()):
        many = steps.get(side, {"steps": 0.0, "idle_steps": 0.0})
        if many["steps"]:
            idle = took["idle_hook_seconds"] / many["idle_steps"] if many["idle_steps"] else None
            costs.append(HookCost(hook, side, idle, took["hook_seconds"] / many["steps"]))
    return steps, costs
