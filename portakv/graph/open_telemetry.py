# SPDX-License-Identifier: Apache-2.0
"""Report figures and spans to OpenTelemetry; the caller runs the exporters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from portakv.errors import Unsupported
from portakv.extras import installing
from portakv.graph.meter import METRICS, NAMESPACE, Family, Meter, Metric, Sample, Source
from portakv.runtime import tracing

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
    from opentelemetry.trace import TracerProvider

_SCOPE = "portakv"


class _Readings:
    """The families of a meter, which the callbacks of all instruments of an export share.

    Each instrument takes its family once. One that asks again begins the next reading, and so do
    both of two threads that export together.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._taken = {*METRICS}
        self._families = dict[str, Family]()

    def take(self, name: str, user: str) -> list[Sample]:
        """Return the samples of a metric. ``user``: the instrument that asks."""
        if user in self._taken or not self._families:
            self._families = {each.name: each for each in self._meter.families()}
            self._taken = set()
        self._taken.add(user)
        family = self._families.get(name)
        return [] if family is None else family.samples


def observe(
    *sources: Source,
    meter_provider: MeterProvider | None = None,
    **stores: Source,
) -> None:
    """Have OpenTelemetry read the figures of sources whenever it exports.

    The sources are those of `Collector`. They are read as long as the provider lives, so call this
    once. A histogram is two counters (see `portakv.graph.meter.Metric`), since OpenTelemetry's
    API has no histogram that is read.

    Args:
        meter_provider: None: the global one.

    Raises `InvalidTerms` for an object without figures, and `Unsupported` if the package is not
    installed.
    """
    readings = _Readings(Meter(*sources, **stores))
    try:
        from opentelemetry import metrics as api
    except ImportError as error:
        raise _missing("Figures for OpenTelemetry") from error
    meter = (meter_provider or api.get_meter_provider()).get_meter(_SCOPE)
    for metric in METRICS.values():
        for name, unit, series in _instruments(metric):
            callback = partial(_observations, api.Observation, readings, metric.name, series)
            if metric.kind == "gauge":
                make: Any = meter.create_observable_gauge
            else:
                make = meter.create_observable_counter
            make(NAMESPACE + name, [callback], unit=unit, description=metric.why)


def _instruments(metric: Metric) -> Iterable[tuple[str, str, str]]:
    """Yield the names, the units and the series of the instruments of a metric."""
    if metric.kind == "histogram":
        yield metric.otel, metric.unit, "sum"
        yield metric.otel_count, "1", "count"
    else:
        yield metric.otel, metric.unit, ""


def _observations(
    make: type[Observation], readings: _Readings, name: str, series: str, _: CallbackOptions
) -> Iterable[Observation]:
    """Yield the values of an instrument now."""
    for sample in readings.take(name, f"{name} {series}"):
        if sample.series == series:
            labels = {NAMESPACE + label: text for label, text in sample.labels.items()}
            yield make(sample.value, labels)


def trace(tracer_provider: TracerProvider | None = None) -> None:
    """Make spans of pulls and offers from now on, in this process.

    A ticket carries the ``traceparent`` of the span in which its offer was made. The span of a pull
    is a child of that, and has a link to the span in which it was requested; without a
    ``traceparent`` in its ticket it is a child of the latter.

    Args:
        tracer_provider: None: the global one.

    Raises `Unsupported` if the package is not installed.
    """
    try:
        from opentelemetry import trace as api
    except ImportError as error:
        raise _missing("Spans for OpenTelemetry") from error
    tracing.use(_Tracer(api, (tracer_provider or api.get_tracer_provider()).get_tracer(_SCOPE)))


class _Tracer:
    """Makes OpenTelemetry's spans. ``api``: the module ``opentelemetry.trace``."""

    def __init__(self, api: Any, tracer: Any) -> None:
        self._api = api
        self._tracer = tracer

    def current(self) -> str:
        """Return the ``traceparent`` of the current span; empty if there is none."""
        context = self._api.get_current_span().get_span_context()
        if not context.is_valid:
            return ""
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def span(
        self,
        name: str,
        began: tracing.Began,
        end: int,
        parent: str,
        attributes: Mapping[str, str | int],
        error: BaseException | None,
    ) -> None:
        """Record a span that has ended."""
        api = self._api
        links = []
        above = parent or began.traceparent
        if began.traceparent not in ("", above):
            links.append(api.Link(self._context(began.traceparent)))
        context = None
        if above:
            context = api.set_span_in_context(api.NonRecordingSpan(self._context(above)))
        named = {NAMESPACE + key: value for key, value in attributes.items()}
        kind = api.SpanKind.PRODUCER if name.endswith("offer") else api.SpanKind.CLIENT
        span = self._tracer.start_span(
            name, context, kind, attributes=named, links=links, start_time=began.at
        )
        if error is not None:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(api.StatusCode.ERROR, str(error))
        span.end(end)

    def _context(self, traceparent: str) -> Any:
        _, trace_id, span_id, flags = traceparent.split("-")
        return self._api.SpanContext(
            int(trace_id, 16), int(span_id, 16), True, self._api.TraceFlags(int(flags, 16))
        )


def _missing(what: str) -> Unsupported:
    return Unsupported(what, f"they need opentelemetry-api; {installing('otel')} brings it")
