"""A checkpoint that is not of one save is refused, and where nothing was asked for by name an older one is taken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, SequentialLR

from grids import rest_slow
from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
from lorapro_hf.checkpoints import manifest
from lorapro_hf.checkpoints.manifest import MANIFEST, read_manifest, write_manifest
from lorapro_hf.checkpoints.resume import checkpoints_in, find_flaw
from lorapro_hf.trainer import checkpointing
from lorapro_hf.trainer.hub_mixin import HubMixin
from trainer_helpers import arguments, assert_same, build, factors

ADAPTER, OPTIMIZER, SCHEDULER, STATE = "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"
RNG = "rng_state.pth"
CHANGED = "is of another save or damaged"


def fresh(folder: Path, **settings: Any) -> Any:
    settings = {"save_strategy": "steps", "save_steps": 2, "lora_pro_mode": "efficient", **settings}
    return build(LoRAProTrainer, arguments(folder, LoRAProTrainingArguments, **settings))


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with the checkpoints 2, 4 and 6, and where the training has ended."""
    folder = tmp_path_factory.mktemp("complete")
    trainer = fresh(folder)
    trainer.train()
    return folder, factors(trainer)


@pytest.fixture
def copy(complete: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Path:
    """A copy of the folder."""
    return Path(shutil.copytree(complete[0], tmp_path / "copy"))


def older(folder: Path) -> Path:
    """The checkpoint as older versions have written it."""
    (folder / MANIFEST).unlink()
    return folder


def mix(copy: Path, *names: str, into: int = 4, of: int = 6) -> Path:
    for name in names:
        shutil.copy(copy / f"checkpoint-{of}" / name, copy / f"checkpoint-{into}" / name)
    return copy / f"checkpoint-{into}"


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the content of a file of torch's, in a checkpoint that is then one of an older version."""
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)
    return older(file.parent)


# Refused by the manifest


@pytest.mark.parametrize("name", rest_slow([ADAPTER, OPTIMIZER, SCHEDULER, STATE, RNG]))
def test_a_file_of_another_save_is_named_and_nothing_loaded(copy: Path, name: str) -> None:
    folder = mix(copy, name)
    trainer = fresh(copy)
    before = factors(trainer)
    with pytest.raises(
        ValueError,
        match=rf"cannot resume from {folder}: {name} {CHANGED}.*Set resume_from_checkpoint to .*-6, the newest",
    ):
        trainer.train(resume_from_checkpoint=str(folder))
    assert_same(before, factors(trainer))


def test_zeros_and_a_flipped_bit_are_found(copy: Path) -> None:
    for step, change in ((4, lambda half: bytes(len(half))), (6, lambda half: bytes([half[0] ^ 1]) + half[1:])):
        file = copy / f"checkpoint-{step}" / ADAPTER
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes(content[:middle] + change(content[middle:]))
        assert f"{ADAPTER} {CHANGED} (its checksum" in str(find_flaw(file.parent))


def test_the_random_state_of_the_last_rank_is_missed(copy: Path) -> None:
    folder = copy / "checkpoint-4"
    for rank in (0, 1):
        shutil.copy(folder / RNG, folder / f"rng_state_{rank}.pth")
    (folder / RNG).unlink()
    write_manifest(folder, 4, 2)
    assert find_flaw(folder) is None
    (folder / "rng_state_1.pth").unlink()
    assert str(find_flaw(folder)).startswith("rng_state_1.pth is missing: copy it anew")


def test_a_manifest_that_is_damaged_is_named(copy: Path) -> None:
    (copy / "checkpoint-4" / MANIFEST).write_text("{")
    assert f"{MANIFEST} is damaged (it is cut off, or was never JSON)" in str(find_flaw(copy / "checkpoint-4"))


def test_the_manifest_says_who_wrote_the_checkpoint(complete: tuple[Path, Any]) -> None:
    found = read_manifest(complete[0] / "checkpoint-4")
    assert found is not None and (found.global_step, found.processes) == (4, 1)
    assert {ADAPTER, OPTIMIZER, SCHEDULER, STATE, RNG} == set(found.files)


def test_a_folder_under_the_name_of_another_step_is_refused(copy: Path) -> None:
    shutil.copytree(copy / "checkpoint-4", copy / "best")
    assert find_flaw(copy / "best") is None
    folder = (copy / "checkpoint-4").rename(copy / "checkpoint-7")
    said = "it is of step 4, although the folder is named checkpoint-7: rename it to checkpoint-4"
    assert find_flaw(folder) == said
    with pytest.raises(ValueError, match=rf"cannot resume from {folder}: {said}\."):
        fresh(copy).train(resume_from_checkpoint=str(folder))


