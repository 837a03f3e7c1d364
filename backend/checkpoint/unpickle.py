"""The pickle inside a torch file, read as data by a small machine of our own: no code from a file is ever run.

It knows the opcodes that torch.save writes (protocols 2 to 4) and a short list of names. A name stands for itself:
nothing is imported, and the only calls it can make are three of its own, which build a dict, a `TensorRef` and nothing
else. Everything outside the two lists is refused. Opcodes: Lib/pickletools.py of CPython; what torch writes:
torch/serialization.py and torch/_utils.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from backend.errors import CheckpointError

MAX_OPCODES = 1 << 19  # a shard of the largest open model has 1,200 tensors and takes about 35 steps for each
MAX_DIMS = 8
MAX_NAME = 128  # bytes of a module or class name
MAX_INT = 1 << 62


@dataclass(frozen=True, eq=False)
class Symbol:
    """A name that the file asks for and the list has; it is never looked up."""

    name: str


@dataclass(frozen=True, eq=False)
class StorageRef:
    """`elements` numbers in the archive's member data/`key`."""

    dtype: torch.dtype
    key: str
    elements: int


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A view of a storage; offset and stride count elements. All numbers are >= 0, nothing else is checked yet."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
}
ORDERED_DICT = "collections.OrderedDict"
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
DTYPES = frozenset(str(dtype) for dtype in STORAGES.values())  # "torch.float16" and so on, as values of their own
NAMES = frozenset({ORDERED_DICT, TENSOR, PARAMETER, *STORAGES, *DTYPES})

# What the opcodes that can run code are called, for the message. Opcodes in neither table get their number only.
_REFUSED = {
    0x69: "INST", 0x6F: "OBJ", 0x81: "NEWOBJ", 0x92: "NEWOBJ_EX", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4",
    0x50: "PERSID", 0x97: "NEXT_BUFFER",
}  # fmt: skip


def unpickle(path: Path, data: bytes) -> Any:
    """The value that `data` describes: dict, list, tuple, str, int, float, bool, None, Symbol, StorageRef, TensorRef.

    Keys of a dict are str or int. Values may be shared and lists and dicts may hold themselves: who walks the result
    must bound the walk. Raises CheckpointError, which names `path`, for anything else.
    """
    return _Machine(path, data).run()


