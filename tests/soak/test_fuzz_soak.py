"""The fuzzers for ten minutes, or MODELPOOL_FUZZ_S seconds, from seeds that go on where MODELPOOL_FUZZ_SEED begins."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import uvloop

from tests.contract.test_gateway_fuzz import fuzz

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]

SECONDS = float(os.environ.get("MODELPOOL_FUZZ_S", "600"))
SEED = int(os.environ.get("MODELPOOL_FUZZ_SEED", str(int(time.time()) % 10**6 * 10**6)))


@pytest.mark.parametrize("keys", [False, True], ids=["open", "with keys"])
def test_wrong_requests_get_right_answers(tmp_path: Path, keys: bool) -> None:
    print(f"\nseeds from {SEED}")
    seen = uvloop.run(fuzz(tmp_path, SECONDS / 4, SEED, keys=keys))
    print("\n".join(f"  {count:7} {what}" for what, count in sorted(seen.items())))
