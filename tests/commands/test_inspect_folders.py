"""`lorapro inspect` of each kind of folder that a training leaves: it agrees with `Trainer` on what can be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from engine_checkpoints import ZERO2, ZERO3, written
from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments, cli
from lorapro_hf.checkpoints.engines import FULL, SHARDED
from lorapro_hf.checkpoints.manifest import MANIFEST
from lorapro_hf.checkpoints.resume import find_flaw
from lorapro_hf.commands.inspect.report import Report, Request
from lorapro_hf.commands.inspect.show import text
from lorapro_hf.commands.inspect.sources import inspect_source
from lorapro_hf.options import UsageError
from trainer_helpers import arguments, build, tiny_base

ADAPTERS = {"plain": ["default"], "named": ["mine"], "two": ["default", "other"]}
ADAPTER, WEIGHTS, STATE = "adapter_config.json", "adapter_model.safetensors", "trainer_state.json"
OF_RESUME = ("optimizer.pt", "scheduler.pt", "rng_state.pth", MANIFEST)


def adapted(kind: str, base: Path) -> PeftModel:
    names = ADAPTERS[kind]
    configs = [LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") for _ in names]
    model = tiny_base()
    model.name_or_path = model.config.name_or_path = str(base)
    model = get_peft_model(model, configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base's configuration in `base`, and a finished training for each kind of model, with two checkpoints."""
    root = tmp_path_factory.mktemp("trainings")
    tiny_base().config.save_pretrained(root / "base")
    content = json.loads((root / "base" / "config.json").read_text())
    (root / "base" / "config.json").write_text(json.dumps({**content, "architectures": ["LlamaForCausalLM"]}))
    for kind in ADAPTERS:
        trainer = trainer_of(kind, root, root / kind)
        trainer.train()
        trainer.save_model()
        trainer.save_state()
    return root


def trainer_of(kind: str, root: Path, folder: Path) -> LoRAProTrainer:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "lora_pro_mode": "factored"}
    return build(LoRAProTrainer, arguments(folder, LoRAProTrainingArguments, **settings), adapted(kind, root / "base"))


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(kind: str) -> Path:
        return Path(shutil.copytree(root / kind, tmp_path / kind))

    return copy


def remove(folder: Path, *names: str) -> None:
    for name in names:
        for path in folder.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def change_rank(folder: Path) -> None:
    content = json.loads((folder / ADAPTER).read_text())
    (folder / ADAPTER).write_text(json.dumps({**content, "r": 3}))


def resumes(kind: str, root: Path, checkpoint: Path | bool, output: Path) -> bool:
    """Whether the trainer itself goes on from there."""
    trainer = trainer_of(kind, root, output)
    try:
        trainer.train(resume_from_checkpoint=checkpoint if checkpoint is True else str(checkpoint))
    except ValueError as error:
        if "cannot resume from" not in str(error):
            raise
        return False
    return True


def inspected(folder: Path) -> tuple[int, str, Report]:
    """Exit code, screen and report, as the command has them."""
    report = inspect_source(Request(str(folder)))
    return 0 if report.is_trainable else 1, " ".join(text(report).split()), report


def nothing(folder: Path) -> None:
    pass


CHECKPOINTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "complete": ("plain", nothing, "files complete"),
    "complete, one adapter with a name": ("named", nothing, "files complete"),
    "complete, two adapters": ("two", nothing, "files complete"),
    "save_only_model": ("plain", lambda f: remove(f, *OF_RESUME), "none: moments and schedule start anew"),
    "save_only_model, with a name": ("named", lambda f: remove(f, *OF_RESUME), "none: moments and schedule start anew"),
    "adapter only": ("plain", lambda f: remove(f, STATE, *OF_RESUME), "trainer_state.json is missing"),
    "adapter only, with a name": ("named", lambda f: remove(f, STATE, *OF_RESUME), "trainer_state.json is missing"),
    "no state": ("plain", lambda f: remove(f, STATE), "trainer_state.json is missing"),
    "no optimizer": ("plain", lambda f: remove(f, "optimizer.pt"), "optimizer.pt is missing"),
    "no schedule": ("two", lambda f: remove(f, "scheduler.pt"), "scheduler.pt is missing"),
    "no adapter": ("plain", lambda f: remove(f, WEIGHTS), f"{WEIGHTS} is missing"),
    "nothing": ("plain", lambda f: remove(f, "*"), "trainer_state.json is missing"),
    "adapter cut off": ("plain", lambda f: cut(f / WEIGHTS), f"{WEIGHTS} is cut off or damaged"),
    "named adapter cut off": ("named", lambda f: cut(f / "mine" / WEIGHTS), f"{WEIGHTS} is cut off or damaged"),
    "optimizer cut off": ("plain", lambda f: cut(f / "optimizer.pt"), "optimizer.pt is cut off or damaged"),
}


