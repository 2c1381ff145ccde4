"""A training that is killed at any moment goes on from its last checkpoint and ends where it would have ended."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel

from grids import rest_slow
from killable import Nursery
from killable_jobs import SAVED_EVERY, STEPS, trainer_of
from lorapro_hf import LoRAProConfig, LoRAProTrainer, LoRAProTrainingArguments
from lorapro_hf.checkpoints.manifest import MANIFEST, read_manifest
from lorapro_hf.checkpoints.resume import find_flaw
from lorapro_hf.optim.rules import rule_of
from trainer_helpers import arguments, assert_same, build, differ, factors, run, tiny_base, tiny_lora

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"lora_pro_mode": "full"},
    "full_8bit": {"lora_pro_mode": "full_8bit"},
    "factored": {"lora_pro_mode": "factored"},
    "spectral": {"lora_pro_mode": "spectral"},
    "rite": {"lora_pro_mode": "rite", "max_grad_norm": 0.0, "lora_pro_rite_clip": 0.1, "lora_pro_rite_escape": True},
    "efficient": {"lora_pro_mode": "efficient"},
    "bfloat16": {"lora_pro_mode": "full", "lora_pro_moments_dtype": "bfloat16"},
    "masters": {"lora_pro_mode": "full", "lora_pro_master_factors": True},  # of factors in bfloat16
}
DEFAULT_MODE = LoRAProConfig().mode
DEFAULT: dict[int, tuple[str, ...]] = {1: (), 2: ("full",)}
RANKS = pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
distributed = pytest.mark.distributed
FILES = ["optimizer.pt", "adapter_model.safetensors", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
IS_OLD = Version(transformers.__version__) < Version("5")


def assert_equal_ends(found: list[dict[str, Any]], expected: list[dict[str, Any]], bitwise: bool = True) -> None:
    tolerance = {} if bitwise else {"rtol": 1e-6, "atol": 1e-6}
    for one in found:
        other = expected[0]
        assert_same(one["parameters"], other["parameters"], **tolerance)
    assert_same(found[0]["state"], expected[0]["state"], **tolerance)
    if bitwise:
        assert json.loads(found[0]["history"]) == json.loads(expected[0]["history"])


# ---- with a group of one's own ----


class WithNormApart(LoRAProTrainer):
    """Trains the last norm at a rate of its own."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            norm = self.model.base_model.model.model.norm.modules_to_save["default"].weight.requires_grad_(False)
            super().create_optimizer(*args, **kwargs)
            self.optimizer.add_param_group({"params": [norm.requires_grad_()], "lr": 0.1})
        return self.optimizer


def test_a_group_added_without_names_resumes_to_the_bit(tmp_path: Path):
    def train(**settings: Any) -> LoRAProTrainer:
        args = arguments(tmp_path, LoRAProTrainingArguments, save_strategy="steps", save_steps=4)
        trainer = build(WithNormApart, args, model=tiny_lora(modules_to_save=["norm"]))
        trainer.train(**settings)
        return trainer

    whole = train()
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert saved["param_groups"][-1]["param_names"] == ["param_group_2.0"]
    norm = {name: value for name, value in factors(whole).items() if ".model.norm." in name}
    assert differ(norm, {name: torch.ones(32) for name in norm})
    assert_same(factors(whole), factors(train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))))


# ---- killed ----


def files_written_by(ranks: int) -> dict[str, tuple[str, int]]:
    """For each mode a file during whose writing the training is killed, and the rank that writes it."""
    last = ranks - 1
    return {
        "full": ("optimizer.pt", 0),
        "full_8bit": ("adapter_model.safetensors", 0),
        "factored": ("trainer_state.json", 0),
        "spectral": ("optimizer.pt", 0),
        "rite": ("optimizer.pt", 0),
        "efficient": ("scheduler.pt", 0),
        "masters": ("optimizer.pt", 0),
        "bfloat16": (f"rng_state_{last}.pth" if last else "rng_state.pth", last),
    }


