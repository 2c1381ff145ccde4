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

# From the ground up. A module imports only from floors below its own; a sub-package counts as one module.
FLOORS = (
    ("extras", "private_names", "text_files", "unpickling"),
    ("config", "kernels"),
    ("bases", "reference", "trust_region"),
    ("projection", "sequential"),
    ("linear", "wrappers"),
    ("factored", "pairs"),
    ("stacks", "gradients", "parents", "attendance", "uneven_inputs"),
    ("moments", "shares", "finite", "groups"),
    ("steps", "checkpoint", "memory", "consolidation", "first_steps"),
    ("ordinary", "pair_gradients", "finite_checks"),
    ("pair_optimizer",),
    ("optimizer",),
    ("zero",),
    ("factory",),
    ("adapter_files",),
    ("callback", "loading", "saving", "hub", "sharded_files", "zero_files"),
    ("checkpoint_files",),
    ("manifest", "step_counts", "engines"),
    ("resume", "arguments"),
    ("checkpointing", "diagnostics"),
    ("trainer",),
    ("trl_trainers", "options", "processes"),
    ("recipes", "progress"),
    ("inspection", "evaluation", "plot"),
    ("demo",),
    ("bench", "comparison"),
    ("cli",),
    ("__main__",),
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}

# transformers may be imported only from this floor upwards, not even inside functions. PEFT and accelerate may be used
# lower down inside functions (importing PEFT imports transformers).
TRAINER_SIDE = FLOOR["adapter_files"]
TRAINER_SIDE_ONLY = {"transformers"}
TRAINER_SIDE_AT_TOP = {"transformers", "peft", "accelerate", "datasets", "evaluate"}
# Behind extras: imported where they are used.
DEMO_AT_TOP = {
    "trl",
    "deepspeed",
    "bitsandbytes",
    "matplotlib",
    "rich",
    "gguf",
    "lora_pro",
    "pytorch_optimizer",
    "triton",
}
PROGRAMS = {"recipes", "progress", "evaluation", "plot", "demo", "bench", "comparison"}
# What else a module may import at its top: these are themselves imported where they are used.
EXEMPT = {"kernels": {"triton"}, "trl_trainers": {"trl"}}


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


def house_module(name: str) -> str:
    """`lorapro_hf.demo.metric` and the public name `lorapro_hf.LoRAPair` belong to `demo` and `pairs`."""
    part = name.split(".")[1]
    return lorapro_hf._HOMES.get(part, part)


def violations(module: str, imports: list[Import]) -> list[str]:
    floor = FLOOR[module]
    local_only = (TRAINER_SIDE_AT_TOP if floor < TRAINER_SIDE else set()) | (
        DEMO_AT_TOP - EXEMPT.get(module, set()) if module not in PROGRAMS else set()
    )
    found = []
    for target, at_top, line in imports:
        library = target.split(".")[0]
        if target == PACKAGE or target == f"{PACKAGE}.__version__":
            continue
        if library == PACKAGE:
            other = house_module(target)
            if other not in FLOOR:
                found.append(f"line {line}: {target} has no floor in FLOORS")
            elif other != module and FLOOR[other] >= floor:
                found.append(f"line {line}: {module} must not import {other}, which is not on a floor below")
        elif library in TRAINER_SIDE_ONLY and floor < TRAINER_SIDE:
            found.append(f"line {line}: {target} may be imported only from the callback upwards")
        elif at_top and library in local_only:
            found.append(f"line {line}: {target} must be imported inside the function that uses it")
    return found


SOURCES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module_keeps_the_import_rule(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    assert parts[0] in FLOOR, f"{parts[0]} has no floor: add it to FLOORS in {Path(__file__).name}"
    package = ".".join((PACKAGE, *parts[:-1]))
    assert violations(parts[0], imports_of(path.read_text(encoding="utf-8"), package)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pairs", "from lorapro_hf.optimizer import LoRAProAdamW"),
        ("pairs", "from .optimizer import LoRAProAdamW"),
        ("pairs", "from . import optimizer"),
        ("pairs", "from lorapro_hf import LoRAProAdamW"),
        ("pairs", "import lorapro_hf.trainer"),
        ("pairs", "def f():\n    from lorapro_hf.trainer import LoRAProTrainer"),
        ("pairs", "from lorapro_hf.unheard_of import anything"),
        ("sequential", "from lorapro_hf.projection import anything"),
        ("pairs", "import peft"),
        ("pairs", "try:\n    import peft.tuners\nexcept ImportError:\n    pass"),
        ("optimizer", "def f():\n    import transformers"),
        ("optimizer", "class C:\n    import accelerate"),
        ("trainer", "from trl import SFTTrainer"),
        ("cli", "from rich.table import Table"),
        ("optimizer", "import lora_pro"),
        ("demo", "from lorapro_hf.bench import run"),
    ],
)
def test_import_rule_notices(module: str, source: str) -> None:
    assert len(violations(module, imports_of(source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pairs", "import torch\nfrom lorapro_hf.config import LoRAProConfig"),
        ("pairs", "def f():\n    from peft.tuners.lora import LoraLayer"),
        ("pairs", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from peft import PeftModel"),
        ("callback", "from transformers import TrainerCallback"),
        ("trainer", "from lorapro_hf import LoRAProConfig, __version__"),
        ("trainer", "def f():\n    import deepspeed"),
        ("demo", "import rich\nfrom lorapro_hf.demo.other import anything"),
        ("bench", "import matplotlib\nfrom lorapro_hf.demo.run import anything"),
    ],
)
def test_import_rule_allows(module: str, source: str) -> None:
    assert violations(module, imports_of(source)) == []


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300).stdout


def test_optimizer_loads_without_transformers_and_peft() -> None:
    below = [module for module, floor in FLOOR.items() if floor < TRAINER_SIDE and (ROOT / f"{module}.py").exists()]
    lines = [f"import lorapro_hf.{module}" for module in below]
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
