"""Opens damaged files as the app would, watched by `hostile_guard`: `python -m tests.hostile_child JOB.json`.

The job: {"specimens": [...], "work": a folder to be made, "seed": s, "first": n, "step": k, "count": cases in all,
"progress": file, "report": file}. The report lists what went wrong, by case, and how often each specimen opened and was
refused. `reproduce(specimens, work, seed, number)` makes one case again and opens it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2.debug  # noqa: F401 (what Jinja imports at its first error is there before the watch begins)
import torch

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.easylm import read_easylm
from backend.checkpoint.lora import with_lora
from backend.checkpoint.open import config_alone, open_checkpoint
from backend.commands.inspect import describe, describe_config
from backend.errors import MAX_MESSAGE, CheckpointError, UserError
from backend.presets import PresetFolder
from backend.prompting import Prompting, choose_format
from backend.text.messages import Message
from backend.tokenizer.open import open_tokenizer
from backend.tokenizer.source import TokenizerSource
from tests.hostile_guard import Guard
from tests.mutations import mutate, splice
from tests.smallfiles import Specimen

TEXT = "Hello wor\u00e9ld <|im_end|></s> 1234\n\n \U0001f600[INST]"
ROWS = 600  # of the embedding of a tokenizer that is opened alone
MAX_TROUBLES = 20


# what the app does with a file ---------------------------------------------------------------------------------------


def open_model(path: Path, specimen: Specimen) -> None:
    config = config_alone(path)
    if config is not None:
        _shown(describe_config(path, config))
        return
    checkpoint = open_checkpoint(path)
    _shown(describe(checkpoint))
    _read_all(checkpoint)
    if any(key.endswith("tokens") for key in checkpoint.tokenizer.metadata):  # not every small model has a tokenizer
        _use_tokenizer(checkpoint.tokenizer, checkpoint.config.vocab_size)


def open_adapter(path: Path, specimen: Specimen) -> None:
    assert specimen.base is not None
    checkpoint = with_lora(open_checkpoint(specimen.base), path)
    _shown(describe(checkpoint))
    _read_all(checkpoint)


def _read_all(checkpoint: Checkpoint) -> None:
    for name, info in checkpoint.tensors.items():
        stored = checkpoint.read(name)
        values, planes = stored.float32(), stored.planes()
        assert tuple(values.shape) == tuple(stored.shape) == info.shape, (name, values.shape, stored.shape, info.shape)
        assert values.dtype == torch.float32
        assert values.contiguous().isfinite().any() in (True, False)  # touches every value
        if planes is not None:
            assert all(part[0].shape == values.shape for part in planes.planes), name
            assert planes.order is None or torch.equal(planes.order.sort().values, torch.arange(values.shape[1])), name
        stored.release()


def _use_tokenizer(source: TokenizerSource, rows: int) -> None:
    tokenizer = open_tokenizer(source, rows)
    form = choose_format("auto", tokenizer, "small", "preset")
    prompting = Prompting(tokenizer, form, "small")
    ids = prompting.encode_text(TEXT)
    if form is not None:
        ids += prompting.encode_chat([Message("system", "be brief"), Message("user", TEXT), Message("assistant", "no")])
    assert all(0 <= token < rows for token in [*ids, *tokenizer.end_ids])
    _ = b"".join(tokenizer.token_bytes(token) for token in ids), [tokenizer.token_text(token) for token in ids]


def open_tokenizer_folder(path: Path, specimen: Specimen) -> None:
    _use_tokenizer(TokenizerSource("folder", path), ROWS)


def open_easylm(path: Path, specimen: Specimen) -> None:
    for leaf in read_easylm(path).values():
        assert leaf.values().float().shape == leaf.shape
        leaf.release()


def open_preset(path: Path, specimen: Specimen) -> None:
    _shown(vars(PresetFolder(path.parent).read_file(path)) | {"sampling": None})


def _shown(facts: dict[str, Any]) -> None:
    """As `inspect` prints them."""
    json.dumps(facts, ensure_ascii=False, default=str).encode()


OPENERS: dict[str, Callable[[Path, Specimen], None]] = {
    "model": open_model,
    "config": open_model,
    "lora": open_adapter,
    "tokenizer": open_tokenizer_folder,
    "easylm": open_easylm,
    "preset": open_preset,
}


# cases --------------------------------------------------------------------------------------------------------------


class Bench:
    """A copy of every specimen, in which one file at a time is damaged."""

    def __init__(self, specimens: list[Specimen], work: Path, seed: str) -> None:
        self.specimens, self._work, self._seed = specimens, work, seed
        self._whole = {
            s.name: {file: (s.folder / file).read_bytes() for file in sorted(path.name for path in s.folder.iterdir())}
            for s in specimens
        }
        self._changed: dict[Path, bytes] = {}
        for specimen in specimens:
            shutil.copytree(specimen.folder, self.folder(specimen))

    def folder(self, specimen: Specimen) -> Path:
        return self._work / specimen.folder.name / "model"  # a level between: tokenizers are looked for one level up

    def specimen(self, number: int) -> Specimen:
        return random.Random(f"{self._seed}-{number}-specimen").choice(self.specimens)

    def prepare(self, number: int) -> Path:
        """Put the files of a case in place; those of the case before are mended. Returns what is to be opened."""
        for path, content in self._changed.items():
            _write(path, content)
        self._changed.clear()
        specimen, rng = self.specimen(number), random.Random(f"{self._seed}-{number}")
        folder, whole = self.folder(specimen), self._whole[specimen.name]
        file = rng.choice(list(specimen.files))
        other = rng.choice(list(specimen.files))
        chance = rng.random()
        if chance < 0.03 and other != file:  # shards exchanged
            self._put(folder / file, whole[other], whole[file])
            self._put(folder / other, whole[file], whole[other])
        elif chance < 0.06:
            stranger = rng.choice(self.specimens)
            content = rng.choice(list(self._whole[stranger.name].values()))
            self._put(folder / file, splice(rng, whole[file], content), whole[file])
        else:
            self._put(folder / file, mutate(rng, whole[file], specimen.files[file]), whole[file])
        return folder / specimen.entry if specimen.entry != "." else folder

    def _put(self, path: Path, content: bytes, whole: bytes) -> None:
        if content != whole:
            self._changed[path] = whole
            _write(path, content)


def _write(path: Path, content: bytes) -> None:
    """As a new file: the old one may still be mapped."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def reproduce(specimens: list[Specimen], work: Path, seed: str, number: int) -> None:
    """Make one case again and open it, without the guard. `work`: a folder to be made."""
    bench = Bench(specimens, work, seed)
    specimen = bench.specimen(number)
    OPENERS[specimen.opens_as](bench.prepare(number), specimen)