def grid(cases: dict[str, Any], fast: set[str]) -> list[Any]:
    return [pytest.param(case, marks=() if case in fast else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    "case",
    grid(
        CHECKPOINTS,
        {"complete, two adapters", "save_only_model, with a name", "no state", "named adapter cut off", "no adapter"},
    ),
)
def test_a_checkpoint_is_ready_where_the_trainer_resumes(
    case: str, root: Path, copied: Callable[[str], Path], tmp_path: Path
):
    kind, change, said = CHECKPOINTS[case]
    folder = copied(kind) / "checkpoint-1"
    change(folder)
    code, screen, report = inspected(folder)
    assert said in screen
    assert (code == 0) is report.is_trainable is resumes(kind, root, folder, tmp_path / "again")
    assert report.checkpoint is not None and not report.checkpoints
    assert report.checkpoint.flaw is None or code == 1
    if code == 0:
        assert [each.name for each in report.adapters] == ADAPTERS[kind]
        assert sum(group.count for group in report.pairs) == 4


WEIGHTS_ALONE = "only its weights, for a new training"


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda f: cut(f / "optimizer.pt"), WEIGHTS_ALONE),
        (lambda f: remove(f, STATE), WEIGHTS_ALONE),
        (lambda f: cut(f / WEIGHTS), "no, see below"),
        (lambda f: remove(f, WEIGHTS), "no, see below"),
        (change_rank, "no, see below"),
    ],
    ids=["optimizer cut off", "no state", "adapter cut off", "no adapter", "another rank"],
)
def test_a_damaged_checkpoint_tells_the_ways_on(
    change: Callable[[Path], None], verdict: str, copied: Callable[[str], Path]
):
    folder = copied("plain") / "checkpoint-2"
    change(folder)
    code, screen, _ = inspected(folder)
    assert code == 1 and f"ready for LoRA-Pro {verdict}" in screen
    assert ("is_trainable=True" in screen) is (verdict == WEIGHTS_ALONE)
    beside = folder.with_name("checkpoint-1")
    assert (f"The newest complete checkpoint beside it is {beside}" in screen) is (change is not change_rank)
    if verdict == WEIGHTS_ALONE:
        PeftModel.from_pretrained(tiny_base(), folder, is_trainable=True)
    remove(beside, STATE)
    _, screen, _ = inspected(folder)
    assert "There is no complete checkpoint beside it" in screen or change is change_rank


def test_an_adapter_that_does_not_fit_its_settings_is_refused_as_by_resume(copied: Callable[[str], Path]):
    folder = copied("plain") / "checkpoint-1"
    change_rank(folder)
    code, screen, _ = inspected(folder)
    assert code == 1 and "another model or rank" in screen


@pytest.mark.parametrize(
    ("engine", "missing"),
    [(ZERO2, ()), (SHARDED, (ADAPTER, WEIGHTS)), (FULL, (STATE,)), (ZERO3, ("latest",)), (SHARDED, ("scheduler.pt",))],
)
def test_checkpoints_of_engines(engine: str, missing: tuple[str, ...], root: Path, tmp_path: Path):
    folder = written(engine, root / "plain" / "checkpoint-2", tmp_path / "checkpoint-2")
    remove(folder, *missing)
    code, screen, report = inspected(folder)
    assert (code == 0) is (missing in [(), (ADAPTER, WEIGHTS)]) is (find_flaw(folder) is None)
    assert code == 0 or f"{missing[0]} is missing" in screen
    assert "FSDP or DeepSpeed (not read)" in screen and bool(report.pairs) is (ADAPTER not in missing)
    assert report.pairs or "The files of FSDP or DeepSpeed hold the adapter" in screen