def test_files_that_cannot_be_read_are_a_flaw(copy: Path) -> None:
    (copy / "checkpoint-4" / OPTIMIZER).unlink()
    (copy / "checkpoint-4" / OPTIMIZER).mkdir()
    assert find_flaw(copy / "checkpoint-4") == f"{OPTIMIZER} cannot be read (Is a directory)"


def test_where_state_is_missing_it_is_said_how_to_go_on_from_the_weights(copy: Path) -> None:
    folder = copy / "checkpoint-4"
    left = [OPTIMIZER, RNG, SCHEDULER, MANIFEST]
    for name in (OPTIMIZER, SCHEDULER, RNG):
        (folder / name).unlink()
        left.remove(name)
        said = f" is missing: copy it anew, or delete {', '.join(sorted(left))} to go on from the weights alone"
        assert str(find_flaw(folder)) == OPTIMIZER + said
    assert find_flaw(older(folder)) is None


def test_state_that_is_added_to_weights_alone_is_of_another_save(copy: Path) -> None:
    folder = copy / "checkpoint-4"
    for name in (OPTIMIZER, SCHEDULER, RNG):
        (folder / name).unlink()
    write_manifest(folder, 4, 1)
    assert find_flaw(folder) is None
    mix(copy, OPTIMIZER, SCHEDULER, RNG)
    assert find_flaw(folder) == f"{OPTIMIZER} is of another save (it is not listed in {MANIFEST})"


# Refused by the counts of steps, where an older version has written no manifest


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((OPTIMIZER,), f"{OPTIMIZER} counts 6 steps and {SCHEDULER} 4, so that they are of two saves"),
        ((SCHEDULER,), f"{OPTIMIZER} counts 4 steps and {SCHEDULER} 6, so that they are of two saves"),
        ((OPTIMIZER, SCHEDULER), f"{OPTIMIZER} counts 6 steps and {STATE} 4, so that they are of two saves"),
        ((STATE,), f"{STATE} is of step 6, although the folder is named checkpoint-4"),
    ],
)
def test_counts_of_steps_tell_saves_apart(copy: Path, names: tuple[str, ...], said: str) -> None:
    assert find_flaw(older(mix(copy, *names))) == said


def test_an_older_checkpoint_is_accepted_and_that_is_said_once(
    complete: tuple[Path, dict[str, torch.Tensor]], copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, trainer = older(copy / "checkpoint-4"), fresh(copy)
    trainer.train(resume_from_checkpoint=str(folder))
    assert_same(factors(trainer), complete[1])
    said = [each.getMessage() for each in caplog.records if MANIFEST in each.getMessage()]
    assert said == [
        f"{folder} has no {MANIFEST}, which ends a save and lists its files: a plain Trainer or an earlier version "
        "has written it, or the save was cut short just before. Only the kinds of the files "
        "and counts of steps were compared."
    ]


def test_a_training_that_started_from_weights_alone_goes_on(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (OPTIMIZER, SCHEDULER, RNG):
        (copy / "checkpoint-4" / name).unlink()
    fresh(copy, lr_scheduler_type="constant").train(resume_from_checkpoint=str(older(copy / "checkpoint-4")))
    again = fresh(copy, max_steps=8)
    caplog.clear()
    again.train(resume_from_checkpoint=str(older(copy / "checkpoint-6")))
    assert again.state.global_step == 8
    assert "its optimizer and schedule count 2 of 6 steps, as after a start from weights alone." in caplog.text


def skip(content: dict[str, Any], steps: int) -> None:
    content["param_groups"][0]["skipped_steps"] = steps
    for state in content["state"].values():
        state["step"] = state["step"] - steps


def empty(content: dict[str, Any]) -> None:
    content["state"].clear()


def in_turns(content: dict[str, Any]) -> None:
    for state in content["state"].values():
        state["step"] = state["step"] - 2
    for group in content["param_groups"]:
        group["param_names"] = [
            name.replace("default", "default" if place % 4 < 2 else "other")
            for place, name in enumerate(group["param_names"])
        ]


def unevenly(content: dict[str, Any]) -> None:
    for place, state in enumerate(content["state"].values()):
        state["step"] = state["step"] - 1 - place % 2


def half_untrained(content: dict[str, Any]) -> None:
    for key in list(content["state"])[::2]:
        content["state"].pop(key)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: skip(content, 3), None),
        (lambda content: skip(content, 4), None),
        (lambda content: (skip(content, 4), empty(content)), None),
        (empty, f"{OPTIMIZER} holds no moments, although 4 steps were taken"),
        (in_turns, None),
        (unevenly, None),
        (half_untrained, None),
        (
            lambda content: [state.update(step=torch.tensor(float("nan"))) for state in content["state"].values()],
            f"{OPTIMIZER} is damaged (a count of its steps is no number, or a name of its parameters no text)",
        ),
        (
            lambda content: content["state"][0].update(step=torch.ones(2)),
            f"{OPTIMIZER} is damaged (a count of its steps is no number, or a name of its parameters no text)",
        ),
        (
            lambda content: content["state"][0].update(step=10**400),
            f"{OPTIMIZER} is damaged (a count of its steps is no number, or a name of its parameters no text)",
        ),
        (
            lambda content: content["param_groups"][0].update(param_names=[3]),
            f"{OPTIMIZER} is damaged (a count of its steps is no number, or a name of its parameters no text)",
        ),
        (
            lambda content: content["state"].update({0: 3}),
            f"{OPTIMIZER} is cut off or damaged (it holds no state of an optimizer)",
        ),
    ],
)
def test_what_the_optimizer_counts(copy: Path, change: Callable[[dict[str, Any]], Any], said: str | None) -> None:
    found = find_flaw(edit(copy / "checkpoint-4" / OPTIMIZER, change))
    assert found == said


