"""The routes of an engine that are for clients; never its operational ones (adapters, sleep, scaling, RPC)."""

from __future__ import annotations

import re

# Exactly as vLLM's routers have them: some it serves below /v1, some at the root, some at both.
JSON_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"}
    | {"/v1/embeddings", "/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/pooling"}
    | {"/classify", "/tokenize", "/detokenize"}
)
"""Where a POST with a JSON body names its model."""
_POST = JSON_PATHS | {"/v1/audio/transcriptions", "/v1/audio/translations"}
_GET = frozenset({"/v1/models", "/health", "/version"})
_STORED_RESPONSE = re.compile(r"/v1/responses/[\w-]+(/cancel)?")


def inference_methods(path: str) -> frozenset[str]:
    """The methods that a client may use on this path of an engine; none for a path that is not for clients."""
    if path in _POST:
        return frozenset({"POST"})
    if path in _GET:
        return frozenset({"GET", "HEAD"})
    if match := _STORED_RESPONSE.fullmatch(path):
        return frozenset({"POST"}) if match[1] else frozenset({"GET"})
    return frozenset()
