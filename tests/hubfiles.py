"""What the tests of downloads share: a hub with two repositories, and what a refusal looks like."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.errors import DownloadError
from backend.hub import HubModel
from backend.hub_download import HubFolder

BIG = bytes(range(256)) * 16384  # 4 MB
FILES = {"config.json": b"{}", "model-00001-of-00002.safetensors": BIG, "model-00002-of-00002.safetensors": BIG[::-1],
         "tokenizer.json": b"[1]", "modeling.py": b"import os", "pytorch_model.bin": b"never"}  # fmt: skip
TAKEN = sorted(set(FILES) - {"modeling.py", "pytorch_model.bin"})
MODEL = HubModel("org/llama")
GGUF = HubModel("org/gguf", "Q8_0")
SIZE = sum(len(FILES[name]) for name in TAKEN)


def refused(folder: HubFolder, model: HubModel, words: str) -> str:
    with pytest.raises(DownloadError, match=words) as caught:
        folder.resolve(model)
    assert "\n" not in caught.value.message
    return caught.value.message


def files_in(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name[0] != ".")
