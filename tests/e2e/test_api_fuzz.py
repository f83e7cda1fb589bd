"""What an OpenAPI document lets one think of, at a pool of fake engines. `make soak` takes longer."""

from __future__ import annotations

from tests.api_fuzz import MODEL, ApiFuzz
from tests.e2e.pool import PoolProcess

SECONDS = 5.0


def test_whatever_is_asked_is_answered_by_the_document(own_pool: PoolProcess) -> None:
    own_pool.register(MODEL, fake=True)
    own_pool.wait_active(MODEL)
    fuzz = ApiFuzz(own_pool)
    fuzz.attack_for(SECONDS, 0)
    print(dict(fuzz.seen))
    fuzz.nothing_is_left()
    assert {"200", "404 model_not_found", "400 invalid_json", "422 invalid_body"} <= set(fuzz.seen)
