"""Checkpoints of FSDP2 and DeepSpeed are examined as those of one process are, and nothing in them is run."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from engine_checkpoints import DATA, ENGINES, META, STATES, STEP, ZERO2, ZERO3, plant, train, written
from grids import rest_slow
from lorapro_hf import create_lorapro_optimizer
from lorapro_hf.checkpoints.adapters import saving_error
from lorapro_hf.checkpoints.engines import (
    DDP,
    FULL,
    ONE_PROCESS,
    SHARDED,
    describe_engine,
    require_same_engine,
    written_by,
)
from lorapro_hf.checkpoints.manifest import MANIFEST
from lorapro_hf.checkpoints.resume import find_flaw, require_complete, require_same_training, require_without_lora_pro
from lorapro_hf.utils.unpickling import StandIn, read_tensors
from trainer_helpers import tiny_lora

MODEL2, MODEL3 = f"{STATES}/mp_rank_00_model_states.pt", f"{STATES}/zero_pp_rank_1_mp_rank_00_model_states.pt"
OPTIMIZER, MOMENTS = f"{STATES}/zero_pp_rank_1_mp_rank_00_optim_states.pt", f"{STATES}/lora_pro_rank1.safetensors"
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one process, and the same as each engine would have written it."""
    root = tmp_path_factory.mktemp("engines")
    source = train(root / "training")
    shutil.copytree(source, root / ONE_PROCESS)
    for engine in ENGINES:
        written(engine, source, root / engine)
    return root


@pytest.fixture
def made(root: Path, tmp_path: Path) -> Made:
    return lambda engine: Path(shutil.copytree(root / engine, tmp_path / f"checkpoint-{STEP}"))


@pytest.mark.parametrize("engine", [ONE_PROCESS, *ENGINES])
def test_a_complete_checkpoint_has_no_flaw_and_tells_its_engine(engine: str, root: Path):
    assert written_by(root / engine) == [engine]
    assert find_flaw(root / engine) is None
    require_same_engine(root / engine, engine)


@pytest.mark.parametrize(
    ("engine", "file"),
    [
        (SHARDED, META),
        (SHARDED, DATA),
        (SHARDED, "pytorch_model_fsdp_0/.metadata"),
        (SHARDED, "scheduler.pt"),
        (FULL, "optimizer.bin"),
        (FULL, "pytorch_model_fsdp.bin"),
        (FULL, "scheduler.pt"),
        (ZERO2, "latest"),
        (ZERO2, MODEL2),
        (ZERO2, OPTIMIZER),
        (ZERO2, MOMENTS),
        (ZERO2, "scheduler.pt"),
        (ZERO2, "rng_state_0.pth"),
        (ZERO2, "rng_state_1.pth"),
        (ZERO3, MODEL3),
    ],
)
def test_a_missing_file_is_named(engine: str, file: str, made: Made):
    folder = made(engine)
    (folder / file).unlink()
    assert find_flaw(folder) == f"{file} is missing"


@pytest.mark.parametrize("name", ["optimizer_0", "pytorch_model_fsdp_0"])
def test_a_missing_folder_of_shards_is_named(name: str, made: Made):
    folder = made(SHARDED)
    shutil.rmtree(folder / name)
    with pytest.raises(ValueError, match=rf"cannot resume from .*: {name}/.metadata is missing"):
        require_complete(folder)


def test_random_states_of_all_ranks_that_wrote_shards_are_wanted(made: Made):
    folder = made(SHARDED)
    (folder / "rng_state_1.pth").unlink()
    assert find_flaw(folder) is None  # the shards are those of one rank
    shutil.copy(folder / DATA, folder / "optimizer_0" / "__1_0.distcp")
    assert find_flaw(folder) == "rng_state_1.pth is missing"


def test_a_schedule_that_deepspeed_keeps_has_no_file(made: Made):
    folder = made(ZERO2)
    (folder / "scheduler.pt").unlink()
    model = torch.load(folder / MODEL2, weights_only=True)
    torch.save({**model, "lr_scheduler": {"last_batch_iteration": STEP}}, folder / MODEL2)
    assert find_flaw(folder) is None


