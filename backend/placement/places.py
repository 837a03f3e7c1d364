"""Where a product lives, carried out: on the device, computed on the CPU beside it, or brought when it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch

from backend.checkpoint.base import Checkpoint
from backend.errors import CheckpointError, OutOfMemoryError, UserError
from backend.memory import is_allocation_failure
from backend.placement.cudalink import CudaLink
from backend.placement.hoststore import HostMover, Link
from backend.placement.offload import StreamedLinear, Streamer
from backend.placement.parts import RING_BUFFERS, Part
from backend.placement.slowstore import FileMover, WholeFiles
from backend.weights.linear import Embedding, Linear


class Make(Protocol):
    def __call__(self, device: str, *, once: bool = False) -> Linear:
        """A weight for the type of device that will multiply, in host memory. `once`: it is used and then let go."""
        ...


Movable = TypeVar("Movable", Linear, Embedding)


class Places:
    """Takes in the products of a model in the order of a step. Bytes are counted by where they are kept.

    Streamed parts are kept in host memory for a CUDA device (or any with a `link`), and for others in the file.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, link: Link | None = None) -> None:
        self.device = device
        self.resident_bytes = self.host_bytes = self.file_bytes = 0  # those of the file: never whole in memory
        if link is None and device.type == "cuda":
            link = CudaLink(device)
        self._host = HostMover(link, RING_BUFFERS) if link is not None else None
        self._file = _PartsOfFile(checkpoint, device)
        self.streamer = Streamer(self._host or FileMover(self._file.read, self._file.check))

    def put(self, part: Part, make: Make, shape: tuple[int, int]) -> Linear:
        """What the model multiplies with. `shape`: its (out, in) features."""
        if part.place == "streamed":
            return self._streamed(part, make, shape)
        if part.place == "cpu" and self.device.type != "cpu":
            linear = make("cpu")
            self.host_bytes += linear.nbytes()
            return HostLinear(linear)
        linear = make(self.device.type)
        self.resident_bytes += linear.nbytes()
        return moved(linear, self.device)

    def put_vector(self, vector: torch.Tensor) -> torch.Tensor:
        """A norm or a bias: always on the device."""
        self.resident_bytes += vector.nbytes
        return vector.to(self.device)

    @property
    def kept_bytes(self) -> int:
        """All weights, wherever they are."""
        return self.resident_bytes + self.host_bytes + self.file_bytes

    def allocate(self) -> None:
        """Make the ring's buffers, when all parts are here."""
        if self._host is not None and self.streamer.parts:
            self._host.allocate()

    def close(self) -> None:
        self.streamer.close()
        self._file.close()

    def put_table(self, part: Part, table: Embedding) -> Embedding:
        """What tokens are looked up in. Never streamed: of one that is not resident only rows go to the device."""
        if part.place == "resident" or self.device.type == "cpu":
            self.resident_bytes += table.nbytes()
            return moved(table, self.device)
        self.host_bytes += table.nbytes()
        return HostEmbedding(table)

    def _streamed(self, part: Part, make: Make, shape: tuple[int, int]) -> Linear:
        nbytes = part.bytes
        if self._host is None:
            # On another device than the CPU the copy there would outlive the borrowed pages' use.
            self._file.add(part.names, partial(make, self.device.type, once=self.device.type == "cpu"))
            self.file_bytes += nbytes
        else:
            linear = self._host.add(make(self.device.type))
            nbytes = linear.nbytes()
            self.host_bytes += nbytes
        return StreamedLinear(self.streamer, self.streamer.add(nbytes), *shape)


class _PartsOfFile:
    """How each streamed part is read again and again, with errors that say which it was."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._path, self._device = checkpoint.path, device
        self._files = WholeFiles(checkpoint.files)
        self._parts: list[tuple[Sequence[str], Callable[[], Linear]]] = []

    def add(self, names: Sequence[str], make: Callable[[], Linear]) -> None:
        self._parts.append((names, make))

    def check(self) -> None:
        """Raise CheckpointError where a file was cut off since it was opened."""
        self._files.check()

    def read(self, part: int) -> Linear:
        names, make = self._parts[part]
        self.check()
        try:
            return moved(make(), self._device)
        except UserError:
            raise
        except Exception as error:
            what = f"{self._path}: {' and '.join(names)}"
            if is_allocation_failure(error):
                raise OutOfMemoryError(f"{what}: there is no memory left to read it into") from error
            raise CheckpointError(f"{what}: could not be read while answering: {error}") from error

    def close(self) -> None:
        """Let go of the checkpoint."""
        self._parts.clear()


class HostLinear:
    """A weight that is multiplied on the CPU for a model that is elsewhere: tokens go there and back."""

    def __init__(self, linear: Linear) -> None:
        self.linear = linear
        self.out_features, self.in_features = linear.out_features, linear.in_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.cpu()).to(x.device)

    def nbytes(self) -> int:
        return self.linear.nbytes()

    def twin(self) -> torch.Tensor:
        return self.linear.twin()

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.linear.tensors()

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> HostLinear:
        return HostLinear(self.linear.with_tensors(tensors))


class OrderedLinear:
    """A weight whose rows are in another order than the model wants them. `order`, int64 (out,): which comes where."""

    def __init__(self, linear: Linear, order: torch.Tensor) -> None:
        self.linear, self._order = linear, order
        self.out_features, self.in_features = linear.out_features, linear.in_features

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).index_select(-1, self._order)

    def nbytes(self) -> int:
        return self.linear.nbytes()

    def twin(self) -> torch.Tensor:
        return self.linear.twin().index_select(0, self._order)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*self.linear.tensors(), self._order)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> OrderedLinear:
        *inner, order = tensors
        return OrderedLinear(self.linear.with_tensors(inner), order)


class HostEmbedding:
    """A table that stays in host memory: only the rows that are looked up go to the device."""

    def __init__(self, table: Embedding) -> None:
        self.table = table

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids.cpu()).to(ids.device)

    def nbytes(self) -> int:
        return self.table.nbytes()

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.table.tensors()

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> HostEmbedding:
        return HostEmbedding(self.table.with_tensors(tensors))


def moved(weight: Movable, device: torch.device) -> Movable:
    """The same weight on a device; itself where that is the CPU."""
    if device.type == "cpu":
        return weight
    return weight.with_tensors([tensor.to(device) for tensor in weight.tensors()])
