# SPDX-License-Identifier: Apache-2.0
"""Spans of what crosses processes, for the tracer that the process has chosen; none without one.

A span is recorded at its end, so that nothing but a time and a ``traceparent`` (W3C Trace Context)
is noted before.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

from portakv.errors import InvalidTerms
from portakv.runtime.rate_limited_log import RateLimitedLog

_log = RateLimitedLog(logging.getLogger(__name__))

#: What a ``traceparent`` looks like, or empty.
PATTERN = r"^(|00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})\Z"
_LONGEST = 80  # characters of a wrong one in an error
_under = ContextVar("traceparent", default="")


class Began(NamedTuple):
    """Where a span began: the ``traceparent`` of its caller, and the time in ns since 1970.

    ``at`` is 0 if no span is made.
    """

    traceparent: str
    at: int


class Tracer(Protocol):
    """Makes spans, such as those of OpenTelemetry."""

    def current(self) -> str:
        """Return the ``traceparent`` of the current span; empty if there is none."""

    def span(
        self,
        name: str,
        began: Began,
        end: int,
        parent: str,
        attributes: Mapping[str, str | int],
        error: BaseException | None,
    ) -> None:
        """Record a span from ``began`` to ``end``, in ns since 1970.

        ``parent``: the ``traceparent`` of another process; empty: that of ``began``.
        """


#: The tracer that makes spans in this process; None: there are no spans.
chosen: Tracer | None = None
UNTRACED = Began("", 0)


def use(tracer: Tracer | None) -> Tracer | None:
    """Make spans by a tracer from now on, in this process; None: make no more. Return the tracer
    before it."""
    global chosen
    before = chosen
    chosen = tracer
    return before


@contextmanager
def under(traceparent: str) -> Iterator[None]:
    """Have the tickets of offers that are made inside carry a ``traceparent``, such as that of a
    request's HTTP header; no tracer is needed.

    Raises `InvalidTerms` for other text.
    """
    if not isinstance(traceparent, str) or not re.match(PATTERN, traceparent):
        raise InvalidTerms(
            f"Expected a traceparent of W3C Trace Context, version 00, got "
            f"{repr(traceparent)[:_LONGEST]}. Pass the header's text."
        )
    token = _under.set(traceparent)
    try:
        yield
    finally:
        _under.reset(token)


def begin() -> Began:
    """Return where a span begins, for the caller's `under` or its tracer's current span."""
    tracer = chosen
    traceparent = _under.get()
    if tracer is None:
        return Began(traceparent, 0) if traceparent else UNTRACED
    return Began(traceparent or tracer.current(), time.time_ns())


def end(
    name: str,
    began: Began,
    attributes: Mapping[str, str | int],
    error: BaseException | None = None,
    parent: str = "",
    seconds: float | None = None,
) -> None:
    """Record a span, if its beginning was noted for a tracer.

    Args:
        parent: the ``traceparent`` of another process; empty: the caller's.
        seconds: how long it took; None: until now.
    """
    tracer = chosen
    if tracer is None or not began.at:
        return
    ended = time.time_ns() if seconds is None else began.at + round(seconds * 1e9)
    try:
        tracer.span(name, began, ended, parent, attributes, error)
    except Exception as failure:  # a tracer's fault must not cut the end of an offer in two
        text = "A span of %s could not be recorded: %r. Check the provider of OpenTelemetry."
        _log.warning("span", text, name, failure)