def test_a_checkpoint_of_deepspeed_without_lora_pro_is_complete(made: Made):
    folder = made(ZERO2)
    for file in (folder / STATES).glob("lora_pro_rank*"):
        file.unlink()
    assert find_flaw(folder) is None
    require_without_lora_pro(folder)


@pytest.mark.parametrize(
    ("engine", "file"),
    [
        (SHARDED, META),
        (SHARDED, DATA),
        (FULL, "optimizer.bin"),
        (FULL, "pytorch_model_fsdp.bin"),
        (ZERO2, MODEL2),
        (ZERO2, OPTIMIZER),
        (ZERO2, MOMENTS),
        (FULL, "scheduler.pt"),
        (ZERO3, "rng_state_1.pth"),
    ],
)
@pytest.mark.parametrize("cut", rest_slow(["half", "empty"]))
def test_a_file_that_is_cut_off_is_named(cut: str, engine: str, file: str, made: Made):
    folder = made(engine)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2] if cut == "half" else b"")
    assert (find_flaw(folder) or "").startswith(f"{file} is cut off")


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state_0.pth", "scaler.pt", "optimizer.bin"])
@pytest.mark.parametrize("content", rest_slow([{"cpu": 1}, [1, 2], torch.ones(2)]), ids=["numbers", "list", "tensor"])
def test_foreign_content_is_named(content: Any, name: str, made: Made):
    folder = made(FULL)
    torch.save(content, folder / name)
    assert (find_flaw(folder) or "").startswith(f"{name} is cut off or damaged (it holds no state of ")


def test_a_schedule_that_is_not_torchs_is_accepted(made: Made):
    folder = made(FULL)
    torch.save({"base_values": [1e-2], "warmup_steps": [], "metric": None}, folder / "scheduler.pt")
    assert find_flaw(folder) is None


def test_the_empty_state_of_a_gradient_scaler_that_is_off_is_accepted(made: Made):
    folder = made(FULL)
    torch.save({}, folder / "scaler.pt")
    assert find_flaw(folder) is None


@pytest.mark.parametrize("metadata", rest_slow(['{"rank": 1}', None, "[1]", "{", "[" * 100_000]))
def test_foreign_moments_are_named(metadata: str | None, made: Made):
    folder = made(ZERO2)
    save_file({"x": torch.ones(1)}, folder / MOMENTS, metadata=metadata and {"lora_pro": metadata})
    assert find_flaw(folder) == f"{MOMENTS} is cut off, damaged or not from LoRA-Pro"


@pytest.mark.parametrize("change", [{"global_steps": STEP + 1}, {"ranks": 3}])
def test_moments_of_another_save_are_refused(change: dict[str, int], made: Made):
    folder = made(ZERO2)
    about = {"rank": 1, "ranks": 2, "global_steps": STEP, "mode": "full", "pairs": {}, **change}
    save_file({"x": torch.ones(1)}, folder / MOMENTS, metadata={"lora_pro": json.dumps(about)})
    assert "mixes the files of two saves" in (find_flaw(folder) or "")


@pytest.mark.parametrize(
    "tag", rest_slow(["../global_step2", "/etc", "", ".", "global_step2/../../global_step2", "global_step9"])
)
def test_deepspeed_is_not_led_out_of_the_checkpoint(tag: str, made: Made):
    folder = made(ZERO2)
    shutil.copytree(folder / STATES, folder.parent / STATES)
    (folder / "latest").write_text(tag)
    assert find_flaw(folder) == "latest names no folder of DeepSpeed inside the checkpoint"


def test_nor_by_a_link(made: Made):
    folder = made(ZERO2)
    shutil.move(folder / STATES, folder.parent / STATES)
    (folder / STATES).symlink_to(folder.parent / STATES)
    assert find_flaw(folder) == "latest names no folder of DeepSpeed inside the checkpoint"


