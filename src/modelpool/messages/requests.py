"""Gateway → command line: `GET /admin/requests?ended_after=SECONDS`, what became of the latest requests for models.

They are those of all gateway processes of a machine; each keeps some thousands. Nothing of what was said is in them.
"""

from __future__ import annotations

import msgspec


class Finished(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request. Times in seconds; `accepted` and `ended` on the machine's monotonic clock.

    `first_byte_s` and `service_s` since it was sent to an instance; None where it never was.
    """

    model: str
    accepted: float
    ended: float
    status: int
    wait_s: float = 0.0
    first_byte_s: float | None = None
    service_s: float | None = None


class FinishedRequests(msgspec.Struct, frozen=True, kw_only=True):
    """Those that ended after the time asked for, oldest first.

    `until`: on the same clock, all that ended until then are looked at. `complete_since`: of those accepted before this
    some may have been forgotten.
    """

    until: float
    complete_since: float
    requests: tuple[Finished, ...]
