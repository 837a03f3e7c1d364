"""Caches in files: what is found again after a restart, and files that must not be believed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from backend.cache.kv import KVPool
from backend.cache.tree import NOWHERE, Root
from backend.checkpoint.safetensors import read_safetensors
from backend.engine import keeping
from backend.engine.saved import load_blocks, save_blocks
from backend.errors import SavedCacheError, UserError
from backend.params import GenerationParams
from backend.presets import Preset
from backend.runtime import Prepared, Runtime
from backend.service import Service
from backend.settings import Settings
from backend.store.caches import CacheFolder
from backend.store.files import replacing
from backend.text.messages import Message
from tests.real import read
from tests.tiny import TinyModel, write_tiny

GREEDY = GenerationParams(temperature=0, max_tokens=6)
TEXT = "a text that both of them have read, long enough for some whole blocks and a part of one more " * 2


def runtime(path: Path, caches: CacheFolder | None = None, **keys: object) -> Runtime:
    preset = Preset("kept", str(path), speculation="off", context=512, **keys)  # type: ignore[arg-type]
    return Runtime(Prepared(preset, path), max_waiting=8, caches=caches)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_what_was_read_before_a_restart_is_found_after_it(tmp_path: Path, kind: str) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(weights="Q4_1", context=512))
    caches = CacheFolder(tmp_path / "cache", 8 << 20)
    first = runtime(path, caches, kv_cache=kind)
    ids = read(first.start_text(TEXT, GREEDY))[1]
    first.close(drain=False)
    files = list(caches.folder.iterdir())
    assert len(files) == 1
    assert files[0].stat().st_mode & 0o77 == 0, "others can read it"
    written = files[0].stat().st_mtime_ns
    second = runtime(path, caches, kv_cache=kind)
    assert second.blocks.cached * 32 >= len(first.prompting.encode_text(TEXT))
    again = second.start_text(TEXT, GREEDY)
    assert read(again)[1] == ids
    assert again.stats.evaluated_tokens == 1
    second.close(drain=False)
    assert files[0].stat().st_mtime_ns > written
    third = runtime(path, caches, kv_cache=kind)
    before = files[0].read_bytes()
    third.close(drain=False)
    assert files[0].read_bytes() == before, "nothing was used, so there is nothing to write"


def test_another_way_to_run_a_model_has_a_file_of_its_own(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(weights="Q4_1", context=512))
    caches = CacheFolder(tmp_path / "cache", 8 << 20)
    for keys in ({}, {"kv_cache": "f16"}, {"weights": "bf16"}, {"overrides": (("rope_theta", 5000.0),)}):
        running = runtime(path, caches, **keys)
        reply = running.start_text(TEXT, GREEDY)
        read(reply)
        assert reply.stats.cached_tokens == 0
        running.close(drain=False)
    assert len(list(caches.folder.iterdir())) == 4
    os.utime(path, ns=(1, 1))  # another file now, for all we know
    running = runtime(path, caches)
    assert running.blocks.cached == 0
    running.close(drain=False)


def test_the_service_keeps_and_finds_and_people_with_keys_are_not_written(tmp_path: Path) -> None:
    (tmp_path / "presets").mkdir()
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(weights="Q4_1", context=512))
    (tmp_path / "presets" / "one.yaml").write_text(f"model: {path}\ncontext: 512\nspeculation: off\n")
    settings = Settings(
        presets_dir=tmp_path / "presets", models_dir=tmp_path, data_dir=tmp_path / "data", cache_disk=8 << 20
    )
    private = TEXT.replace("text", "secret")
    for expected in (0, 1):
        service = Service(settings)
        service.load("one")
        for text, person in ((TEXT, ""), (private, "key:1")):
            reply = service.complete(text, GREEDY, person=person)
            read(reply)
            assert (reply.stats.cached_tokens > 100) == (expected == 1 and not person)
        service.close()
    (file,) = (tmp_path / "data" / "cache").iterdir()
    tokens = load_file(file)["tokens"].flatten().tolist()
    prompting = Prepared(Preset("p", str(path)), path).prompting
    hidden, seen = prompting.encode_text(private), prompting.encode_text(TEXT)
    assert tokens[: len(seen)] == seen
    assert not any(tokens[at : at + 12] == hidden[:12] for at in range(len(tokens)))


def test_a_preset_that_comes_back_finds_what_it_had_read(tmp_path: Path) -> None:
    (tmp_path / "presets").mkdir()
    for number, name in enumerate(("one", "two")):
        path = write_tiny(tmp_path / f"{name}.gguf", TinyModel(weights="Q4_1", context=512, seed=number))
        (tmp_path / "presets" / f"{name}.yaml").write_text(f"model: {path}\ncontext: 512\nspeculation: off\n")
    settings = Settings(
        presets_dir=tmp_path / "presets", models_dir=tmp_path, data_dir=tmp_path / "data", cache_disk=8 << 20
    )
    service = Service(settings)
    said = []
    for name, found in (("one", False), ("two", False), ("one", True)):
        service.load(name)
        reply = service.complete(TEXT, GREEDY)
        said.append(read(reply)[1])
        assert (reply.stats.evaluated_tokens == 1) == found
        while name == "two" and not any((tmp_path / "data" / "cache").glob("*")):
            time.sleep(0.01)  # the model before ends aside
    assert said[0] == said[2]
    service.close()


def test_a_chat_is_saved_beside_it_and_restored(tmp_path: Path) -> None:
    (tmp_path / "presets").mkdir()
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(weights="Q4_1", context=512))
    (tmp_path / "presets" / "one.yaml").write_text(f"model: {path}\ncontext: 512\nspeculation: off\n")
    settings = Settings(presets_dir=tmp_path / "presets", models_dir=tmp_path, data_dir=tmp_path / "data")
    chat = [Message("user", TEXT)]
    file = tmp_path / "chats" / "one.kv.safetensors"
    service = Service(settings)
    service.load("one")
    assert service.save_cache(file, chat) == 0
    assert not file.exists()
    first = service.chat(chat, GREEDY)
    ids = read(first)[1]
    other = service.chat([Message("user", "x" * 100)], GREEDY)
    read(other)
    saved = service.save_cache(file, chat)
    assert saved >= service.count_chat(chat) - 1
    service.close()
    assert not (tmp_path / "data" / "cache").exists()
    service = Service(settings)
    service.load("one")
    assert service.load_cache(file) == saved
    assert service.load_cache(file) == 0, "all of it is there already"
    again = service.chat(chat, GREEDY)
    assert read(again)[1] == ids
    assert again.stats.cached_tokens >= service.count_chat(chat) - 1
    with pytest.raises(SavedCacheError, match="no such file"):
        service.load_cache(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot be written"):
        service.save_cache(path / "below a file", chat)
    service.close()


# the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_path: Callable[..., Path], tmp_path: Path) -> Iterator[tuple[Runtime, Path, bytes]]:
    """A runtime without a cache, a file that fits it, and its fingerprint."""
    running = runtime(tiny_path(weights="Q4_1", context=512))
    read(running.start_text(TEXT, GREEDY))
    file = tmp_path / "saved"
    tokens = running.prompting.encode_text(TEXT)
    assert running.save_cache(file, tokens) > 32
    running.blocks.clear()
    yield running, file, running._keeper._model
    running.close(drain=False)


def load(saved: tuple[Runtime, Path, bytes], **changes: object) -> int:
    running, file, model = saved
    options = {"model": model, "vocabulary": running.checkpoint.config.vocab_size, "kv": running._kv} | changes
    return load_blocks(file, pool=running.blocks, **options)  # type: ignore[arg-type]


def test_it_is_a_safetensors_file(saved: tuple[Runtime, Path, bytes]) -> None:
    """As their own library reads it, and with the numbers that the pool has."""
    running, file, model = saved
    tensors = load_file(file)
    assert list(tensors["parents"]) == [NOWHERE, *range(len(tensors["parents"]) - 1)]
    assert bytes(tensors["model"].tolist()) == model
    assert bytes(tensors["digest"].tolist()) == hashlib.sha256(file.read_bytes()[:-32]).digest()
    assert load(saved) == int(tensors["lengths"].sum())
    for node in running.blocks.latest(99):
        depth, above = 0, node.parent
        while above is not None and not isinstance(above, Root):
            depth, above = depth + 1, above.parent
        for number, array in enumerate(running._kv.block(node.block)):
            written, tokens = tensors[f"array.{number}"][depth], len(node.tokens)
            assert torch.equal(array[:, :, :tokens], written[:, :, :tokens])
            assert not written[:, :, tokens:].any(), "what somebody else had in the block"


def test_a_damaged_file_is_refused_wherever_it_is_damaged(saved: tuple[Runtime, Path, bytes]) -> None:
    running, file, _ = saved
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    places = [0, 4, 9, 30, header - 3, header, header + 40, header + 60, len(good) // 2, len(good) - 33, len(good) - 1]
    for at in places:
        file.write_bytes(good[:at] + bytes([good[at] ^ 0x15]) + good[at + 1 :])
        with pytest.raises(SavedCacheError):
            load(saved)
    for length in (0, 5, header - 1, header, header + 33, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:length])
        with pytest.raises(SavedCacheError):
            load(saved)
    file.write_bytes(good + b"x")
    with pytest.raises(SavedCacheError):
        load(saved)
    assert (running.blocks.cached, running.blocks.free) == (0, running.blocks.n_blocks)
    file.write_bytes(good)
    assert load(saved) > 32


def test_of_another_model_or_another_shape(saved: tuple[Runtime, Path, bytes], tmp_path: Path) -> None:
    running, file, model = saved
    with pytest.raises(SavedCacheError, match="another model"):
        load(saved, model=bytes(32))
    config = running.checkpoint.config
    with pytest.raises(SavedCacheError, match="other tensors"):
        load(saved, kv=KVPool(config, 4, 32, torch.float32))
    with pytest.raises(SavedCacheError, match="other tensors"):
        load(saved, kv=KVPool(config, 4, 16, torch.bfloat16))
    with pytest.raises(SavedCacheError, match="block 0"):
        load(saved, vocabulary=3)
    with pytest.raises(SavedCacheError, match="no saved cache"):
        weights = tmp_path / "weights.safetensors"
        weights.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        load_blocks(weights, model, running.blocks, running._kv, 100)
    assert running.blocks.cached == 0


LIES = {
    "a parent that comes later": ("parents", 1, 4),
    "a parent below all": ("parents", 1, -7),
    "itself": ("parents", 2, 2),
    "no tokens": ("lengths", 0, 0),
    "a parent that is not full": ("lengths", 0, 31),
    "a token of no vocabulary": ("tokens", 3, 1 << 30),
    "a token below zero": ("tokens", 3, -1),
}


@pytest.mark.parametrize(("name", "at", "value"), LIES.values(), ids=LIES.keys())
def test_a_file_that_is_whole_and_lies(saved: tuple[Runtime, Path, bytes], name: str, at: int, value: int) -> None:
    running, file, _ = saved
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    offset = start + json.loads(data[8:start])[name]["data_offsets"][0] + 4 * at
    data[offset : offset + 4] = value.to_bytes(4, "little", signed=True)
    data[-32:] = hashlib.sha256(data[:-32]).digest()
    file.write_bytes(data)
    with pytest.raises(SavedCacheError, match="it is damaged"):
        load(saved)
    assert running.blocks.cached == 0


def test_a_pool_with_less_room_takes_the_beginning(saved: tuple[Runtime, Path, bytes]) -> None:
    running, file, model = saved
    blocks = len(read_safetensors(file)["parents"].view())
    assert blocks > 3
    small = runtime(running.checkpoint.path)
    kv = KVPool(running.checkpoint.config, 2, 32, torch.bfloat16, host_bytes=0)
    pool = type(small.blocks)(2, 32, None)
    assert load_blocks(file, model, pool, kv, 10**6) == 64
    kv = KVPool(running.checkpoint.config, 2, 32, torch.bfloat16, host_bytes=1 << 20)
    pool = type(small.blocks)(2, 32, kv.host)
    assert load_blocks(file, model, pool, kv, 10**6) == load(saved)
    assert (pool.free, pool.hosted) == (0, blocks - 2)
    small.close(drain=False)


# the folder -------------------------------------------------------------------------------------------------------


def test_the_folder_keeps_its_limit_and_the_latest(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, 250)
    (tmp_path / "not ours.txt").write_bytes(bytes(1000))
    for number, name in enumerate("abcd"):
        file = folder.file(name)
        file.write_bytes(bytes(100))
        os.utime(file, ns=(number, number))
    folder.used(folder.file("a"))
    folder.make_room(folder.file("b"))
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"not ours.txt", folder.file("a").name, folder.file("b").name}
    CacheFolder(tmp_path, 50).make_room(folder.file("a"))
    assert {path.name for path in tmp_path.iterdir()} == {"not ours.txt"}


def test_only_as_much_is_written_as_the_limit_allows(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(weights="Q4_1", context=512))
    whole, part = CacheFolder(tmp_path / "whole", 8 << 20), CacheFolder(tmp_path / "part", 4096 + 40_000)
    for caches in (whole, part):
        running = runtime(path, caches)
        read(running.start_text(TEXT, GREEDY))
        running.close(drain=False)
    (file,) = part.folder.iterdir()
    assert file.stat().st_size <= part.limit < next(whole.folder.iterdir()).stat().st_size
    running = runtime(path, part)
    assert running.blocks.cached > 0
    running.close(drain=False)


def test_writing_that_takes_too_long_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(weights="Q4_1", context=512))
    caches = CacheFolder(tmp_path / "cache", 8 << 20)
    monkeypatch.setattr(keeping, "SECONDS", -1.0)
    running = runtime(path, caches)
    read(running.start_text(TEXT, GREEDY))
    running.close(drain=False)
    assert list(caches.folder.iterdir()) == []


def test_a_kept_file_that_is_damaged_is_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", TinyModel(weights="Q4_1", context=512))
    caches = CacheFolder(tmp_path / "cache", 8 << 20)
    running = runtime(path, caches)
    read(running.start_text(TEXT, GREEDY))
    running.close(drain=False)
    (file,) = caches.folder.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    running = runtime(path, caches)
    assert "the kept cache is not used" in caplog.text
    assert str(file) in caplog.text
    assert running.blocks.cached == 0
    running.close(drain=False)


def test_a_file_that_is_not_finished_takes_nobodys_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("file", b"old")]


def test_nothing_of_a_model_that_is_saved_is_all_of_it(saved: tuple[Runtime, Path, bytes], tmp_path: Path) -> None:
    """Blocks of a node without its ancestors begin a sequence of their own, so `save_blocks` wants them all."""
    running, file, model = saved
    load(saved)
    nodes = running.blocks.latest(99)
    assert save_blocks(tmp_path / "again", model, running._kv, nodes) == sum(len(node.tokens) for node in nodes)
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