def test_shards_outside_of_the_checkpoint_are_refused(made: Made):
    folder = made(SHARDED)
    shutil.move(folder / DATA, folder / "outside")
    metadata = pickle.loads((folder / META).read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../outside"
    (folder / META).write_bytes(pickle.dumps(metadata))
    assert find_flaw(folder) == "optimizer_0/.metadata names a file outside of the checkpoint"


def test_shards_may_be_links_as_in_a_cache(made: Made):
    folder = made(SHARDED)
    shutil.move(folder / DATA, folder.parent / "blob")
    (folder / DATA).symlink_to(folder.parent / "blob")
    assert find_flaw(folder) is None


def test_the_number_of_a_rank_may_be_anything(made: Made):
    folder = made(SHARDED)
    shutil.copy(folder / DATA, folder / "optimizer_0" / "__999999999999_0.distcp")
    assert find_flaw(folder) == "rng_state_2.pth is missing"


def test_a_damaged_save_is_named_with_the_remedy(made: Made):
    folder = made(SHARDED)
    (folder / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"\x80\x04cut")
    message = str(saving_error(folder, tiny_lora()))
    assert "pytorch_model_fsdp_0/.metadata cannot be read" in message and "save again" in message


@pytest.mark.parametrize(
    ("engine", "file"),
    [
        (SHARDED, META),
        (SHARDED, "pytorch_model_fsdp_0/.metadata"),
        (SHARDED, DATA),
        (FULL, "optimizer.bin"),
        (FULL, "pytorch_model_fsdp.bin"),
        (ZERO2, MODEL2),
        (ZERO2, OPTIMIZER),
        (ZERO3, MODEL3),
        (ZERO3, "scheduler.pt"),
        (SHARDED, "rng_state_0.pth"),
        (FULL, "scaler.pt"),
        (ONE_PROCESS, "optimizer.pt"),
    ],
)
def test_code_in_a_file_is_refused_and_never_run(engine: str, file: str, made: Made, tmp_path: Path):
    folder, marker = made(engine), tmp_path / "executed"
    plant(folder / file, marker)
    flaw = find_flaw(folder) or ""
    assert not marker.exists()
    assert flaw.startswith(file.rpartition("/")[0] if file == DATA else file)
    assert "it holds objects that could run code, such as posix.mkdir" in flaw


@pytest.mark.parametrize("file", [META, DATA])
def test_the_engine_itself_would_run_it(file: str, made: Made, tmp_path: Path):
    folder, marker = made(SHARDED), tmp_path / "executed"
    plant(folder / file, marker)
    with suppress(CheckpointException):
        dcp.load({"optimizer": {"param_groups": [{"lr": 1.0}]}}, checkpoint_id=folder / "optimizer_0", no_dist=True)
    assert marker.exists()


def test_files_of_two_engines_in_one_folder_are_refused(made: Made, root: Path):
    folder = made(FULL)
    shutil.copy(root / ONE_PROCESS / "optimizer.pt", folder)
    assert find_flaw(folder) == f"it mixes the files of two saves, by {DDP} and by {FULL}"


@pytest.mark.parametrize("running", [ONE_PROCESS, DDP, *ENGINES])
@pytest.mark.parametrize("engine", [ONE_PROCESS, *ENGINES])
def test_a_checkpoint_of_another_engine_is_refused(engine: str, running: str, root: Path):
    if engine == running or {engine, running} == {ONE_PROCESS, DDP}:
        require_same_engine(root / engine, running)
        return
    with pytest.raises(ValueError, match=f"cannot resume from .*written by {engine}, .* runs with {running}") as caught:
        require_same_engine(root / engine, running)
    assert f"Resume with {engine}, or start a new training" in str(caught.value)


def test_stages_1_and_2_of_zero_read_each_others_files(root: Path):
    require_same_engine(root / ZERO2, "DeepSpeed ZeRO 1")


def test_the_stage_of_an_optimizer_in_bfloat16_is_read_from_the_settings(made: Made):
    folder = made(ZERO2)
    state = {"optimizer_state_dict": {"clip_grad": 1.0}, "ds_config": {"zero_optimization": {"stage": 1}}}
    for rank in range(2):
        file = folder / STATES / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        file.unlink()
        torch.save(state, file.with_name(f"bf16_{file.name}"))
    assert written_by(folder) == ["DeepSpeed ZeRO 1"] and find_flaw(folder) is None
    require_same_engine(folder, "DeepSpeed ZeRO 1")


def test_a_stage_that_is_not_known_is_left_to_deepspeed(made: Made):
    folder = made(ZERO2)
    torch.save({"optimizer_state_dict": {}}, folder / STATES / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    require_same_engine(folder, "DeepSpeed ZeRO 1")
    with pytest.raises(ValueError, match=r"written by DeepSpeed ZeRO \?, and the training runs with DDP"):
        require_same_engine(folder, DDP)


NUMPYS = [numpy.ndarray, numpy.dtype, type(numpy.dtype(numpy.uint32)), numpy.zeros(1).__reduce__()[0]]


@pytest.mark.parametrize("allowed", [NUMPYS, *([each] for each in NUMPYS)], ids=str)
def test_classes_that_a_script_has_allowed_do_not_mix_with_stand_ins(allowed: list[Any], root: Path):
    with torch.serialization.safe_globals(allowed):
        before = set(torch.serialization.get_safe_globals())
        state = read_tensors(root / FULL / "rng_state_0.pth")
        assert isinstance(state["numpy"][1], StandIn)
        assert set(torch.serialization.get_safe_globals()) == before


def test_weights_alone_are_for_engines_that_can_load_them(made: Made):
    folder = made(ONE_PROCESS)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", MANIFEST):
        (folder / name).unlink()
    assert find_flaw(folder) is None and written_by(folder) == []
    for engine in (ONE_PROCESS, DDP, SHARDED, FULL):
        require_same_engine(folder, engine)
    for engine in (ZERO2, ZERO3):
        with pytest.raises(ValueError, match=f"holds no optimizer state .save_only_model=True., and {engine} resumes"):
            require_same_engine(folder, engine)


@pytest.mark.parametrize("engine", [SHARDED, FULL])
def test_another_training_is_told_from_the_files_of_fsdp2(engine: str, root: Path):
    def optimizer(model: Any, mode: str) -> Any:
        return create_lorapro_optimizer(model, lr=1e-2, mode=mode, weight_decay=0.0)

    model = tiny_lora()
    assert require_same_training(root / engine, optimizer(model, "full"), model)
    with pytest.raises(
        ValueError, match=r"optimizer.*is of LoRA-Pro mode 'full', but this optimizer has .*'efficient'"
    ):
        require_same_training(root / engine, optimizer(model, "efficient"), model)
    other = tiny_lora(r=2)
    with pytest.raises(ValueError, match="another model or rank"):
        require_same_training(root / engine, optimizer(other, "full"), other)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_training_without_lora_pro_refuses_its_checkpoints(engine: str, root: Path):
    with pytest.raises(ValueError, match="it was written with LoRA-Pro in mode 'full', but LoRA-Pro is off"):
        require_without_lora_pro(root / engine)


def test_engines_are_described_as_messages_name_them():
    def accelerator(kind: str, **state: Any) -> Any:
        return SimpleNamespace(distributed_type=kind, state=SimpleNamespace(**state))

    plugin = SimpleNamespace(state_dict_type=SimpleNamespace(name="FULL_STATE_DICT"))
    configuration = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    assert describe_engine(accelerator("NO")) == ONE_PROCESS
    assert describe_engine(accelerator("MULTI_GPU")) == describe_engine(accelerator("MULTI_CPU")) == DDP
    assert describe_engine(accelerator("FSDP", fsdp_plugin=plugin)) == FULL
    assert describe_engine(accelerator("DEEPSPEED", deepspeed_plugin=configuration)) == ZERO3
