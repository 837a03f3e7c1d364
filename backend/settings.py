"""What the server is told at start: addresses, folders, keys. Values only; `webui.py` fills them from flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

VERSION = "0.2.0"
PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Settings:
    """Everything outside of a preset. Nothing of the users is written outside `data_dir` and `models_dir`."""

    host: str = "127.0.0.1"
    port: int = 7860
    data_dir: Path = PROJECT / "data"
    models_dir: Path = PROJECT / "models"
    presets_dir: Path = PROJECT / "presets"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    logins: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # (user, password) for the page
    admin_key: str | None = field(default=None, repr=False)  # that programs must send to load presets; None: any key
    api_only: bool = False
    max_waiting: int = 64  # requests that may wait for the engine before new ones are refused
    cache_disk: int = 0  # bytes of `data_dir`/cache: what models had read when they went, found again when they come
    drain_seconds: float = 30.0  # that running replies have to finish, when their model or the server goes
