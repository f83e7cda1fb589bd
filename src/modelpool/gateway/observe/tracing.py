"""OpenTelemetry: a span for each request for a model, between the client's and the engine's.

Imported only where traces are on. Spans are exported by the SDK's own thread, in batches; the sampler, limits and what
an export needs are set by the SDK's environment variables (`OTEL_…`).
"""

from __future__ import annotations

import logging
import threading
import time
from time import monotonic

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from modelpool import __version__
from modelpool.gateway.observe.journey import Journey, Record
from modelpool.gateway.request import Request

log = logging.getLogger(__name__)

END_S = 3.0
"""What the last export gets at the end of the process."""
_CARRIERS = (b"traceparent", b"tracestate")


def otlp(endpoint: str) -> SpanExporter:
    """To an OTLP receiver, by HTTP. `endpoint` is its base address; empty: where the SDK's variables say."""
    return OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None)


class Tracing:
    """An Observer that ends the span of each journey; `begin` starts it."""

    def __init__(self, exporter: SpanExporter, *, slot: int) -> None:
        resource = Resource.create({"service.version": __version__, "service.instance.id": str(slot)})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "modelpool-gateway"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("modelpool.gateway", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._spans: dict[Journey, Span] = {}

    def begin(self, journey: Journey, request: Request) -> None:
        """Start a span that joins the client's trace, if it has one, and tell the engine of it.

        What the client decided not to sample passes as it came.
        """
        told = {name.decode(): value.decode("latin-1") for name, value in request.headers if name in _CARRIERS}
        context = self._propagator.extract(told, Context())
        method, path = request.method.decode("latin-1"), request.path.decode("latin-1")
        span = self._tracer.start_span(f"{method} {path}", context, SpanKind.SERVER)
        if span.is_recording():
            self._spans[journey] = span
            span.set_attributes({"http.request.method": method, "url.path": path})
        if span.is_recording() or not told:
            said: dict[str, str] = {}
            self._propagator.inject(said, set_span_in_context(span, Context()))
            request.headers = [each for each in request.headers if each[0] not in _CARRIERS]
            request.headers += [(name.encode(), value.encode("latin-1")) for name, value in said.items()]

    def waits(self, journey: Journey) -> None:
        """All is said at the end."""

    def waited(self, journey: Journey) -> None:
        """All is said at the end."""

    def chosen(self, journey: Journey) -> None:
        """All is said at the end."""

    def not_taken(self, journey: Journey) -> None:
        """All is said at the end."""

    def ended(self, journey: Journey) -> None:
        span, record = self._spans.pop(journey, None), journey.record
        if span is None:
            return
        offset = time.time() - monotonic()
        for name, moment in (("sent to the instance", record.sent), ("first byte", record.first_byte)):
            if moment:
                span.add_event(name, timestamp=int((offset + moment) * 1e9))
        span.set_attributes(_attributes(record))
        if record.code or record.status >= 500:
            span.set_status(Status(StatusCode.ERROR, record.code or None))
        span.end(int((offset + record.ended) * 1e9))

    def close(self) -> None:
        """Export what is left, for as long as END_S. Blocks."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(END_S)
        if ending.is_alive():
            log.warning("the last traces could not be exported")


def _attributes(record: Record) -> dict[str, AttributeValue]:
    """In the names of the semantic conventions, and of vLLM's own spans where those have none."""
    attributes: dict[str, AttributeValue] = {
        "gen_ai.request.id": record.id.decode("latin-1"),
        "gen_ai.request.model": record.alias,
        "http.response.status_code": record.status,
        "http.request.body.size": record.bytes_in,
        "http.response.body.size": record.bytes_out,
        "gen_ai.latency.e2e": record.ended - record.accepted,
        "gen_ai.latency.time_in_queue": record.waited,
        "modelpool.instance": record.instance,
        "modelpool.reason": record.reason,
        "modelpool.pieces": record.segments,
    }
    if record.first_byte:
        attributes["gen_ai.latency.time_to_first_token"] = record.first_byte - record.accepted
    if record.caller:
        attributes["modelpool.key"] = record.caller
    if record.code:
        attributes["error.type"] = record.code
    if record.tries:
        attributes["modelpool.retries"] = [f"{instance}: {why}" for instance, why in record.tries]
    return attributes