def test_steps_that_a_gradient_scaler_skips_are_seen_by_nobody_else(copy: Path) -> None:
    folder = mix(copy, OPTIMIZER, SCHEDULER, into=6, of=4)
    torch.save({"scale": 1.0}, folder / "scaler.pt")
    assert find_flaw(older(folder)) is None


SCHEDULES: dict[str, Callable[[Any], LRScheduler]] = {
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer),
    "sequential": lambda optimizer: SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)],
        [1],
    ),
    "restarts": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_counts_in_its_own_way_is_not_judged(copy: Path, name: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = SCHEDULES[name](optimizer)
    optimizer.step()
    schedule.step(*([1.0] if name == "plateau" else []))
    folder = copy / "checkpoint-4"
    torch.save(schedule.state_dict(), folder / SCHEDULER)
    assert find_flaw(older(folder)) is None


@pytest.mark.parametrize(
    ("ranks", "missing"),
    [
        ((0, 1, 2), None),
        ((0, 2), "rng_state_1.pth"),
        ((8, 9), None),  # those of a second node
        ((8, 10), "rng_state_9.pth"),
        ((0, 999_999_999_999), "rng_state_1.pth"),
        ((), "rng_state.pth"),
    ],
)
def test_a_gap_among_the_random_states_is_a_flaw(copy: Path, ranks: tuple[int, ...], missing: str | None) -> None:
    folder = older(copy / "checkpoint-4")
    for rank in ranks:
        shutil.copy(folder / RNG, folder / f"rng_state_{rank}.pth")
    (folder / RNG).unlink()
    assert (find_flaw(folder) or "").split(":")[0] == ("" if missing is None else f"{missing} is missing")


# Where no folder is named


def test_the_newest_complete_one_is_taken_with_a_warning(
    complete: tuple[Path, dict[str, torch.Tensor]], copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (copy / "checkpoint-6" / STATE).unlink()
    mix(copy, OPTIMIZER, into=4, of=2)
    trainer = fresh(copy)
    trainer.train(resume_from_checkpoint=True)
    assert_same(factors(trainer), complete[1])
    assert trainer.state.global_step == 6 and find_flaw(copy / "checkpoint-6") is None
    first, second = (each.getMessage() for each in caplog.records if "passed over" in each.getMessage())
    assert first.startswith(f"{copy / 'checkpoint-6'} is passed over: {STATE} is missing, which is written last")
    assert second.startswith(f"{copy / 'checkpoint-4'} is passed over: {OPTIMIZER} {CHANGED}")
    assert first.endswith(f". The training goes on from {copy / 'checkpoint-2'}.")


def test_one_that_cannot_be_examined_is_passed_over(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def find(folder: Path) -> str | None:
        if folder.name == "checkpoint-6":
            raise OverflowError("too large")
        return find_flaw(folder)

    monkeypatch.setattr(checkpointing, "find_flaw", find)
    assert fresh(copy)._newest_complete() == copy / "checkpoint-4"
    assert "checkpoint-6 is passed over: its files cannot be examined (OverflowError: too large)." in caplog.text


def test_a_complete_one_of_another_training_is_not_passed_over(copy: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint-6/optimizer.pt: .*'efficient'"):
        fresh(copy, lora_pro_mode="full").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("is_cut", [False, True])
def test_after_an_end_in_the_first_save_the_training_starts_anew(
    complete: tuple[Path, dict[str, torch.Tensor]], copy: Path, caplog: pytest.LogCaptureFixture, is_cut: bool
) -> None:
    for folder in copy.glob("checkpoint-*"):
        (folder / STATE).unlink()
        if is_cut:  # in the last file before the manifest
            (folder / STATE).write_text('{"best_global_step": nu')
            (folder / MANIFEST).unlink()
    trainer = fresh(copy)
    trainer.train(resume_from_checkpoint=True)
    assert_same(factors(trainer), complete[1])
    said = [each.getMessage() for each in caplog.records if "passed over" in each.getMessage()]
    assert len(said) == 3 and all(line.endswith(". The training starts anew.") for line in said)


def test_damage_after_a_save_is_no_end_in_it(copy: Path) -> None:
    for folder in copy.glob("checkpoint-*"):
        (folder / STATE).write_text("")
    with pytest.raises(ValueError, match=rf"none of its checkpoints is complete.*{STATE} is cut off or damaged"):
        fresh(copy).train(resume_from_checkpoint=True)


def test_without_a_complete_one_it_is_said_what_to_do(copy: Path, tmp_path: Path) -> None:
    for folder in copy.glob("checkpoint-*"):
        (folder / OPTIMIZER).unlink()
    with pytest.raises(
        ValueError, match=r"none of its checkpoints is complete\. In checkpoint-6, the newest, .*Start "
    ):
        fresh(copy).train(resume_from_checkpoint=True)
    for nothing in (tmp_path / "empty", tmp_path / "absent"):
        trainer = fresh(nothing)
        with pytest.raises(ValueError, match=r"absent|empty: it holds no checkpoint\. Start the training again"):
            trainer.train(resume_from_checkpoint=True)


# Written


def test_the_manifest_comes_last_and_is_pushed_with_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = fresh(tmp_path, max_steps=2)
    seen: list[bool] = []
    plain = type(trainer.state).save_to_json

    def save_to_json(state: Any, path: str) -> None:
        seen.append((Path(path).parent / MANIFEST).exists())
        plain(state, path)

    def push(_: Any, folder: str) -> None:
        seen.append((Path(folder) / MANIFEST).exists())

    monkeypatch.setattr(type(trainer.state), "save_to_json", save_to_json)
    monkeypatch.setattr(HubMixin, "_push_from_checkpoint", push)
    trainer.args.push_to_hub = True
    trainer.train()
    assert seen == [False, True]


def test_a_save_that_ends_at_the_manifest_is_complete(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(copy / "checkpoint-6")

    def end(file: Path, text: str) -> None:
        file.with_name(f"_{file.name}.part").write_text(text[: len(text) // 2])
        raise KeyboardInterrupt

    trainer = fresh(copy)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write_text", end)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=str(copy / "checkpoint-4"))
    assert not (copy / "checkpoint-6" / MANIFEST).exists()
    assert find_flaw(copy / "checkpoint-6") is None
    fresh(copy).train(resume_from_checkpoint=str(copy / "checkpoint-4"))  # which saves there again
    assert read_manifest(copy / "checkpoint-6") is not None and find_flaw(copy / "checkpoint-6") is None


def test_a_manifest_that_cannot_be_written_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_text", full)
    fresh(tmp_path, max_steps=2).train()
    (said,) = (each.getMessage() for each in caplog.records if MANIFEST in each.getMessage())
    assert f"could not be written into {tmp_path / 'checkpoint-2'} ([Errno 28] No space left on device)" in said
    assert find_flaw(tmp_path / "checkpoint-2") is None


def test_what_is_left_of_an_older_save_is_cleared(copy: Path) -> None:
    folder = copy / "checkpoint-6"
    for name in ("rng_state_0.pth", "rng_state_2.pth", "optimizer_0/.metadata", "global_step6/x.pt", "latest"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"left")
    fresh(copy).train(resume_from_checkpoint=str(copy / "checkpoint-4"))
    found = read_manifest(folder)
    assert found is not None and find_flaw(folder) is None
    names = {path.name for path in folder.iterdir()}
    assert not names & {"rng_state_0.pth", "rng_state_2.pth", "optimizer_0", "global_step6", "latest"}


@pytest.mark.parametrize("setting", [{"save_only_model": True}, {"save_total_limit": 1}])
def test_settings_of_saving(tmp_path: Path, setting: dict[str, Any]) -> None:
    fresh(tmp_path, **setting).train()
    left = checkpoints_in(tmp_path)
    assert len(left) == (1 if "save_total_limit" in setting else 3)
    for folder in left:
        assert read_manifest(folder) is not None and find_flaw(folder) is None


def test_without_lora_pro_there_is_none(tmp_path: Path) -> None:
    fresh(tmp_path, lora_pro=False, max_steps=2).train()
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "checkpoint-2" / MANIFEST).exists()
