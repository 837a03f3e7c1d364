"""Offloading: the ring brings what comes next, never holds more than it may, and changes no bit of the answer."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from backend.checkpoint.base import Checkpoint
from backend.checkpoint.open import open_checkpoint
from backend.errors import CheckpointError, NotReadyError, OutOfMemoryError
from backend.params import GenerationParams
from backend.placement import load
from backend.placement.hoststore import Block
from backend.placement.load import load_model
from backend.placement.parts import OUTPUT, RING_BUFFERS, placed_bytes, ring_bytes
from backend.placement.places import HostEmbedding, HostLinear, OrderedLinear
from backend.placement.slowstore import WholeFiles
from backend.presets import Preset
from backend.runtime import Prepared, Runtime
from backend.weights.int8 import Int8Linear
from backend.weights.linear import BiasedLinear, Linear, PlainEmbedding, PlainLinear, SplitLinear
from backend.weights.lora import LoraLinear
from tests.forward import Session
from tests.offloading import MODES, TABLES, FakeLink, parts_of
from tests.real import all_logits, starter
from tests.tiny import TinyModel, write_tiny

IDS = [5, 80, 3, 200, 9, 9, 41, 7, 66, 12, 100]

# weights that read other memory ------------------------------------------------------------------------------------


def test_wrappers_give_and_take_their_tensors() -> None:
    random = torch.Generator().manual_seed(0)
    one, two = (PlainLinear(torch.randn(rows, 4, generator=random)) for rows in (3, 2))
    bias, order = torch.randn(5, generator=random), torch.tensor([3, 4, 0, 1, 2])
    x = torch.randn(2, 4, generator=random)
    for weight in (
        SplitLinear([one, two]),
        BiasedLinear(SplitLinear([one, two]), bias),
        HostLinear(one),
        OrderedLinear(SplitLinear([one, two]), order),
        LoraLinear(one, torch.randn(2, 4, generator=random), torch.randn(3, 2, generator=random), 0.5),
        Int8Linear(torch.randint(-99, 99, (3, 4), dtype=torch.int8, generator=random), torch.ones(3)),
    ):
        copies = [tensor.clone() for tensor in weight.tensors()]
        other = weight.with_tensors(copies)
        assert [tensor.data_ptr() for tensor in other.tensors()] == [tensor.data_ptr() for tensor in copies]
        assert torch.equal(other(x), weight(x))
        assert torch.equal(other.twin(), weight.twin())
        assert torch.equal(Block(weight).linear(x), weight(x))
        assert sum(tensor.nbytes for tensor in weight.tensors() if tensor.dtype != torch.int64) == weight.nbytes()
    ordered = OrderedLinear(SplitLinear([one, two]), order)
    assert torch.equal(ordered(x), torch.cat([two(x), one(x)], dim=-1))
    assert torch.equal(ordered.twin(), torch.cat([two.twin(), one.twin()]))
    table = HostEmbedding(PlainEmbedding(torch.randn(6, 4, generator=random)))
    other = table.with_tensors([tensor.clone() for tensor in table.tensors()])
    assert torch.equal(other(torch.tensor([5, 0, 5])), table(torch.tensor([5, 0, 5])))
    assert other.nbytes() == table.nbytes() == 6 * 4 * 4


# whole models ------------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "f32": ("f32", {}),
    "bf16, untied": ("bf16", {"tied": False}),
    "Q4_0 as it is": ("original", {"weights": "Q4_0"}),
    "mixed, untied": ("original", {"weights": "Q8_0", "tied": False, "formats": {"blk.0.attn_v.weight": "F16"}}),
    "int8": ("int8", {"weights": "F16", "tied": False}),
    "nf4": ("nf4", {"weights": "F16"}),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products this small are over before a second thread has woken up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def checkpoint_of(folder: Path, **options: object) -> Checkpoint:
    return open_checkpoint(write_tiny(folder / "tiny.gguf", TinyModel(n_layers=2, **options)))  # type: ignore[arg-type]


def answers(session: Session) -> torch.Tensor:
    """A prompt in two chunks, single tokens, a chunk again: every kind of step, one after another."""
    pieces = [session.logits(IDS[:5], chunk=3)]
    pieces += [session.logits([token], start=5 + at) for at, token in enumerate(IDS[5:7])]
    return torch.cat([*pieces, session.logits(IDS[7:], start=7)])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("store", ["file", "host", "host, not pinned"])
@pytest.mark.parametrize("model", MODELS)
def test_no_bit_changes_and_no_byte_too_many_in_any_mode(tmp_path: Path, model: str, store: str) -> None:
    weights, options = MODELS[model]
    checkpoint = checkpoint_of(tmp_path, **options)
    resident = Session(checkpoint, weights)
    expected = answers(resident)
    assert resident.loaded.resident_bytes == resident.loaded.weight_bytes
    steps = 2 + 2 + 1
    for mode, stays in MODES.items():
        parts = parts_of(checkpoint, weights, stays)
        link = None if store == "file" else FakeLink(1 << 30 if store == "host" else 3)
        session = Session(checkpoint, weights, parts=parts, link=link)
        loaded = session.loaded
        assert torch.equal(answers(session), expected), mode
        streamed, traffic = [part for part in parts if part.place == "streamed"], loaded.streamer.traffic
        assert loaded.streamer.parts == len(streamed)
        assert traffic.peak_bytes <= ring_bytes(parts) == loaded.streamer.ring_bytes
        # Where the output is streamed, tokens are not looked up in its table but in one of their own.
        own = loaded.model.embedding.nbytes() - resident.loaded.model.embedding.nbytes()  # type: ignore[attr-defined]
        assert own == 0 or (weights == "original" and any(part.names == OUTPUT for part in streamed))
        assert loaded.weight_bytes == resident.loaded.weight_bytes + own
        assert loaded.resident_bytes == loaded.weight_bytes - placed_bytes(parts, "streamed")
        assert loaded.host_bytes == (0 if link is None else placed_bytes(parts, "streamed"))
        assert loaded.bytes_per_token == resident.loaded.bytes_per_token
        assert loaded.output_bytes == resident.loaded.output_bytes
        ahead = min(RING_BUFFERS, len(streamed))
        assert traffic.fetched == (steps * len(streamed) + ahead if len(streamed) > RING_BUFFERS else len(streamed))
        if link is not None and streamed:
            assert len(link.allocated) == ahead  # and none in a step
            assert len(link.copies) <= traffic.fetched
            assert link.unpinned_sources == 0  # what could not be pinned came through a pinned buffer, or nothing could
        loaded.close()
        assert link is None or not link.pinned


@pytest.mark.usefixtures("one_thread")
def test_nothing_can_be_pinned_at_all(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    link = FakeLink(pins=0)
    session = Session(checkpoint, "f32", parts=parts_of(checkpoint, "f32", TABLES), link=link)
    assert torch.equal(answers(session), answers(Session(checkpoint, "f32")))
    assert link.unpinned_sources == len(link.copies) > 0
    session.loaded.close()


@pytest.mark.usefixtures("one_thread")
def test_parts_computed_on_the_cpu_beside_another_device(tmp_path: Path) -> None:
    """The "meta" device has no numbers, but tells what is where."""
    checkpoint = checkpoint_of(tmp_path, tied=False)
    parts = parts_of(checkpoint, "f32", (*TABLES, "wq", "wk", "wv", "wo"), elsewhere="cpu")
    loaded = load_model(checkpoint, "f32", "test", parts=parts, device="meta")
    for layer in loaded.model.layers:
        assert {tensor.device.type for tensor in (*layer.wqkv.tensors(), *layer.wo.tensors())} == {"meta"}
        assert {tensor.device.type for tensor in (*layer.w13.tensors(), *layer.w2.tensors())} == {"cpu"}
        assert layer.attention_norm.device.type == layer.ffn_norm.device.type == "meta"
        assert isinstance(layer.w2, HostLinear)
    assert loaded.host_bytes == placed_bytes(parts, "cpu")
    assert loaded.host_bytes + loaded.resident_bytes == loaded.weight_bytes
    # On the CPU itself that place is memory like any other.
    same = Session(checkpoint, "f32", parts=parts)
    assert torch.equal(answers(same), answers(Session(checkpoint, "f32")))
    assert same.loaded.resident_bytes == same.loaded.weight_bytes


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_in_host_memory(tmp_path: Path, tied: bool) -> None:
    checkpoint = checkpoint_of(tmp_path, tied=tied)
    parts = parts_of(checkpoint, "f32", ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"))
    parts = tuple(part if "tok_embeddings" not in part.names else elsewhere(part) for part in parts)
    loaded = load_model(checkpoint, "f32", "test", parts=parts, device="meta")
    assert isinstance(loaded.model.embedding, HostEmbedding)
    assert isinstance(loaded.model.output, HostLinear) is tied
    assert loaded.host_bytes == placed_bytes(parts, "cpu")


def elsewhere(part):
    return type(part)(part.names, part.bytes, "cpu")


def test_parts_that_do_not_make_a_product(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    parts = [*parts_of(checkpoint, "f32", TABLES)]
    at = next(number for number, part in enumerate(parts) if part.names[0] == "layers.1.w1")
    parts[at] = type(parts[at])(("layers.1.w1", "layers.1.w2"), 100, "resident")
    with pytest.raises(ValueError, match="w2"):
        load_model(checkpoint, "f32", "test", parts=parts)


# the file as a store -----------------------------------------------------------------------------------------------


class Watched:
    """`linears.build`, keeping an eye on everything it has built on the reading thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0
        self.names: list[str] = []
        self._build = load.build
        self.broken: Exception | None = None
        monkeypatch.setattr(load, "build", self)

    def __call__(self, parts: list, *form: str) -> Linear:
        if threading.current_thread() is threading.main_thread():
            return self._build(parts, *form)
        if self.broken is not None:
            raise self.broken
        linear = self._build(parts, *form)
        self.alive.update(linear.tensors())
        self.most = max(self.most, sum(tensor.nbytes for tensor in self.alive))
        return linear


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mode", ["offload-all", "offload-ff", "offload-attention"])
def test_memory_that_is_really_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    watched = Watched(monkeypatch)
    checkpoint = checkpoint_of(tmp_path)
    parts = parts_of(checkpoint, "f32", MODES[mode])
    session = Session(checkpoint, "f32", parts=parts)
    answers(session)
    assert 0 < watched.most <= ring_bytes(parts)
    session.loaded.close()
    assert not watched.alive


