"""Models on the Hugging Face hub by name: `hub:ORG/REPO`, `hub:ORG/REPO:FILE`, `hub:ORG/REPO@REVISION:FILE`.

Reading such a name and choosing which files of a repository make up the model: plain data in, plain data out. The
network and the disk are in `hub_download.py`.

FILE is the name of a file (of several parts: any of them), the name of a folder, or a part of a GGUF's name, such as
`Q4_K_M`, in any case. Without FILE: the safetensors of the repository, else one of its GGUF files, else older formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backend.errors import DownloadError, PresetError, nearest

PREFIX = "hub:"
MAX_NAME = 500  # characters of a file's path in a repository
# One of these of a repository with nothing but GGUF files; the first is what most people take.
GGUF_ORDER = ("Q4_K_M", "Q8_0", "Q5_K_M", "Q6_K", "Q4_0", "Q4_K_S", "Q4_1", "IQ4_XS", "BF16", "F16", "F32")

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_MODEL = re.compile(rf"({_WORD}/{_WORD})(?:@({_WORD}))?(?::(.+))?", re.DOTALL)
_GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.[a-z]+)")
_SIDE_FILE = re.compile(
    r".*\.json|.*\.jinja|.*\.model|.*\.model\.v\d+|.*\.tiktoken|merges\.txt|vocab\.txt|checklist\.chk"
)
_NO_WEIGHTS = re.compile(r"mmproj|imatrix", re.IGNORECASE)


@dataclass(frozen=True)
class HubModel:
    """What a preset asks for."""

    repo: str  # ORG/REPO
    file: str | None = None
    revision: str | None = None  # a branch, tag or commit; None: main

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repo}{revision}{f':{self.file}' if self.file else ''}"


@dataclass(frozen=True)
class Choice:
    """What to fetch, and what to open afterwards: `path` is a file or a folder ("" the whole), relative."""

    names: tuple[str, ...]
    path: str


def parse(text: str) -> HubModel:
    """Read `hub:ORG/REPO[@REVISION][:FILE]`. Raises PresetError."""
    found = _MODEL.fullmatch(text.removeprefix(PREFIX))
    if not found or ".." in found[1] or "--" in found[1] or ".." in (found[2] or "") or found[1].endswith(".git"):
        raise PresetError(
            f"model '{text}': expected hub:ORG/REPO or hub:ORG/REPO:FILE, as in hub:someone/model-GGUF:Q4_K_M"
        )
    file = found[3]
    if file is not None and not is_safe(file):
        raise PresetError(f"model '{text}': the file '{file}' is no plain path within the repository")
    return HubModel(found[1], file, found[2])


def is_safe(name: str) -> bool:
    """Whether a file's path in a repository stays inside of a folder it is put into, on every system."""
    if len(name) > MAX_NAME or not name.isprintable() or any(sign in name for sign in '\\:*?"<>|'):
        return False
    return all(part and part.strip(". ") and part == part.strip() for part in name.split("/"))


def choose(names: Iterable[str], model: HubModel) -> Choice:
    """Which files of a repository are the model. Raises DownloadError naming what is there instead."""
    # Hidden files are never part of a model, and one of them is our own note of what is here.
    listed = sorted(name for name in names if is_safe(name) and not name.startswith(".") and "/." not in name)
    if model.file is None:
        return _choose_by_format(listed, model)
    if model.file in listed:
        return _one_file(listed, model.file)
    folder = model.file.rstrip("/") + "/"
    if any(name.startswith(folder) for name in listed):
        inside = [name[len(folder) :] for name in listed if name.startswith(folder)]
        choice = _choose_by_format(inside, model)
        return Choice(tuple(folder + name for name in choice.names), (folder + choice.path).rstrip("/"))
    if gguf := _gguf_named(listed, model.file):
        return _one_file(listed, gguf)
    weights = [name for name in listed if _is_weights(name)]
    raise DownloadError(
        f"{model.repo} has no file '{model.file}' and no GGUF with that in its name"
        + (nearest(model.file, weights) or f"; it has {_some(weights or listed)}")
    )


