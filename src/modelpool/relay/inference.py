"""The routes of an engine that are for clients; never its operational ones (adapters, sleep, scaling, RPC)."""

from __future__ import annotations

import re

# Exactly as vLLM's routers have them: some it serves below /v1, some at the root, some at both.
JSON_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses", "/v1/systemone"}
    | {"/v1/messages", "/v1/messages/count_tokens", "/v1/embeddings", "/v2/embed", "/cohere/v2/chat"}
    | {"/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/generative_scoring"}
    | {"/pooling", "/classify", "/tokenize", "/detokenize", "/inference/v1/generate"}
    | {"/v1/chat/completions/render", "/v1/completions/render", "/v1/messages/render", "/v1/responses/render"}
    | {"/v1/chat/completions/derender", "/v1/completions/derender", "/cohere/v2/chat/render"}
)
"""Where a POST with a JSON body names its model."""
FORM_PATHS = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
"""Where a POST with a multipart/form-data body names its model."""
WEBSOCKET_PATHS = frozenset({"/v1/realtime"})
"""Where an event of the client, or the query, names the model."""
_POST = JSON_PATHS | FORM_PATHS
_GET = frozenset({"/v1/models", "/health", "/version"})
_STORED_RESPONSE = re.compile(r"/v1/responses/[\w-]+(/cancel)?", re.ASCII)


def inference_methods(path: str) -> frozenset[str]:
    """The methods that a client may use on this path of an engine; none for a path that is not for clients."""
    if path in _POST:
        return frozenset({"POST"})
    if path in _GET:
        return frozenset({"GET", "HEAD"})
    if match := _STORED_RESPONSE.fullmatch(path):
        return frozenset({"POST"}) if match[1] else frozenset({"GET"})
    return frozenset()