@pytest.mark.usefixtures("one_thread")
def test_an_error_on_the_reading_thread_ends_the_step_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    checkpoint = checkpoint_of(tmp_path)
    session = Session(checkpoint, "f32", parts=parts_of(checkpoint, "f32", TABLES))
    expected = session.logits(IDS)
    for broken, kind, words in (
        (OSError("input/output error"), CheckpointError, r"tiny\.gguf: layers\.\d.* could not be read .* input/output"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemoryError, r"layers\.\d.* no memory left"),
        (CheckpointError("the file says so itself"), CheckpointError, "the file says so itself"),
    ):
        watched.broken = broken
        with pytest.raises(kind, match=words):
            session.logits(IDS)
            session.logits(IDS)
        watched.broken = None
        assert torch.equal(session.logits(IDS), expected)
    session.loaded.close()


@pytest.mark.usefixtures("one_thread")
def test_closing_ends_the_thread_and_lets_everything_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    before = set(threading.enumerate())
    checkpoint = checkpoint_of(tmp_path)
    session = Session(checkpoint, "f32", parts=parts_of(checkpoint, "f32", TABLES))
    session.logits(IDS)
    assert {thread.name.split("_")[0] for thread in set(threading.enumerate()) - before} >= {"weights reader"}
    gone = weakref.ref(checkpoint)
    del checkpoint
    session.loaded.close()
    gc.collect()
    assert gone() is None
    assert not watched.alive
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]
    with pytest.raises(NotReadyError):
        session.logits(IDS)


