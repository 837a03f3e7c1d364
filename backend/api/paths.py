"""Which paths belong to programs. The guard and the routes must agree on this, so it is said once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROOT = "/v1"
HEALTH = "/health"
VERSION = "/version"
METRICS = "/metrics"
OPENAPI = "/openapi.json"
MODELS = "/models"
CHAT = "/chat/completions"
COMPLETIONS = "/completions"
PRESETS = "/v1/presets"
LOAD = "/v1/presets/load"
CANCEL = "/v1/presets/cancel"

ADMIN = frozenset({LOAD, CANCEL})  # what changes the server for everybody

_EXACT = frozenset({ROOT, HEALTH, VERSION, METRICS, OPENAPI, MODELS, CHAT, COMPLETIONS})
_BELOW = (f"{ROOT}/", f"{MODELS}/")


def is_api_path(path: str) -> bool:
    """True for everything the API answers, its own 404s included. All other paths are the page's."""
    return path in _EXACT or path.startswith(_BELOW)


def route_path(scope: Mapping[str, Any]) -> str:
    """The path as the router will match it: a `root_path` in front must not hide an API path from the guard."""
    path, root = str(scope.get("path", "")), str(scope.get("root_path", ""))
    if root and (path == root or path.startswith(f"{root}/")):
        return path[len(root) :]
    return path