@distributed
@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param(name, ranks, marks=() if name in DEFAULT[ranks] else pytest.mark.slow)
        for name in SETTINGS
        for ranks in (1, 2)
    ],
)
def test_killed_again_and_again_it_ends_to_the_bit_where_it_would_have(
    nursery: Nursery, tmp_path: Path, name: str, ranks: int
):
    job = {"ranks": ranks, "settings": SETTINGS[name], "dtype": "bfloat16" if name == "masters" else "float32"}
    expected = nursery.finish(tmp_path / "whole", **job)
    assert len(json.loads(expected[0]["history"])) == STEPS
    logs = [(tmp_path / "whole" / f"log-{rank}").read_text() for rank in range(ranks)]
    assert [log.count("LoRA-Pro: 1") for log in logs] == [1, *[0] * (ranks - 1)]  # seen with no logging set up
    folder = tmp_path / "killed"
    first, second = folder / "checkpoint-3", folder / "checkpoint-6"

    # with a step half done: the pairs have been stepped, and with two ranks one has not told the other
    kill = {"when": "publish" if ranks > 1 else "gradients", "step": 5}
    assert nursery.run(folder, kill=kill, **job)[0] == -9
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]

    # in the middle of a checkpoint
    file, rank = files_written_by(ranks)[name]
    kill = {"when": file, "step": 6, "rank": rank}
    assert nursery.run(folder, kill=kill, resume=True, **job)[rank] == -9
    assert (second / file).is_file()
    trainer = trainer_of({**job, "ranks": 1, "folder": str(folder)})
    before = factors(trainer)
    with pytest.raises(ValueError, match=f"cannot resume from {second}: trainer_state.json") as caught:
        trainer.train(resume_from_checkpoint=str(second))
    assert f"Set resume_from_checkpoint to {first}, the newest" in str(caught.value)
    assert_same(before, factors(trainer))

    # after the checkpoint, which is written anew over what was left of it
    kill = {"when": "step_end", "step": 7, "rank": rank}
    assert nursery.run(folder, kill=kill, resume=True, **job)[rank] == -9
    logs = [(folder / f"log-{each}").read_text() for each in range(ranks)]
    assert [log.count(f"{second} is passed over") for log in logs] == [1, *[0] * (ranks - 1)]
    found = read_manifest(second)
    assert found is not None and found.processes == ranks and find_flaw(second) is None
    assert_equal_ends(nursery.finish(folder, resume=True, **job), expected)


@distributed
@pytest.mark.slow
def test_killed_at_random_moments(nursery: Nursery, tmp_path: Path):
    job = {"settings": {**SETTINGS["full"], "save_steps": 1}}
    expected = nursery.finish(tmp_path / "whole", **job)
    folder, moments, kills = tmp_path / "killed", random.Random(3), 0
    for attempt in range(12):
        resume = any(find_flaw(path) is None for path in folder.glob("checkpoint-*"))
        after = moments.uniform(0.2, 0.8) if attempt else 0.0  # at first before it can end, however fast it is
        after = after if attempt < 11 else None
        (code,) = nursery.run(folder, resume=resume, kill_after=after, **job)
        assert code in (0, -9), (folder / "log-0").read_text()[-3000:]
        kills += code == -9
        if code == 0:
            break
    assert kills
    assert_equal_ends([torch.load(folder / "result-0.pt", weights_only=True)], expected)


@distributed
@pytest.mark.skipif(IS_OLD, reason="transformers 4 goes on with the checkpoint's batch size for each process")
@pytest.mark.parametrize(
    "name", ["full", *(pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS if n not in ("full", "masters"))]
)
def test_a_checkpoint_of_two_ranks_goes_on_as_one_and_the_reverse(nursery: Nursery, tmp_path: Path, name: str):
    # in float64 and without dropout, since the ranks' sums round otherwise and their random numbers differ
    job = {"settings": SETTINGS[name], "dtype": "float64", "dropout": 0.0}
    ends = [nursery.finish(tmp_path / str(ranks), ranks=ranks, **job) for ranks in (1, 2)]
    assert_equal_ends(ends[1], ends[0], bitwise=False)
    for written, resumed in ((1, 2), (2, 1)):
        folder = tmp_path / f"{written} to {resumed}"
        shutil.copytree(tmp_path / str(written) / "checkpoint-3", folder / "checkpoint-3")
        found = nursery.finish(folder, ranks=resumed, resume=True, **job)
        assert_equal_ends(found, ends[0], bitwise=False)