def test_a_file_that_was_cut_off_is_noticed_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    files = WholeFiles([path])
    path.write_bytes(bytes(1001))
    files.check()
    os.truncate(path, 999)
    with pytest.raises(CheckpointError, match=r"file: had 1000 bytes when the model was loaded and has 999 now"):
        files.check()
    other = tmp_path / "other"
    other.write_bytes(b"")
    other.replace(path)  # another file of the same name: what is mapped is still the first
    files.check()
    path.unlink()
    files.check()


def test_a_file_that_is_cut_off_while_its_weights_are_in_the_ring(tmp_path: Path) -> None:
    """They are multiplied where the file is mapped: reading beyond its end would end the process."""
    checkpoint = checkpoint_of(tmp_path)
    session = Session(checkpoint, "bf16", parts=parts_of(checkpoint, "bf16", TABLES))
    session.logits(IDS)  # the ring is filled with what the next step begins with
    (file,) = checkpoint.files
    os.truncate(file, 4096)
    with pytest.raises(CheckpointError, match="its weights are read while it answers"):
        session.logits(IDS)
    session.loaded.close()


def test_a_long_prompt_brings_every_part_few_times(tmp_path: Path) -> None:
    """600 tokens in steps of 512, each of which brings all parts once: not in steps of 128."""
    file = write_tiny(tmp_path / "tiny.gguf", TinyModel(n_layers=2, context=1024))
    runtime = Runtime(Prepared(Preset("p", str(file), device="cpu", placement="offload-all"), file), 4)
    traffic, steps = runtime._loaded.streamer.traffic, runtime.runner.steps
    streamed = sum(part.place == "streamed" for part in runtime.plan.parts)
    before = traffic.fetched
    reply = runtime.start([(7 * n) % 250 + 3 for n in range(600)], GenerationParams(max_tokens=1))
    assert [chunk.error for chunk in reply][-1] is None
    assert runtime.runner.steps - steps == 2
    assert traffic.fetched - before == 2 * streamed == 2 * 8
    runtime.close(drain=False)


# the starter model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "modes"), [("original", ("offload-all", "products cut in two")), ("bf16", ("offload-attention",))]
)
def test_the_starter_answers_the_same_from_the_file(starter_path: Path, weights: str, modes: tuple[str, ...]) -> None:
    ids = [*range(100, 124), 7]  # a prompt, and one token by itself
    checkpoint, expected = open_checkpoint(starter_path), all_logits(starter(weights), ids, chunk=24)
    for mode in modes:
        parts = parts_of(checkpoint, weights, MODES[mode])
        session = Session(checkpoint, weights, 32, "bf16", parts=parts)
        assert torch.equal(session.logits(ids, chunk=24), expected), mode
        assert session.loaded.streamer.traffic.peak_bytes <= ring_bytes(parts)
        session.loaded.close()
