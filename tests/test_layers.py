"""The house rules, read from the source: who may import whom, no hidden state, no long files, no dangerous calls.

The table is that of the architecture: a room may import what is listed for it, its own folder, and the packages from
outside it is allowed.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("backend", "ui")
FILES = sorted([*ROOT.glob("backend/**/*.py"), *ROOT.glob("ui/**/*.py"), ROOT / "webui.py"])
MAX_LINES = 400

LEVEL_0 = (
    "backend.params", "backend.knobs", "backend.events", "backend.errors", "backend.settings", "backend.text.messages",
    "backend.model.config", "backend.model.shapes", "backend.weights.blocks", "backend.weights.tiles",
    "backend.tokenizer.source", "backend.units", "backend.persons", "backend.metrics",
)  # fmt: skip
NO_TORCH = (
    *LEVEL_0, "backend.text", "backend.tokenizer", "backend.presets", "backend.models", "backend.store",
    "backend.cache.blocks", "backend.engine.request", "backend.engine.scheduler", "backend.placement.plan",
    "backend.cache.tree", "backend.cache.runs", "backend.cache.places",
    "backend.engine.admission", "backend.engine.fairness", "backend.engine.pacing",
    "backend.said", "backend.bell", "backend.generation", "backend.prompting", "backend.context", "backend.hub",
    "backend.hub_download", "backend.strictyaml",
    "backend.placement.parts", "backend.placement.sizes", "backend.placement.machine", "backend.placement.speed",
    "backend.placement.budget", "backend.placement.arrange",
)  # fmt: skip
LEVEL_1 = (*NO_TORCH, "backend.model", "backend.weights", "backend.kernels", "backend.checkpoint", "backend.sampling",
           "backend.cache", "backend.memory")  # fmt: skip
LEVEL_2 = (*LEVEL_1, "backend.placement", "backend.engine", "backend.convert", "backend.remote")
LEVEL_3 = (*LEVEL_2, "backend.prompting", "backend.runtime", "backend.waiting", "backend.switch", "backend.service")

# The planner's own files: pure, from headers and measured rates to a plan.
PLANNING = tuple(f"backend.placement.{name}" for name in ("parts", "sizes", "machine", "speed", "budget", "arrange"))

# room -> what of ours it may import besides itself; the longest name that fits counts
ROOMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LEVEL_0, LEVEL_0),
    "backend.text": LEVEL_0,
    "backend.tokenizer": LEVEL_0,
    "backend.strictyaml": LEVEL_0,
    "backend.presets": (*LEVEL_0, "backend.strictyaml"),
    "backend.models": (*LEVEL_0, "backend.hub", "backend.hub_download"),
    "backend.hub": LEVEL_0,
    "backend.hub_download": (*LEVEL_0, "backend.hub"),
    "backend.prompting": (*LEVEL_0, "backend.text", "backend.tokenizer"),
    "backend.said": (*LEVEL_0, "backend.tokenizer", "backend.engine.request"),
    "backend.store": LEVEL_0,
    "backend.generation": (*LEVEL_0, "backend.text.stream", "backend.bell"),
    "backend.cache.tree": LEVEL_0,
    "backend.cache.runs": LEVEL_0,
    "backend.cache.places": (*LEVEL_0, "backend.cache.tree", "backend.cache.runs"),
    "backend.cache.blocks": (*LEVEL_0, "backend.cache.tree", "backend.cache.places"),
    "backend.cache": LEVEL_0,
    "backend.engine.request": (*LEVEL_0, "backend.cache.blocks"),
    "backend.engine.admission": (*LEVEL_0, "backend.cache.blocks", "backend.engine.request"),
    "backend.engine.fairness": LEVEL_0,
    "backend.engine.pacing": LEVEL_0,
    "backend.engine.scheduler": (
        *LEVEL_0,
        "backend.cache.blocks",
        "backend.engine.request",
        "backend.engine.admission",
        "backend.engine.fairness",
        "backend.engine.pacing",
    ),
    "backend.placement.parts": LEVEL_0,
    "backend.placement.machine": LEVEL_0,
    "backend.placement.sizes": (*LEVEL_0, "backend.placement.parts", "backend.kernels.cpu.build"),
    "backend.placement.speed": (*LEVEL_0, "backend.placement.parts", "backend.placement.machine"),
    "backend.placement.arrange": (*LEVEL_0, *PLANNING),
    "backend.placement.budget": (*LEVEL_0, *PLANNING),
    "backend.placement.plan": (*LEVEL_0, "backend.presets", *PLANNING),
    "backend.memory": LEVEL_0,
    "backend.model": LEVEL_0,
    "backend.model.paged": (*LEVEL_0, "backend.model", "backend.cache.int8"),
    "backend.kernels": LEVEL_0,
    "backend.weights": (*LEVEL_0, "backend.kernels"),
    "backend.checkpoint": (*LEVEL_0, "backend.weights"),
    "backend.bell": LEVEL_0,
    "backend.sampling": (*LEVEL_0, "backend.kernels"),
    "backend.placement": (*LEVEL_1, "backend.placement"),
    "backend.engine": LEVEL_1,
    "backend.convert": LEVEL_1,
    "backend.remote": LEVEL_1,
    "backend.calibration": LEVEL_2,
    "backend.headers": LEVEL_1,
    "backend.speeds": (*LEVEL_2, "backend.calibration"),
    "backend.context": LEVEL_0,
    "backend.drafting": (*LEVEL_2, "backend.room"),
    "backend.runtime": (
        *LEVEL_2,
        "backend.prompting",
        "backend.said",
        "backend.room",
        "backend.context",
        "backend.drafting",
    ),
    "backend.turns": LEVEL_0,
    "backend.room": (*LEVEL_0, "backend.placement.plan", "backend.placement.machine"),
    "backend.waiting": (*LEVEL_0, "backend.generation", "backend.runtime"),
    "backend.switch": (*LEVEL_2, "backend.turns", "backend.room", "backend.runtime", "backend.waiting"),
    "backend.catalog": (*LEVEL_2, "backend.room", "backend.headers"),
    "backend.quality": (*LEVEL_2, "backend.runtime"),
    "backend.service": (
        *LEVEL_2,
        "backend.runtime",
        "backend.switch",
        "backend.waiting",
        "backend.catalog",
        "backend.room",
        "backend.turns",
        "backend.speeds",
        "backend.headers",
    ),
    "backend.api": (*LEVEL_0, "backend.service", "backend.generation"),
    "ui": (*LEVEL_0, "backend.generation"),
    "backend.commands": ("backend", "ui"),
    "backend.__main__": ("backend", "ui", "webui"),
    "webui": ("backend", "ui"),
    "backend": (),
}
# Third-party packages that a room may not touch, beyond torch for the rooms without it.
TORCH = ("torch", "transformers", "gguf")


def module_of(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def inside(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def room_of(module: str) -> str:
    return max((room for room in ROOMS if inside(module, (room,))), key=len)


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module that is imported, wherever in the file. `from a import b` counts as a.b when that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module is not None
            for name in node.names:
                deeper = ROOT.joinpath(*node.module.split("."), name.name)
                whole = deeper.is_dir() or deeper.with_suffix(".py").is_file()
                yield (f"{node.module}.{name.name}" if whole else node.module), node.lineno


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


EVERY_FILE = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))


@EVERY_FILE
def test_imports_go_downwards(file: Path) -> None:
    module = module_of(file)
    room = room_of(module)
    own_folder = () if room in LEVEL_0 else (room,)
    for name, line in imports(parsed(file)):
        where = f"{file.relative_to(ROOT)}:{line}: {room} imports {name}"
        if name.split(".")[0] in (*OURS, "webui"):
            assert inside(name, (*ROOMS[room], *own_folder)), where
        elif room in LEVEL_0:
            assert name.split(".")[0] in sys.stdlib_module_names, f"{where}; level 0 has the standard library only"
        if inside(module, (*NO_TORCH, "ui", "backend.api")):
            assert name.split(".")[0] not in TORCH, where
        if name.split(".")[0] == "gradio":
            assert inside(module, ("ui", "webui")), where


@EVERY_FILE
def test_no_import_of_ours_inside_a_function(file: Path) -> None:
    for function in ast.walk(parsed(file)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for name, line in imports(function):
                assert name.split(".")[0] not in OURS, f"{file.relative_to(ROOT)}:{line}: {name}"


# Rules of the table that are true of the table itself.


def test_every_file_has_a_room() -> None:
    for file in FILES:
        module = module_of(file)
        assert room_of(module) != "backend" or module == "backend", f"{module}: say here what it may import"


def test_ui_and_api_never_meet() -> None:
    assert not inside("ui", ROOMS["backend.api"])
    assert not inside("backend.api", ROOMS["ui"])
    assert not inside("backend.service", ROOMS["ui"])


@pytest.fixture(scope="session")
def torch_free_modules() -> list[str]:
    modules = [module_of(file) for file in FILES]
    return [module for module in modules if inside(module, (*NO_TORCH, "ui")) and not module.endswith("__main__")]


def test_nothing_brings_torch_in_by_a_back_door(torch_free_modules: list[str]) -> None:
    assert len(torch_free_modules) > 25
    program = (
        "import importlib, sys\n"
        f"for name in {sorted(torch_free_modules, key=lambda name: (name.startswith('ui'), name))!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} brings torch in'\n"
        "    assert 'backend.api' not in sys.modules, f'{name} brings the API in'\n"
        "print('all of them')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "all of them\n"), done.stderr[-2000:]


# state ------------------------------------------------------------------------------------------------------------

# Names that are constants by their spelling may hold tables; everything else at module level must not change.
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*|__all__")
TYPE_NAME = re.compile(r"_?[A-Z][A-Za-z0-9]*")  # aliases such as Progress = Callable[...]
ALLOWED_STATE = {
    # Numbers for request ids. A counter is state, but nobody's behaviour depends on its value, `next` on it is atomic,
    # and one per process is what makes ids unique when two models are loaded during a switch.
    ("backend.engine.request", "_numbers"),
}
LOGGERS = {"log", "_log", "logger"}
CHANGEABLE_CALLS = {"list", "dict", "set", "deque", "defaultdict", "OrderedDict", "Counter", "count", "cycle", "Lock",
                    "RLock", "Condition", "Event", "Semaphore", "Queue", "local", "cache"}  # fmt: skip


def module_level_names(tree: ast.Module) -> Iterator[tuple[str, ast.expr | None, int]]:
    for node in tree.body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        yield name.id, node.value, node.lineno
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value, node.lineno
        elif isinstance(node, ast.AugAssign):
            yield ast.unparse(node.target), None, node.lineno


@EVERY_FILE
def test_no_state_at_module_level(file: Path) -> None:
    module = module_of(file)
    for name, value, line in module_level_names(parsed(file)):
        where = f"{file.relative_to(ROOT)}:{line}: {name}"
        if name in LOGGERS or (module, name) in ALLOWED_STATE:
            continue
        assert CONSTANT.fullmatch(name) or TYPE_NAME.fullmatch(name), f"{where} is no constant by its name"
        if isinstance(value, ast.Call):
            called = ast.unparse(value.func).split(".")[-1]
            assert called not in CHANGEABLE_CALLS, f"{where} holds a {called}"


@EVERY_FILE
def test_constants_are_never_changed(file: Path) -> None:
    """No `global`, and no function that writes into a module-level table."""
    tree = parsed(file)
    tables = {name for name, _, _ in module_level_names(tree)}
    writers = {
        "append",
        "add",
        "update",
        "pop",
        "clear",
        "extend",
        "insert",
        "remove",
        "setdefault",
        "popitem",
        "discard",
    }
    for node in ast.walk(tree):
        where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Global), f"{where}: global"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in writers:
            assert not (isinstance(node.func.value, ast.Name) and node.func.value.id in tables), where
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            assert not (isinstance(node.value, ast.Name) and node.value.id in tables), where


@EVERY_FILE
def test_nothing_is_done_at_import(file: Path) -> None:
    """Top level: docstring, imports, definitions, constants, and the guard of a program."""
    for node in parsed(file).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{file.relative_to(ROOT)}:{node.lineno}"
        elif isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING"), f"{file}:{node.lineno}"
        else:
            kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Assign,
                     ast.AnnAssign)  # fmt: skip
            assert isinstance(node, kinds), f"{file.relative_to(ROOT)}:{node.lineno}: {type(node).__name__}"


# size and danger --------------------------------------------------------------------------------------------------


@EVERY_FILE
def test_a_file_with_two_jobs_is_too_long(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


NEVER = (
    "weights_only=False", "pickle.load", "trust_remote_code", "yaml.load(", "yaml.unsafe_load", "jinja2.Environment(",
    "torch.load(", "os.system(", "shell=True", "exec(",
)  # fmt: skip


@EVERY_FILE
def test_what_must_never_be_called(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    for words in NEVER:
        assert words not in source, f"{file.relative_to(ROOT)}: {words}"
    assert not re.search(r"(?<![\w.])eval\(", source), f"{file.relative_to(ROOT)}: eval("
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            assert not {"pickle", "marshal", "shelve", "dill", "joblib"} & set(names), (
                f"{file.relative_to(ROOT)}: {names}"
            )