def test_what_a_checkpoint_holds(root: Path):
    code, screen, report = inspected(root / "plain" / "checkpoint-1")
    assert code == 0 and "step 1 of 2" in screen and "mode factored" in screen
    found = report.checkpoint
    assert found is not None and (found.step, found.max_steps, found.processes) == (1, 2, 1)
    assert found.optimizer == "LoRA-Pro" and found.settings["mode"] == "factored"
    assert found.stepped_tensors == 2 * sum(group.count for group in report.pairs)
    assert report.settings is not None and report.settings["mode"] == "factored"


def test_settings_of_the_mode_are_shown_and_those_of_others_are_not(root: Path, tmp_path: Path):
    settings = {"max_steps": 1, "save_strategy": "steps", "lora_pro_mode": "rite", "lora_pro_rite_escape": True}
    args = arguments(tmp_path, LoRAProTrainingArguments, **settings)
    build(LoRAProTrainer, args, adapted("plain", root / "base")).train()
    code, screen, report = inspected(tmp_path / "checkpoint-1")
    line = "LoRA-Pro, mode rite, update=linear, trust_region=0.0, rite_escape=True,"
    assert code == 0 and line in " ".join(screen.split())
    assert report.settings is not None and {"rite_escape", "rite_clip", "update"} <= report.settings.keys()
    assert "spectral_iterations" not in report.settings


def test_a_checkpoint_of_another_optimizer(copied: Callable[[str], Path]):
    folder = copied("plain") / "checkpoint-1"
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], lr=3e-4)
    weight.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    found = inspect_source(Request(str(folder))).checkpoint
    assert found is not None and found.optimizer == "another optimizer" and found.settings == {"learning_rate": 3e-4}