@distributed
def test_ranks_agree_on_what_they_take_and_refuse(nursery: Nursery, tmp_path: Path):
    """None of them goes on alone, where it would wait for the others for ever."""
    job = {"ranks": 2, "settings": {"lora_pro_mode": "efficient", "max_steps": 6}}
    nursery.finish(tmp_path, **job)
    first, second = tmp_path / "checkpoint-3", tmp_path / "checkpoint-6"
    one = shutil.copytree(first, tmp_path / "of one rank")
    (one / "rng_state_1.pth").unlink()
    mixed = shutil.copytree(first, tmp_path / "mixed")
    shutil.copy(second / "optimizer.pt", mixed)
    listed = read_manifest(second)
    (second / "trainer_state.json").unlink()
    cases = {"newest": True, "mixed": str(mixed), "random state": str(one), "rank 1 alone": str(first)}
    found = nursery.finish(tmp_path, do="examine", cases=cases, **job)
    assert found[0] == found[1]
    assert listed is not None and listed.processes == 2
    assert found[0].pop("newest") == str(first)
    for name, said in {
        "mixed": f"{mixed}: optimizer.pt is of another save or damaged",
        "random state": f"{one}: rng_state_1.pth is missing",
    }.items():
        assert found[0].pop(name).startswith(f"refused: cannot resume from {said}")
    assert found[0] == {"rank 1 alone": "refused: rank 1 has found something"}


# ---- whoever saves ----


@distributed
@RANKS
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("factory", marks=pytest.mark.skipif(IS_OLD, reason="transformers 4 knows no optimizer factories")),
        pytest.param("callback", marks=() if IS_OLD else pytest.mark.slow),
    ],
)
def test_plain_trainers_resume_to_the_bit(nursery: Nursery, tmp_path: Path, kind: str, ranks: int):
    job = {"kind": kind, "ranks": ranks}
    expected = nursery.finish(tmp_path, **job)
    found = nursery.finish(tmp_path, resume=str(tmp_path / "checkpoint-3"), **job)
    assert_equal_ends(found, expected)
    if kind == "factory":  # only rank 0 is asked for the state, so that each keeps all of it
        head = 2 * expected[0]["parameters"]["base_model.model.lm_head.modules_to_save.default.weight"].numel() + 1
        whole = sum(tensor.numel() for tensor in expected[0]["state"].values()) - head
        assert [one["own"] for one in expected] == [whole] * ranks


@distributed
@RANKS
def test_loops_with_accelerate_resume_to_the_bit(nursery: Nursery, tmp_path: Path, ranks: int):
    configs = {
        f"{mode} {shared}": {"mode": mode, "shard_states": shared}
        for mode in ("full", "factored")
        for shared in ((None, True, False) if ranks > 1 else (None,))  # which one process does not share
    }
    for found in nursery.finish(tmp_path, do="loops", configs=configs, ranks=ranks):
        assert len(found) == 2 * len(configs) and all(found.values()), found


def test_saved_model_and_state(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """An adapter for anyone; a training that goes on from it says that it has no moments."""
    trainer = run(tmp_path, max_steps=3)
    trainer.save_model()
    trainer.save_state()
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path, is_trainable=True)
    own = {name: p.detach() for name, p in loaded.named_parameters() if p.requires_grad}
    assert_same(own, factors(trainer))
    again = fresh(tmp_path, lora_pro_mode="full")
    caplog.clear()
    with caplog.at_level("INFO", "lorapro_hf"):
        again.train(resume_from_checkpoint=str(tmp_path))
    warning, announcement = (each.getMessage() for each in caplog.records if each.name.startswith("lorapro_hf"))
    assert "holds no optimizer state" in warning and announcement.startswith("LoRA-Pro: 14 pairs")
    assert differ(factors(again), factors(trainer))


def test_a_training_of_an_earlier_version_goes_on_as_it_began(tmp_path: Path):
    """Its checkpoints do not hold the settings that were left open; the limit of then is gone."""
    settings = {"lora_pro_mode": "full", "lora_pro_trust_region": 0}
    whole = fresh(tmp_path, **settings)
    whole.train()
    folder = tmp_path / "checkpoint-3"
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    for group in state["param_groups"]:
        del group["trust_region"], group["trust_region_of"], group["update"]
    torch.save(state, folder / "optimizer.pt")
    (folder / MANIFEST).unlink()
    stated: dict[str, Any] = {}
    for name, value in settings.items():
        config, short = LoRAProConfig(mode=stated.get("lora_pro_mode", LoRAProConfig().mode)), name[len("lora_pro_") :]
        if {"mode": config.mode, **rule_of(config).in_force}[short] != value:
            with pytest.raises(ValueError, match=rf"{short}={value!r} \(--{name}"):
                fresh(tmp_path, **stated).train(resume_from_checkpoint=str(folder))
            stated[name] = value
    again = fresh(tmp_path, **stated)
    again.train(resume_from_checkpoint=str(folder))
    assert_same(factors(again), factors(whole))


# ---- damaged and foreign ----


