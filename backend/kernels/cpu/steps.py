"""The structures of step.h for ctypes, and the library that runs a whole decoder step in one call."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from backend.kernels.cpu.build import library
from backend.kernels.cpu.products import tiles_library

MAX_PARTS, MAX_HEAD, MAX_ROWS, BLOCK_TOKENS = 3, 256, 32, 32  # as in step.h and attend.h
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # of the cache
PLAIN = 2000  # and a kind of plain.py: formats of weights that are no tiles

_INT, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_TOOLS = ("suri_parallel", "suri_quantise", "suri_product_of", "suri_input_bytes", "suri_input_in", "suri_low_bits")


class Tools(ctypes.Structure):
    _fields_ = [(name, _ADDRESS) for name in _TOOLS]


class Weight(ctypes.Structure):
    _fields_ = [("format", _INT), ("rows", _INT), ("numbers", _ADDRESS)]


class Stack(ctypes.Structure):
    _fields_ = [("count", _INT), ("rows", _INT), ("columns", _INT), ("parts", Weight * MAX_PARTS), ("bias", _ADDRESS)]


class LayerWeights(ctypes.Structure):
    _fields_ = [
        ("attention_norm", _ADDRESS), ("ffn_norm", _ADDRESS),
        ("qkv", Stack), ("o", Stack), ("gate_up", Stack), ("down", Stack),
    ]  # fmt: skip


class Model(ctypes.Structure):
    _fields_ = [
        ("tools", Tools),
        *((name, _INT) for name in ("dim", "ffn_dim", "heads", "kv_heads", "head_dim", "layers", "window")),
        ("norm_eps", ctypes.c_double), ("interleaved", _INT), ("layer", ctypes.POINTER(LayerWeights)),
        ("norm", _ADDRESS), ("output", Stack), ("keys", _ADDRESS), ("values", _ADDRESS),
        ("key_scales", _ADDRESS), ("value_scales", _ADDRESS),
        ("layer_bytes", _INT), ("head_bytes", _INT), ("kind", _INT), ("uniform", _INT),
    ]  # fmt: skip


class Span(ctypes.Structure):
    _fields_ = [("first", _INT), ("count", _INT), ("start", _INT), ("blocks", _ADDRESS), ("prompt", _INT)]


class Step(ctypes.Structure):
    _fields_ = [
        ("tokens", _INT), ("spans", _INT), ("rows", _INT), ("x", _ADDRESS), ("turns", _ADDRESS),
        ("span", ctypes.POINTER(Span)), ("row", _ADDRESS), ("logits", _ADDRESS),
        ("layer", _INT), ("phase", _INT), ("job", _INT),
    ]  # fmt: skip


@cache
def step_library() -> ctypes.CDLL | None:
    """The compiled step, with the types of its functions; None where there is no compiler."""
    compiled = library("step") if tiles_library() is not None else None
    if compiled is not None:
        compiled.suri_workspace_new.restype = _ADDRESS
        compiled.suri_workspace_new.argtypes = ()
        compiled.suri_workspace_free.restype = None
        compiled.suri_workspace_free.argtypes = (_ADDRESS,)
        compiled.suri_workspace_bytes.restype = _INT
        compiled.suri_workspace_bytes.argtypes = (_ADDRESS,)
        compiled.suri_run_step.restype = ctypes.c_int
        compiled.suri_run_step.argtypes = (
            ctypes.POINTER(Model), ctypes.POINTER(Step), _ADDRESS, ctypes.c_int, ctypes.c_double
        )  # fmt: skip
    return compiled


def tools() -> Tools:
    """Where the functions are that a step takes from the library of products."""
    products = tiles_library()
    assert products is not None
    return Tools(*(ctypes.cast(getattr(products, name), _ADDRESS) for name in _TOOLS))
