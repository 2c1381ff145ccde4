"""Private names of other libraries: where one is gone the message says so, and all are read through one table."""

from __future__ import annotations

import ast
import logging
import re
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from transformers import Trainer

import lorapro_hf
from lorapro_hf import LoRAProTrainer, LoRAProTrainerMixin, LoRAProTrainingArguments
from lorapro_hf.distributed.zero import ZERO_OPTIMIZERS, ZeroAccess
from lorapro_hf.utils import private_names
from lorapro_hf.utils.private_names import METHODS_OF_TRAINER, PRIVATE, TESTED, private, warn_if_newer
from support_table import REPLACED
from trainer_helpers import arguments, build

ROOT = Path(__file__).parents[2]
PACKAGE = Path(lorapro_hf.__file__).parent
# What libraries promise although it begins with an underscore, operators and modules of torch, which raise by name, and
# what only a wording depends on.
PROMISED = {"_asdict", "_replace", "_fields", "_exit", "_getframe", "_modules", "_parameters", "_buffers"}
PROMISED |= {"_foreach_add_", "_foreach_copy_", "_fused_adamw_", "_schema", "_python_dispatch", "_pytree"}
PROMISED |= {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
PROMISED |= {"_orig_mod", "_name", "_C", "_dispatch_has_kernel_for_dispatch_key"}
PROMISED |= {"_SubParsersAction", "_ArgumentGroup"}
PROMISED |= {"_did_swap_in_out_features"}  # of PEFT; releases without it never swap, which is the default here


def versions(file: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines()
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", "\n".join(lines), re.MULTILINE))


@pytest.mark.parametrize("library", TESTED)
def test_tested_releases_are_those_of_the_requirements(library: str) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lowest = re.search(rf'"{library}>=([\d.]+)', project)
    assert lowest is not None
    newest = [versions(file).get(library, "0") for file in ("constraints.txt", "newest.txt")]
    oldest, upper = TESTED[library]
    assert upper == max(newest, key=private_names._numbers)
    assert oldest == versions("oldest.txt").get(library, lowest[1]) and oldest.startswith(lowest[1])


@pytest.mark.parametrize("name", PRIVATE)
def test_a_name_that_is_gone_is_an_error_with_release_and_name(name: str) -> None:
    library = PRIVATE[name]
    holder = ModuleType("held")
    setattr(holder, name, 7)
    assert private(holder, name) == 7
    delattr(holder, name)
    with pytest.raises(RuntimeError) as raised:
        private(holder, name)
    message, release = str(raised.value), metadata.version(library) if library != "deepspeed" else ""
    assert f" {release}" in message and f" has no held.{name}, " in message
    assert TESTED[library][1] in message and message.endswith("install such a release, or report it.")


def test_a_module_that_is_gone_is_an_error_too() -> None:
    with pytest.raises(RuntimeError, match=r"^transformers .* has no transformers\.moved\._save, "):
        private("transformers.moved", "_save")


@pytest.mark.parametrize("kind", ZERO_OPTIMIZERS)
def test_no_layout_of_deepspeed_is_guessed(kind: str) -> None:
    _, groups, masters = ZERO_OPTIMIZERS[kind]
    held = {"dp_process_group": None, groups: [], masters: []}
    ZeroAccess(type(kind, (), held)(), 1, {})
    for name in held:
        without = {other: value for other, value in held.items() if other != name}
        with pytest.raises(RuntimeError, match=rf"DeepSpeed .* has no {kind}\.{name}, "):
            ZeroAccess(type(kind, (), without)(), 1, {})


def test_newer_releases_are_warned_of_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(private_names, "_warned", set())
    installed = metadata.version("transformers")
    with caplog.at_level(logging.WARNING, "lorapro_hf"):
        warn_if_newer("transformers")
        assert not caplog.messages
        monkeypatch.setitem(TESTED, "transformers", ("4.1", "4.2"))
        warn_if_newer("transformers")
        warn_if_newer("transformers")
    says = f"LoRA-Pro relies on private names of transformers {installed}, and was tested with transformers 4.1 to 4.2."
    assert caplog.messages == [says]


@pytest.fixture(scope="module")
def sources() -> dict[str, ast.AST]:
    """The modules of the package, parsed, by their paths."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def foreign(tree: ast.AST) -> set[str]:
    """Attributes with a leading underscore of anything but `self`, `cls`, `super()` and `Trainer`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()", "Trainer"):
                found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
            name = node.args[1]
            found.add(str(name.value) if isinstance(name, ast.Constant) else "")
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def own_names(sources: dict[str, ast.AST]) -> set[str]:
    """All names that our own sources define or set."""
    found: set[str] = set()
    for tree in sources.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return found


def test_private_names_of_others_are_read_through_the_table(sources: dict[str, ast.AST]) -> None:
    allowed = PROMISED | (own_names(sources) - PRIVATE.keys())
    assert {name: foreign(tree) - allowed for name, tree in sources.items() if foreign(tree) - allowed} == {}


def test_the_search_sees_private_names() -> None:
    source = "zero._global_grad_norm\ngetattr(model, '_hidden', None)\nself._own\nsuper()._save()"
    assert foreign(ast.parse(source)) == {"_global_grad_norm", "_hidden"}


@pytest.fixture(scope="module")
def overridden(sources: dict[str, ast.AST]) -> set[tuple[type, str]]:
    """The mixins and the methods for which they call their parent."""
    found = set()
    for mixin in LoRAProTrainerMixin.__mro__:
        if mixin.__module__.startswith("lorapro_hf."):
            tree = sources["/".join(mixin.__module__.split(".")[1:]) + ".py"]
            nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
            names = {node.attr for node in nodes if ast.unparse(node.value) == "super()"}
            found |= {(mixin, name) for name in names & vars(mixin).keys() if not name.startswith("__")}
    return found


def test_overridden_methods_are_the_parents(overridden: set[tuple[type, str]]) -> None:
    names = {name for _, name in overridden}
    assert {name for name in names if not hasattr(Trainer, name)} == set()
    listed = {name for _, owner, name, _ in REPLACED if owner == "Trainer"}
    assert listed | {"_get_output_dir"} == set(METHODS_OF_TRAINER)
    assert {name for name in names if name.startswith("_")} == listed


def test_replaced_methods_of_deepspeed_are_in_the_table(sources: dict[str, ast.AST]) -> None:
    """Whatever `deepspeed/` sets on an engine or its optimizer, values aside."""
    values = {"clip_grad", "_global_grad_norm"}
    found = {
        node.attr
        for name, tree in sources.items()
        if name.startswith("deepspeed/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) in ("engine", "engine.optimizer", "self.zero", "zero")
    }
    assert found - values == {name for library, _, name, _ in REPLACED if library == "deepspeed"}


def test_a_trainer_that_lacks_a_method_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = arguments(tmp_path, LoRAProTrainingArguments)
    monkeypatch.delattr(Trainer, "_save_rng_state")
    with pytest.raises(RuntimeError, match=r"transformers .* has no Trainer\._save_rng_state, on which LoRA-Pro"):
        build(LoRAProTrainer, args)


def repository(*_: Any, **__: Any) -> Any:
    return SimpleNamespace(repo_id="someone/run")


def finished_upload(*_: Any, **__: Any) -> Any:
    job: Future[str] = Future()
    job.set_result("uploaded")
    return job


def test_every_override_is_called(
    overridden: set[tuple[type, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the parent, in a training that saves, pushes, is resumed and loads its best checkpoint."""
    for name, answer in (("create_repo", repository), ("upload_folder", finished_upload)):
        monkeypatch.setattr(HfApi, name, answer)
        monkeypatch.setattr(f"transformers.trainer.{name}", answer, raising=False)  # transformers 4 has its own
    called = set()

    def recorded(mixin: type, name: str) -> Any:
        method = vars(mixin)[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            called.add((mixin, name))
            return method(*args, **kwargs)

        return call

    for mixin, name in overridden:
        monkeypatch.setattr(mixin, name, recorded(mixin, name))
    settings = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "save_strategy": "steps"}
    settings |= {"load_best_model_at_end": True, "push_to_hub": True, "hub_token": "none"}
    args = arguments(tmp_path, LoRAProTrainingArguments, **settings)
    build(LoRAProTrainer, args).train()
    trainer = build(LoRAProTrainer, args)
    trainer.model_init = lambda: trainer.model  # as a search for hyperparameters has one
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer.save_model()
    assert called == overridden