def test_json_of_a_checkpoint_in_part(copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]):
    folder = copied("plain") / "checkpoint-1"
    remove(folder, STATE)
    assert cli.main(["inspect", str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert "written last" in found["checkpoint"]["flaw"] and not found["is_trainable"]


# Output folders

GOES_ON = "resume_from_checkpoint=True goes on from checkpoint-2, the newest"
PASSES_OVER = (
    "resume_from_checkpoint=True passes over checkpoint-2 and goes on from checkpoint-1, the newest complete one"
)
REFUSED = "resume_from_checkpoint=True is refused, since none of them is complete: start again"
STARTS_ANEW = "resume_from_checkpoint=True starts the training anew, since no save was finished"
SAVED_AT_END = (ADAPTER, WEIGHTS, "mine", "training_args.bin", STATE)
OUTPUTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "finished": ("plain", nothing, GOES_ON),
    "finished, one adapter with a name": ("named", nothing, GOES_ON),
    "finished, two adapters": ("two", nothing, GOES_ON),
    "finished, no state": ("plain", lambda f: remove(f, STATE), GOES_ON),
    "stopped": ("plain", lambda f: remove(f, *SAVED_AT_END), GOES_ON),
    "stopped, with a name": ("named", lambda f: remove(f, *SAVED_AT_END), GOES_ON),
    "older one unfinished": ("plain", lambda f: remove(f, f"checkpoint-1/{STATE}"), GOES_ON),
    "newest unfinished": ("plain", lambda f: remove(f, f"checkpoint-2/{STATE}"), PASSES_OVER),
    "stopped while saving": (
        "plain",
        lambda f: remove(f, *SAVED_AT_END, f"checkpoint-2/{STATE}", "checkpoint-2/optimizer.pt"),
        PASSES_OVER,
    ),
    "none complete": ("plain", lambda f: remove(f, *SAVED_AT_END, "*/optimizer.pt"), REFUSED),
    "none complete, trained to the end": ("plain", lambda f: remove(f, "*/optimizer.pt"), REFUSED),
    "none finished": ("plain", lambda f: remove(f, *SAVED_AT_END, f"*/{STATE}"), STARTS_ANEW),
}


@pytest.mark.parametrize(
    "case", grid(OUTPUTS, {"finished, two adapters", "stopped, with a name", "newest unfinished", "none finished"})
)
def test_an_output_folder_says_which_checkpoints_it_holds(case: str, root: Path, copied: Callable[[str], Path]):
    kind, change, said = OUTPUTS[case]
    folder = copied(kind)
    change(folder)
    code, screen, report = inspected(folder)
    assert said in screen
    assert [Path(each.folder).name for each in report.checkpoints] == ["checkpoint-2", "checkpoint-1"]
    assert [each.flaw for each in report.checkpoints] == [find_flaw(Path(each.folder)) for each in report.checkpoints]
    assert report.checkpoint is None and report.source == str(folder)
    if any(each.flaw is None for each in report.checkpoints):
        assert [each.name for each in report.adapters] == ADAPTERS[kind]
    if case.startswith("stopped"):
        assert f"this is checkpoint-{1 if said == PASSES_OVER else 2}." in screen
    assert (code == 0 or said == STARTS_ANEW) is resumes(kind, root, True, folder)


def test_a_finished_training_without_checkpoints(copied: Callable[[str], Path]):
    folder = copied("named")
    remove(folder, "checkpoint-*")
    code, _, report = inspected(folder)
    assert code == 0 and [each.name for each in report.adapters] == ["mine"]


def test_trainings_inside_a_training_are_not_its_adapters(copied: Callable[[str], Path]):
    folder = copied("plain")
    copied("two").rename(folder / "second")
    assert [each.name for each in inspect_source(Request(str(folder))).adapters] == ["default"]


def test_a_folder_of_trainings(root: Path):
    with pytest.raises(UsageError) as raised:
        inspect_source(Request(str(root)))
    assert str(raised.value).endswith(
        f"Did you mean {', '.join(str(root / name) for name in ('base', *sorted(ADAPTERS)))}?"
    )


def test_what_peft_saves_by_itself(root: Path, tmp_path: Path):
    for kind, names in ADAPTERS.items():
        adapted(kind, root / "base").save_pretrained(tmp_path / kind)
        if kind != "named":
            code, _, report = inspected(tmp_path / kind)
            assert code == 0 and [each.name for each in report.adapters] == names
            assert report.checkpoint is None and not report.checkpoints and not report.notes
    with pytest.raises(UsageError, match=r"Did you mean .*named/mine\?"):
        inspect_source(Request(str(tmp_path / "named")))


def test_checkpoints_are_told_without_the_base_model(copied: Callable[[str], Path]):
    folder = copied("named")
    for file in folder.glob(f"**/mine/{ADAPTER}"):
        settings: dict[str, Any] = json.loads(file.read_text())
        file.write_text(json.dumps({**settings, "base_model_name_or_path": "./gone"}))
    code, screen, report = inspected(folder)
    assert code == 1 and "needs its base model" in screen and "goes on from checkpoint" in screen
    assert len(report.checkpoints) == 2
    code, screen, report = inspected(folder / "checkpoint-1")
    assert code == 1 and "needs its base model" in screen and "step 1 of 2" in screen


def test_an_adapter_without_weights_is_not_ready(
    copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("plain")
    remove(folder, "checkpoint-*", STATE, "training_args.bin")
    assert cli.main(["inspect", str(folder)]) == 0
    remove(folder, WEIGHTS)
    capsys.readouterr()
    assert cli.main(["inspect", str(folder)]) == 1
    assert f"PEFT cannot load {folder}, which has no weights" in " ".join(capsys.readouterr().out.split())
    (folder / "adapter_model.bin").touch()  # which is not looked into
    assert cli.main(["inspect", str(folder)]) == 0