def fresh(folder: Path, model: Any = None, **settings: Any) -> Any:
    settings = {"save_strategy": "steps", "save_steps": SAVED_EVERY, **settings}
    return build(LoRAProTrainer, arguments(folder, LoRAProTrainingArguments, **settings), model=model)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with the checkpoints 3 and 6, and where the training has ended."""
    folder = tmp_path_factory.mktemp("complete")
    trainer = fresh(folder)
    trainer.train()
    return folder, factors(trainer)


def cut(file: Path, keep: float = 0.5) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])


@pytest.mark.parametrize("keep", rest_slow([0.5, 0.0, 0.99]))
@pytest.mark.parametrize("name", rest_slow(FILES, fast=2))
def test_a_file_cut_off_is_named_and_nothing_loaded(
    complete: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, name: str, keep: float
):
    folder = tmp_path / "copy"
    shutil.copytree(complete[0], folder)
    cut(folder / "checkpoint-6" / name, keep)
    trainer = fresh(folder)
    before = factors(trainer)
    with pytest.raises(
        ValueError, match=rf"checkpoint-6: {name} is cut off or damaged \(.*checkpoint-3, the newest"
    ) as caught:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert str(folder / "checkpoint-3") in str(caught.value)
    assert_same(before, factors(trainer))
    if keep == 0.5:  # the same trainer goes on from the one that it has named
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        assert_same(factors(trainer), complete[1])


@pytest.mark.parametrize("name", rest_slow(FILES))
def test_a_missing_file_is_named(complete: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, name: str):
    shutil.copytree(complete[0], tmp_path / "copy")
    for step in (3, 6):
        (tmp_path / "copy" / f"checkpoint-{step}" / name).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-6: {name} is missing.*start the training again"):
        fresh(tmp_path / "copy").train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-6"))


def test_a_folder_that_is_not_there_is_named(complete: tuple[Path, dict[str, torch.Tensor]]):
    with pytest.raises(
        ValueError, match=r"checkpoint-9: there is no such folder.*checkpoint-6, the newest complete checkpoint\.$"
    ):
        fresh(complete[0]).train(resume_from_checkpoint=str(complete[0] / "checkpoint-9"))


class Dangerous:
    """Would be called if it were unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("content", rest_slow([Dangerous(), {"weights": torch.ones(2)}, [1, 2]]))
def test_a_file_with_something_else_is_named(
    complete: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, content: Any
):
    shutil.copytree(complete[0], tmp_path / "copy")
    torch.save(content, tmp_path / "copy" / "checkpoint-6" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer.pt is cut off or damaged.*checkpoint-3, the newest complete"):
        fresh(tmp_path / "copy").train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-6"))


@pytest.mark.parametrize(
    ("settings", "adapter", "message"),
    [
        ({"lora_pro_mode": "efficient"}, {}, rf"checkpoint-6/optimizer.pt: .*'{DEFAULT_MODE}'.* mode 'efficient'"),
        ({}, {"r": 2}, r"checkpoint-6/adapter_model.safetensors: .* has shape \[4, \d+\].* has shape \[2, \d+\]"),
        (
            {},
            {"target_modules": ["q_proj"]},
            r"adapter_model.safetensors: .*lora_A.weight has .* is missing in the model",
        ),
        (
            {},
            {"modules_to_save": ["lm_head"]},
            r"checkpoint-6/adapter_model.safetensors: .*lm_head.* is missing in the",
        ),
    ],
)
def test_a_checkpoint_of_another_training_changes_nothing(
    complete: tuple[Path, dict[str, torch.Tensor]], settings: dict, adapter: dict, message: str
):
    trainer = fresh(complete[0], model=tiny_lora(**adapter), **settings)
    before = factors(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert_same(before, factors(trainer))
    assert trainer.optimizer is None


def test_without_lora_pro_the_parent_decides(complete: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path):
    shutil.copytree(complete[0], tmp_path / "copy")
    (tmp_path / "copy" / "checkpoint-6" / "optimizer.pt").unlink()
    fresh(tmp_path / "copy", lora_pro=False).train(resume_from_checkpoint=True)


def test_an_older_checkpoint_in_the_same_place_is_no_longer_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is left of it when the new one is cut short must not be taken for one checkpoint."""
    fresh(tmp_path).train()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    trainer = fresh(tmp_path, learning_rate=1e-3)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert "was not finished" in str(find_flaw(tmp_path / "checkpoint-3"))
    assert find_flaw(tmp_path / "checkpoint-6") is None