class _Machine:
    """A stack, marks into it, and a memo. `_budget` is what the file may still do; copies cost it too."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._at = path, data, 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._budget = MAX_OPCODES

    def run(self) -> Any:
        data, size = self._data, len(self._data)
        while self._at < size:
            code = data[self._at]
            self._at += 1
            if code == 0x2E:  # STOP
                return self._finish()
            step = _STEPS.get(code)
            if step is None:
                self._refuse(code)
            self._budget -= 1
            if self._budget < 0:
                self._spend(0)
            step(self)
        self._fail("ends in the middle")

    def _finish(self) -> Any:
        if self._marks or len(self._stack) != 1:
            self._fail(f"leaves {len(self._stack)} values where one is expected")
        if self._at != len(self._data):
            self._fail(f"has {len(self._data) - self._at} bytes after its end")
        return self._stack[0]

    # reads, each bounded by the bytes that are left, and errors ------------------------------------------------------

    def _fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: the pickle in this file (data.pkl) {what}; it is damaged or made to harm")

    def _refuse(self, code: int) -> NoReturn:
        if code == 0x69:  # INST names a class right here
            self._name(*self._two_lines())
        called = f" ({_REFUSED[code]})" if code in _REFUSED else ""
        raise CheckpointError(
            f"{self._path}: the pickle in this file (data.pkl) has opcode 0x{code:02x}{called} at byte {self._at - 1}, "
            "which no file of plain tensors needs; no code from a file is run"
        )

    def _spend(self, cost: int) -> None:
        self._budget -= cost
        if self._budget < 0:
            self._fail(f"takes more than {MAX_OPCODES} steps")

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            self._fail(f"ends in the middle: {length} bytes wanted at byte {self._at} of {len(self._data)}")
        piece = self._data[self._at : self._at + length]
        self._at += length
        return piece

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + MAX_NAME + 1)
        if end < 0:
            self._fail(f"has a name without an end at byte {self._at}")
        line = self._data[self._at : end]
        self._at = end + 1
        return line.decode("utf-8", "replace")

    def _two_lines(self) -> tuple[str, str]:
        return self._line(), self._line()

    def _name(self, module: str, name: str) -> Symbol:
        if f"{module}.{name}" not in NAMES:
            raise CheckpointError(
                f"{self._path}: the pickle in this file (data.pkl) asks for {f'{module}.{name}'[:MAX_NAME]!r}; only "
                "plain tensors can be opened, and no code from a file is run"
            )
        return Symbol(f"{module}.{name}")

    # the stack --------------------------------------------------------------------------------------------------------

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            self._fail(f"takes a value that is not there, before byte {self._at}")
        return self._stack.pop()

    def _pop_marked(self) -> list[Any]:
        if not self._marks:
            self._fail(f"has no mark for the opcode before byte {self._at}")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _top(self, kind: type) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0) or type(self._stack[-1]) is not kind:
            self._fail(f"needs a {kind.__name__} before byte {self._at}")
        return self._stack[-1]

    def _remember(self, index: int) -> None:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            self._fail(f"stores a value that is not there, before byte {self._at}")
        self._memo[index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            self._fail(f"recalls value {index}, which was never stored")
        self._stack.append(self._memo[index])

    # steps ------------------------------------------------------------------------------------------------------------

    def _proto(self) -> None:
        version = self._take(1)[0]
        if not 2 <= version <= 5:
            self._fail(f"says it has protocol {version}; 2 to 5 can be read")

    def _frame(self) -> None:
        length = self._number("<Q")
        if length > len(self._data) - self._at:
            self._fail(f"has a frame of {length} bytes, but {len(self._data) - self._at} are left")

    def _text(self, code: str) -> None:
        raw = self._take(self._number(code))
        try:
            self._stack.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            self._fail(f"has text that is not UTF-8, before byte {self._at}")

    def _long(self) -> None:
        length = self._take(1)[0]
        if length > 8:
            self._fail(f"has a number of {length} bytes; no size or offset needs more than 8")
        self._stack.append(int.from_bytes(self._take(length), "little", signed=True))

    def _tuple(self, length: int) -> None:
        items = [self._pop() for _ in range(length)]
        self._stack.append(tuple(reversed(items)))

    def _append(self) -> None:
        item = self._pop()
        self._top(list).append(item)

    def _appends(self) -> None:
        items = self._pop_marked()
        self._top(list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            self._fail(f"has a key without a value, before byte {self._at}")
        for key, value in zip(items[::2], items[1::2]):
            target[self._key(key)] = value

    def _key(self, key: Any) -> str | int:
        if type(key) not in (str, int):  # anything deeper could take for ever to hash
            self._fail(f"has a dictionary key of type {type(key).__name__}; text or a whole number is expected")
        return key  # type: ignore[no-any-return]

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            self._fail(f"has a name that is no text, before byte {self._at}")
        self._stack.append(self._name(module, name))

    def _build(self) -> None:
        """torch.save gives a state dict its version numbers this way; any other state could be an attack."""
        state = self._pop()
        self._top(dict)
        if type(state) is not dict or set(state) != {"_metadata"}:
            self._fail(f"sets the state of an object, before byte {self._at}, which plain tensors do not have")

    def _persistent(self) -> None:
        found = self._pop()
        if type(found) is not tuple or len(found) != 5 or type(found[0]) is not str or found[0] != "storage":
            self._fail(f"has an outside reference, before byte {self._at}, that is no storage")
        _, kind, key, _, elements = found
        if type(kind) is not Symbol or kind.name not in STORAGES or type(key) is not str:
            self._fail(f"has a storage, before byte {self._at}, without a type and a key")
        if type(elements) is not int or not 0 <= elements < MAX_INT:
            self._fail(f"has a storage, before byte {self._at}, without a number of elements")
        self._stack.append(StorageRef(STORAGES[kind.name], key, elements))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        build = _CALLS.get(function.name) if type(function) is Symbol else None
        if build is None:
            called = function.name if type(function) is Symbol else f"a {type(function).__name__}"
            self._fail(f"calls {called}, before byte {self._at}, which is no way to make a tensor")
        if type(arguments) is not tuple:
            self._fail(f"calls {function.name} without a tuple of arguments")
        self._stack.append(build(self, arguments))

    # the three calls --------------------------------------------------------------------------------------------------

    def _ordered_dict(self, arguments: tuple[Any, ...]) -> dict[str | int, Any]:
        """OrderedDict() or OrderedDict([[key, value], ...])."""
        if not arguments:
            return {}
        pairs = arguments[0]
        if len(arguments) > 1 or type(pairs) is not list:
            self._fail("makes a dictionary of something that is no list of pairs")
        self._spend(len(pairs))
        made = {}
        for pair in pairs:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                self._fail("makes a dictionary of something that is no list of pairs")
            made[self._key(pair[0])] = pair[1]
        return made

    def _tensor(self, arguments: tuple[Any, ...]) -> TensorRef:
        """(storage, offset, size, stride, requires_grad, backward_hooks[, metadata])."""
        if len(arguments) not in (6, 7) or type(arguments[0]) is not StorageRef:
            self._fail("has a tensor without a storage")
        storage, offset, shape, stride = arguments[:4]
        if type(shape) is not tuple or type(stride) is not tuple or len(shape) > MAX_DIMS or len(stride) != len(shape):
            self._fail("has a tensor without a shape and a stride of the same length")
        if any(type(number) is not int or not 0 <= number < MAX_INT for number in (offset, *shape, *stride)):
            self._fail("has a tensor whose offset, shape or stride is negative, too large or no whole number")
        return TensorRef(storage, offset, shape, stride)

    def _parameter(self, arguments: tuple[Any, ...]) -> TensorRef:
        """(tensor, requires_grad, backward_hooks)."""
        if len(arguments) != 3 or type(arguments[0]) is not TensorRef:
            self._fail("has a parameter without a tensor")
        return arguments[0]


_CALLS: dict[str, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    ORDERED_DICT: _Machine._ordered_dict,
    TENSOR: _Machine._tensor,
    PARAMETER: _Machine._parameter,
}

_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine._proto,
    0x95: _Machine._frame,
    0x28: lambda m: m._marks.append(len(m._stack)),  # MARK
    0x4E: lambda m: m._stack.append(None),  # NONE
    0x88: lambda m: m._stack.append(True),  # NEWTRUE
    0x89: lambda m: m._stack.append(False),  # NEWFALSE
    0x4A: lambda m: m._stack.append(m._number("<i")),  # BININT
    0x4B: lambda m: m._stack.append(m._take(1)[0]),  # BININT1
    0x4D: lambda m: m._stack.append(m._number("<H")),  # BININT2
    0x8A: _Machine._long,  # LONG1
    0x47: lambda m: m._stack.append(m._number(">d")),  # BINFLOAT
    0x8C: lambda m: m._text("<B"),  # SHORT_BINUNICODE
    0x58: lambda m: m._text("<I"),  # BINUNICODE
    0x7D: lambda m: m._stack.append({}),  # EMPTY_DICT
    0x5D: lambda m: m._stack.append([]),  # EMPTY_LIST
    0x29: lambda m: m._stack.append(()),  # EMPTY_TUPLE
    0x74: lambda m: m._stack.append(tuple(m._pop_marked())),  # TUPLE
    0x85: lambda m: m._tuple(1),
    0x86: lambda m: m._tuple(2),
    0x87: lambda m: m._tuple(3),
    0x61: _Machine._append,
    0x65: _Machine._appends,
    0x73: _Machine._set_item,
    0x75: lambda m: m._set_items(m._pop_marked()),  # SETITEMS
    0x71: lambda m: m._remember(m._take(1)[0]),  # BINPUT
    0x72: lambda m: m._remember(m._number("<I")),  # LONG_BINPUT
    0x94: lambda m: m._remember(len(m._memo)),  # MEMOIZE
    0x68: lambda m: m._recall(m._take(1)[0]),  # BINGET
    0x6A: lambda m: m._recall(m._number("<I")),  # LONG_BINGET
    0x63: lambda m: m._stack.append(m._name(*m._two_lines())),  # GLOBAL
    0x93: _Machine._stack_global,
    0x51: _Machine._persistent,  # BINPERSID
    0x52: _Machine._reduce,
    0x62: _Machine._build,
}