def _choose_by_format(names: Sequence[str], model: HubModel) -> Choice:
    top = [name for name in names if "/" not in name]
    for group in (_safetensors(top), [] if _ggufs(names) else _pytorch(top)):
        if group:
            return Choice((*group, *_side_files(top)), "")
    for tag in GGUF_ORDER:
        if gguf := _gguf_named(names, tag):
            return _one_file(names, gguf)
    if ggufs := _ggufs(names):
        return _one_file(names, ggufs[0])
    for folder in ("", "original/"):  # Meta's own files, in the repositories of Llama 3 in a folder
        shards = [name for name in names if re.fullmatch(re.escape(folder) + r"consolidated\.\d\d\.pth", name)]
        if shards:
            return Choice((*shards, *_side_files(names, folder)), folder.rstrip("/"))
    others = [name for name in names if _is_weights(name)]
    if len(others) == 1:
        return _one_file(names, others[0])
    if others:
        raise DownloadError(
            f"{model.repo} has several models; name one as in hub:{model.repo}:{others[0]} ({_some(others)})"
        )
    raise DownloadError(f"{model.repo} has no model file known here; it has {_some(names)}")


def _one_file(names: Sequence[str], name: str) -> Choice:
    """A named file: all parts of a GGUF; with anything else the small files beside it, which say what it is."""
    if name.lower().endswith(".gguf"):
        part = _GGUF_PART.fullmatch(name)
        if not part:
            return Choice((name,), name)
        every = [f"{part[1]}-{number:05d}-of-{part[3]}{part[4]}" for number in range(1, min(int(part[3]), 999) + 1)]
        if missing := [other for other in every if other not in names]:
            raise DownloadError(f"'{name}' is one of {int(part[3])} parts, and '{missing[0]}' is not in the repository")
        return Choice(tuple(every), every[0])
    folder = name[: name.rfind("/") + 1]
    return Choice(tuple(dict.fromkeys((name, *_side_files(names, folder)))), name)


def _gguf_named(names: Sequence[str], tag: str) -> str | None:
    """The GGUF with `tag` in its name; one where it stands between separators comes first (Q4_K is not Q4_K_M)."""
    holding = [name for name in _ggufs(names) if tag.lower() in name.lower()]
    alone = re.compile(rf"(?:^|[-._/]){re.escape(tag)}(?:$|[-./])", re.IGNORECASE)
    return min(holding, key=lambda name: (not alone.search(name), len(name), name), default=None)


def _ggufs(names: Sequence[str]) -> list[str]:
    """GGUF models; of several parts the first."""
    found = [name for name in names if name.lower().endswith(".gguf") and not _NO_WEIGHTS.search(name)]
    return [name for name in found if not (part := _GGUF_PART.fullmatch(name)) or int(part[2]) == 1]


def _safetensors(top: Sequence[str]) -> list[str]:
    """One set of safetensors: repositories may hold the same weights twice, as `model...` and `consolidated...`."""
    found = [name for name in top if name.endswith(".safetensors")]
    return (
        _first_set(found, ("model", "adapter_model"))
        or [name for name in found if not name.startswith("consolidated")]
        or found
    )


def _pytorch(top: Sequence[str]) -> list[str]:
    found = [name for name in top if name.endswith(".bin")]
    return _first_set(found, ("pytorch_model", "model", "adapter_model"))


def _first_set(names: Sequence[str], stems: Sequence[str]) -> list[str]:
    """All shards of the first stem, or its single file."""
    for stem in stems:
        shards = [name for name in names if (shard := _SHARD.fullmatch(name)) and shard[1] == stem]
        single = [name for name in names if name.rpartition(".")[0] == stem]
        if single or shards:
            return single or shards
    return []


def _side_files(names: Sequence[str], folder: str = "") -> list[str]:
    """Configuration and tokenizer beside the weights. Never programs."""
    inside = [name for name in names if name.startswith(folder) and "/" not in name[len(folder) :]]
    return [name for name in inside if _SIDE_FILE.fullmatch(name[len(folder) :])]


def _is_weights(name: str) -> bool:
    ending = name.lower().endswith((".gguf", ".safetensors", ".bin", ".pt", ".pth"))
    return ending and not _NO_WEIGHTS.search(name) and not name.endswith(("training_args.bin", "optimizer.pt"))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "no files"
