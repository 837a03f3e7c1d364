"""Which device a preset means, on machines that are made up."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import pytest
import torch

from backend.errors import PresetError
from backend.placement.devices import Memory, choose, memory


@dataclass
class Machine:
    cuda: int = 0
    mps: bool = False
    built: bool = True

    def built_with_cuda(self) -> bool:
        return self.built

    def cuda_devices(self) -> int:
        return self.cuda

    def has_mps(self) -> bool:
        return self.mps

    def cuda_memory(self, index: int) -> tuple[int, int, int]:
        return 1000 + index, 5000, 70


@pytest.mark.parametrize(
    ("machine", "wanted", "expected"),
    [
        (Machine(2, True), "auto", "cuda:0"),
        (Machine(0, True), "auto", "mps"),
        (Machine(), "auto", "cpu"),
        (Machine(2), "cuda", "cuda:0"),
        (Machine(2), "cuda:1", "cuda:1"),
        (Machine(2), "cpu", "cpu"),
        (Machine(0, True), "mps", "mps"),
    ],
)
def test_the_device_that_is_meant(machine, wanted, expected):
    assert str(choose(wanted, machine)) == expected


@pytest.mark.parametrize(
    ("machine", "wanted", "sentence"),
    [
        (Machine(1), "cuda:1", "device is cuda:1, and this machine has 1 CUDA device; expected cuda:0"),
        (Machine(4), "cuda:4", "this machine has 4 CUDA devices; expected cuda:0 to cuda:3"),
        (Machine(0, built=False), "cuda", "was built without CUDA"),
        (Machine(0), "cuda:0", "no CUDA device on this machine"),
        (Machine(1), "mps", "no Apple GPU"),
        (Machine(1), "gpu", "expected auto, cuda, cuda:N, mps or cpu"),
        (Machine(1), "cuda:-1", "expected auto"),
    ],
)
def test_a_device_that_is_not_there(machine, wanted, sentence):
    with pytest.raises(PresetError, match=sentence):
        choose(wanted, machine)


def test_memory_counts_what_torch_keeps_empty():
    assert memory(torch.device("cuda", 1), Machine(2)) == Memory(1071, 5000)
    host = memory(torch.device("cpu"))
    assert host.total == psutil.virtual_memory().total
    assert 0 < host.free < host.total


def test_this_machine_has_a_device():
    assert choose("auto").type in ("cuda", "mps", "cpu")
    assert choose("cpu").type == "cpu"
