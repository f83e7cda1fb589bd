"""The fuzzers for ten minutes, or MODELPOOL_FUZZ_S seconds, from seeds that begin at MODELPOOL_FUZZ_SEED, or now."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest
import uvloop

from tests.api_fuzz import MODEL, ApiFuzz
from tests.contract.test_gateway_fuzz import fuzz
from tests.e2e.conftest import FAKE_ONLY
from tests.e2e.pool import running_pool

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]

SECONDS = float(os.environ.get("MODELPOOL_FUZZ_S", "600"))
SEED = int(os.environ.get("MODELPOOL_FUZZ_SEED", str(int(time.time()))))


def show(seen: Counter[str]) -> None:
    print(f"\nseeds from {SEED}")
    print("\n".join(f"  {count:7} {what}" for what, count in sorted(seen.items())))


@pytest.mark.parametrize("keys", [False, True], ids=["open", "with keys"])
def test_wrong_requests_get_right_answers(tmp_path: Path, keys: bool) -> None:
    show(uvloop.run(fuzz(tmp_path, SECONDS / 4, SEED, keys=keys)))


def test_whatever_is_asked_is_answered_by_the_document(tmp_path: Path) -> None:
    with running_pool(tmp_path, "--no-demo", **FAKE_ONLY) as pool:
        pool.register(MODEL, fake=True)
        pool.wait_active(MODEL)
        attack = ApiFuzz(pool)
        attack.attack_for(SECONDS / 2, SEED)
        attack.nothing_is_left()
    show(attack.seen)
