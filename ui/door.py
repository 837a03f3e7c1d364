"""What the page may ask of the service, and what every tab is given. The page knows no other way to the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from backend.events import LoadProgress, PresetInfo, Status
from backend.generation import Generation
from backend.params import GenerationParams
from backend.text.messages import Message
from ui.sessions import Registry

# How our events are wired: no spinner over what is being read, no entry in a public API, no queue but the engine's.
PRIVATE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}


class Service(Protocol):
    """The one door, as far as the page uses it."""

    def presets(self) -> list[PresetInfo]: ...
    def load(self, name: str, progress: Callable[[LoadProgress], None] | None = None) -> None: ...
    def cancel_load(self, name: str | None = None) -> bool: ...
    def status(self) -> Status: ...
    def default_params(self) -> GenerationParams: ...
    def sampling_sets(self) -> dict[str, GenerationParams]: ...
    def save_sampling_set(self, name: str, params: GenerationParams) -> None: ...
    def delete_sampling_set(self, name: str) -> None: ...
    def count_chat(self, messages: Sequence[Message]) -> int: ...
    def count_text(self, text: str) -> int: ...
    def chat(
        self, messages: Sequence[Message], params: GenerationParams, *, trim: bool = False, person: str = ""
    ) -> Generation: ...
    def complete(self, prompt: str | Sequence[int], params: GenerationParams, *, person: str = "") -> Generation: ...


@dataclass(frozen=True)
class Context:
    """Handed to every tab: the door, and who is here."""

    service: Service
    registry: Registry
