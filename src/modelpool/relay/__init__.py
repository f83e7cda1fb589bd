"""The byte path: a pooled upstream client on httptools whose responses pass through as raw bytes.

    pools = Pools(connect_timeout_s=5.0)
    request = encode_request(b"POST", b"/v1/completions", headers, fixed=fixed_headers(endpoint, token), body=body)

Two ways to take a response:

- `await pool.send(request, sink)` calls a Sink for the head and for every segment, as it came off the socket
  (`relay.upstream`). Nothing is woken or copied per segment: this is the gateway's way.
- `async with fetch(pool, request) as response` gives status, headers and `async for chunk in response`, with chunked
  framing taken off (`relay.fetch`): for everybody else.

Errors are `errors.UpstreamFailed` and `errors.UpstreamTimeout`; their `may_have_run` says whether sending the request
again could run it twice. Leaving early (close, cancellation, leaving the `async with`) closes the connection at once,
which is what makes an engine abort.
"""

from modelpool.relay.endpoint import Endpoint
from modelpool.relay.fetch import Response, fetch
from modelpool.relay.request import encode_request, end_to_end, fixed_headers
from modelpool.relay.response import ResponseHead
from modelpool.relay.upstream import Deadlines, Exchange, Pool, Pools, Sink

__all__ = [
    "Deadlines",
    "Endpoint",
    "Exchange",
    "Pool",
    "Pools",
    "Response",
    "ResponseHead",
    "Sink",
    "encode_request",
    "end_to_end",
    "fetch",
    "fixed_headers",
]
