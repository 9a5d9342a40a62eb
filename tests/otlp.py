"""A collector for tests: takes OTLP over HTTP as the real ones do, and keeps the spans, decoded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from tests.helpers import HOST, wait_until


@dataclass
class Span:
    """One span. `parent` is b"" for one without, ids are bytes, times nanoseconds since the epoch."""

    name: str
    trace: bytes
    id: bytes
    parent: bytes
    kind: int
    start_ns: int
    end_ns: int
    status: int
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass
class Collector:
    url: str
    spans: list[Span] = field(default_factory=list)
    calls: int = 0
    # What it answers; it keeps what it is sent only with 200.
    status: int = 200

    def traces(self) -> dict[bytes, list[Span]]:
        found: dict[bytes, list[Span]] = {}
        for span in list(self.spans):
            found.setdefault(span.trace, []).append(span)
        return found

    def decision(self, transaction_id: str, timeout_s: float = 30) -> tuple[Span, dict[str, Span]]:
        """The decision's own span and its children by name, once they are here."""

        def own() -> list[Span]:
            return [s for s in list(self.spans) if s.attributes.get("fraudgate.transaction_id") == transaction_id]

        wait_until(own, timeout_s, f"the trace of {transaction_id} is there")
        [root] = own()
        children = [s for s in list(self.spans) if s.parent == root.id]
        assert all(s.trace == root.trace for s in children)
        assert len({s.name for s in children}) == len(children)
        return root, {s.name: s for s in children}


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """One that listens on a port of its own until the end."""
    found = Collector("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802
            body = self.rfile.read(int(self.headers["content-length"]))
            found.calls += 1
            if self.path != "/v1/traces" or self.headers["content-type"] != "application/x-protobuf":
                self.send_error(404)
                return
            if found.status == 200:
                found.spans += _decoded(body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(found.status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Tells nobody."""

    server = ThreadingHTTPServer((HOST, 0), Handler)
    found.url = f"http://{HOST}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _decoded(body: bytes) -> list[Span]:
    request = ExportTraceServiceRequest.FromString(body)
    found = []
    for of_resource in request.resource_spans:
        resource = _attributes(of_resource.resource.attributes)
        for of_scope in of_resource.scope_spans:
            assert of_scope.scope.name == "fraudgate"
            found += [
                Span(
                    name=span.name,
                    trace=span.trace_id,
                    id=span.span_id,
                    parent=span.parent_span_id,
                    kind=span.kind,
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    status=span.status.code,
                    attributes=_attributes(span.attributes),
                    resource=resource,
                )
                for span in of_scope.spans
            ]
    return found


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs if isinstance(pair, KeyValue)}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(v) for v in value.array_value.values]
    return None if kind is None else getattr(value, kind)


if __name__ == "__main__":
    with collector() as running:
        print(running.url, flush=True)
        threading.Event().wait()