def judge(opened: Callable[[], None], guard: Guard, number: int) -> tuple[str, str]:
    """("opened" | "refused" | "failed", the error's sentence or what went wrong)."""
    outcome, said = "opened", ""
    try:
        with guard.case(number):
            opened()
    except UserError as error:
        outcome, said = "refused", str(error)
        if trouble := _not_a_sentence(said):
            outcome, said = "failed", f"{trouble}: {said[:300]!r}"
    except BaseException as error:
        outcome, said = "failed", "".join(traceback.format_exception(error)[-4:])
    if guard.broken:
        outcome, said = "failed", guard.broken[0] + "\n" + said
    return outcome, said


def _not_a_sentence(message: str) -> str | None:
    if len(message) > MAX_MESSAGE:
        return f"an error of {len(message)} letters"
    if not message.isprintable():
        return "an error that is not one printable line"
    return None


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(1)
    work = Path(job["work"])
    bench = Bench(_with_base_in(work, [_specimen(entry) for entry in job["specimens"]]), work, job["seed"])
    warm_up(bench)
    counts: dict[str, Counter[str]] = {specimen.name: Counter() for specimen in bench.specimens}
    troubles: list[tuple[int, str, str]] = []
    slowest = (0.0, 0)
    guard = Guard(work, os.open(job["progress"], os.O_WRONLY | os.O_CREAT))
    for number in range(job["first"], job["count"], job["step"]):
        specimen = bench.specimen(number)
        path = bench.prepare(number)
        began = time.process_time()
        outcome, said = judge(lambda: OPENERS[specimen.opens_as](path, specimen), guard, number)
        slowest = max(slowest, (time.process_time() - began, number))
        counts[specimen.name][outcome] += 1
        if outcome == "failed":
            troubles.append((number, specimen.name, said))
            if len(troubles) >= MAX_TROUBLES:
                break
    report = {"troubles": troubles, "counts": counts, "grown": guard.grown(), "slowest": slowest}
    Path(job["report"]).write_text(json.dumps(report))


def _specimen(entry: dict[str, Any]) -> Specimen:
    return Specimen(
        **{**entry, "folder": Path(entry["folder"]), "base": Path(entry["base"]) if entry["base"] else None}
    )


def _with_base_in(work: Path, specimens: list[Specimen]) -> list[Specimen]:
    """The model that adapters are for, copied to where the guard lets files be read."""
    moved = work / "base"
    for base in {specimen.base for specimen in specimens if specimen.base}:
        shutil.copytree(base, moved)
    return [replace(specimen, base=moved) if specimen.base else specimen for specimen in specimens]


def warm_up(bench: Bench) -> None:
    """Every specimen opens whole, and what is only imported when something goes wrong is imported."""
    for specimen in bench.specimens:
        folder = bench.folder(specimen)
        OPENERS[specimen.opens_as](folder / specimen.entry if specimen.entry != "." else folder, specimen)
    for encoding in ("utf-8-sig", "ascii", "latin-1", "idna", "unicode_escape"):
        "x".encode(encoding)
    try:
        raise CheckpointError("warm")
    except CheckpointError as error:
        traceback.format_exception(error)


if __name__ == "__main__":
    main(sys.argv[1])
