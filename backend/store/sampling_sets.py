"""Named sampling sets, kept in one small JSON file that is always replaced whole."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from backend.errors import ParameterError, UserError
from backend.params import GenerationParams
from backend.store.files import replace_text

MAX_SETS = 200
MAX_NAME = 60


class SamplingSets:
    """name -> GenerationParams. Only values that differ from the defaults are written."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def all(self) -> dict[str, GenerationParams]:
        with self._lock:
            return self._read()

    def save(self, name: str, params: GenerationParams) -> None:
        """Add or replace. Raises when the name cannot be one."""
        name = name.strip()
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise ParameterError(f"a set's name has 1 to {MAX_NAME} visible characters", param="name")
        with self._lock:
            sets = self._read()
            if name not in sets and len(sets) >= MAX_SETS:
                raise ParameterError(f"there are {MAX_SETS} sets already; delete one first", param="name")
            self._write(sets | {name: params})

    def delete(self, name: str) -> None:
        """Remove; deleting what is not there is fine."""
        with self._lock:
            sets = self._read()
            if sets.pop(name, None) is not None:
                self._write(sets)

    def _read(self) -> dict[str, GenerationParams]:
        try:
            with open(self._path, encoding="utf-8") as file:
                stored = json.load(file)
            return {str(name): GenerationParams.from_mapping(values) for name, values in stored.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, TypeError, RecursionError, UserError) as error:
            raise UserError(f"{self._path}: the saved sampling sets cannot be read ({error})") from None

    def _write(self, sets: dict[str, GenerationParams]) -> None:
        text = json.dumps({name: params.changed() for name, params in sets.items()}, indent=1, ensure_ascii=True)
        replace_text(self._path, text)
