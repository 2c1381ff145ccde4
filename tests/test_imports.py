"""The import rule: modules import only from lower floors, heavy libraries only where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest

import lorapro_hf

PACKAGE = "lorapro_hf"
ROOT = Path(lorapro_hf.__file__).parent

# From the ground up: a folder, or a file at the root, imports only from lines above its own. Folders on one line do
# not see each other.
FLOORS = (
    ("utils",),
    ("config", "options", "kernels"),
    ("functional",),
    ("factors",),
    ("distributed",),
    ("optim",),
    ("checkpoints",),
    ("hub", "deepspeed", "diagnostics", "federated", "methods"),
    ("trainer",),
    ("recipes",),
    ("commands.common",),
    (
        "commands.aggregate",
        "commands.bench",
        "commands.chat",
        "commands.compare",
        "commands.evaluate",
        "commands.init",
        "commands.inspect",
        "commands.merge",
        "commands.plot",
        "commands.ranks",
        "commands.train",
    ),
    ("commands.demo",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# transformers may be imported only from this floor upwards, not even inside functions. PEFT and accelerate may be used
# lower down inside functions (importing PEFT imports transformers).
TRAINER_SIDE = FLOOR["checkpoints"]
WITHOUT_TRANSFORMERS = {room for room, floor in FLOOR.items() if floor < TRAINER_SIDE} | {"deepspeed"}
TRAINER_SIDE_ONLY = {"transformers"}
TRAINER_SIDE_AT_TOP = {"transformers", "peft", "accelerate", "datasets", "evaluate"}
# Behind extras: imported where they are used.
DEMO_AT_TOP = {
    "trl",
    "deepspeed",
    "bitsandbytes",
    "flwr",
    "matplotlib",
    "rich",
    "gguf",
    "lm_eval",
    "lora_pro",
    "pytorch_optimizer",
    "triton",
}
PROGRAMS = {"recipes", "diagnostics.plot", *(room for room in FLOOR if room.startswith("commands"))}
# What else a module may import at its top: these are themselves imported where they are used.
EXEMPT = {"federated.strategy": {"flwr"}, "kernels": {"triton"}, "trainer.kto": {"trl"}, "trainer.trl": {"trl"}}


class Import(NamedTuple):
    target: str
    at_top: bool  # executed when the module is imported
    line: int


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def walk(node: ast.AST, at_top: bool, package: str) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, at_top, node.lineno)
    elif isinstance(node, ast.ImportFrom):
        base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
        # `from lorapro_hf import pairs` names the module only in the second half.
        names = [f"{base}.{alias.name}" for alias in node.names] if base == PACKAGE else [base]
        for name in names:
            yield Import(name, at_top, node.lineno)
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        at_top = False
    if is_type_checking(node):
        assert isinstance(node, ast.If)
        for child in node.body:
            yield from walk(child, False, package)
        for child in node.orelse:
            yield from walk(child, at_top, package)
        return
    for child in ast.iter_child_nodes(node):
        yield from walk(child, at_top, package)


def imports_of(source: str, package: str = PACKAGE) -> list[Import]:
    return list(walk(ast.parse(source), True, package))


def room_of(name: str) -> str:
    """The folder of a module or of a public name: `optim` of `lorapro_hf.optim.memory`, `lorapro_hf.LoRAProAdamW`."""
    parts = name.split(".")[1:]
    parts = [*lorapro_hf._HOMES.get(parts[0], parts[0]).split("."), *parts[1:]]
    return ".".join(parts[:2]) if parts[0] == "commands" else parts[0]


def violations(module: str, imports: list[Import]) -> list[str]:
    room = room_of(f"{PACKAGE}.{module}")
    floor = FLOOR[room]
    may_import_at_top = EXEMPT.get(module, EXEMPT.get(room, set()))
    local_only = (TRAINER_SIDE_AT_TOP if room in WITHOUT_TRANSFORMERS else set()) | (
        set() if {module, room} & PROGRAMS else DEMO_AT_TOP - may_import_at_top
    )
    found = []
    for target, at_top, line in imports:
        library = target.split(".")[0]
        if target == PACKAGE or target == f"{PACKAGE}.__version__":
            continue
        if library == PACKAGE:
            other = room_of(target)
            if other not in FLOOR:
                found.append(f"line {line}: {target} has no floor in FLOORS")
            elif other != room and FLOOR[other] >= floor:
                found.append(f"line {line}: {module} must not import {other}, which is not on a floor below")
        elif library in TRAINER_SIDE_ONLY and room in WITHOUT_TRANSFORMERS:
            found.append(f"line {line}: {target} may be imported only from the checkpoints upwards")
        elif at_top and library in local_only:
            found.append(f"line {line}: {target} must be imported inside the function that uses it")
    return found


ROOT_FILES = {"__init__.py", "cli.py", "config.py", "options.py", "py.typed"}
SOURCES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def test_root_holds_nothing_but_settings_and_the_command_line() -> None:
    assert {path.name for path in ROOT.iterdir() if path.is_file()} == ROOT_FILES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_keeps_the_import_rule(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = ".".join((PACKAGE, *parts[:-1]))
    module = ".".join(parts).removesuffix(".__init__")
    imports = imports_of(path.read_text(encoding="utf-8"), package)
    if module == "commands":
        assert imports == []
        return
    assert room_of(f"{PACKAGE}.{module}") in FLOOR, f"{module} has no floor: add its folder to FLOORS in this file"
    assert violations(module, imports) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("factors.pairs", "from lorapro_hf.optim.lora_pro import LoRAProAdamW"),
        ("factors.pairs", "from ..optim import lora_pro"),
        ("factors.pairs", "from .. import optim"),
        ("factors.pairs", "from lorapro_hf import LoRAProAdamW"),
        ("factors.pairs", "import lorapro_hf.trainer"),
        ("factors.pairs", "def f():\n    from lorapro_hf.trainer.trainer import LoRAProTrainer"),
        ("factors.pairs", "from lorapro_hf.unheard_of import anything"),
        ("hub.card", "from lorapro_hf.diagnostics.records import anything"),
        ("factors.pairs", "import peft"),
        ("factors.pairs", "try:\n    import peft.tuners\nexcept ImportError:\n    pass"),
        ("optim.lora_pro", "def f():\n    import transformers"),
        ("optim.lora_pro", "class C:\n    import accelerate"),
        ("deepspeed.engine", "def f():\n    import transformers"),
        ("trainer.trainer", "from trl import SFTTrainer"),
        ("cli", "from rich.table import Table"),
        ("optim.lora_pro", "import lora_pro"),
        ("commands.compare.sweep", "from lorapro_hf.commands.demo import run"),
        ("commands.bench.run", "from lorapro_hf.commands.compare.store import anything"),
    ],
)
def test_import_rule_notices(module: str, source: str) -> None:
    assert len(violations(module, imports_of(source, f"{PACKAGE}.{module}".rpartition(".")[0]))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("factors.pairs", "import torch\nfrom lorapro_hf.config import LoRAProConfig\nfrom .stacks import anything"),
        ("factors.pairs", "def f():\n    from peft.tuners.lora import LoraLayer"),
        ("factors.pairs", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from peft import PeftModel"),
        ("trainer.callback", "from transformers import TrainerCallback"),
        ("trainer.trl", "from trl import SFTTrainer"),
        ("trainer.trainer", "from lorapro_hf import LoRAProConfig, __version__"),
        ("trainer.trainer", "def f():\n    import deepspeed"),
        ("commands.demo.run", "import rich\nfrom lorapro_hf.commands.demo.report import anything"),
        ("commands.bench.run", "import matplotlib\nfrom lorapro_hf.commands.common.plots import anything"),
    ],
)
def test_import_rule_allows(module: str, source: str) -> None:
    assert violations(module, imports_of(source, f"{PACKAGE}.{module}".rpartition(".")[0])) == []


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300).stdout


def test_optimizer_loads_without_transformers_and_peft() -> None:
    modules = [".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)) for path in SOURCES]
    below = [module for module in modules if room_of(module) in WITHOUT_TRANSFORMERS and "triton" not in module]
    lines = [f"import {module}" for module in below]
    heavy = sorted(TRAINER_SIDE_AT_TOP | DEMO_AT_TOP)
    lines += ["import sys", f"print([name for name in {heavy} if name in sys.modules])"]
    assert run_python("\n".join(lines)).strip() == "[]"


def test_package_itself_loads_nothing() -> None:
    assert run_python("import sys, lorapro_hf; print('torch' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("name", lorapro_hf.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(lorapro_hf, name)
    assert value.__name__ == name
    assert f"{value.__module__}.".startswith(f"{PACKAGE}.{lorapro_hf._HOMES[name]}.")
    assert value.__doc__


def test_public_names_are_listed_once() -> None:
    assert sorted(lorapro_hf._HOMES) == sorted(lorapro_hf.__all__)
    assert set(lorapro_hf.__all__) <= set(dir(lorapro_hf))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LoRAMax'"):
        _ = lorapro_hf.LoRAMax


def test_no_two_test_files_have_the_same_name():
    # a job that is sent to another process is found by the name of its file alone
    names = [file.name for file in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names))
