"""`accelerate launch` with the recipes: `LoRAProTrainer` on two processes saves the adapter of one.

DeepSpeed is also started as other launchers do, with a configuration of its own in the arguments.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config import load_config_from_file
from safetensors.torch import load_file

import launch_script
from launch_script import MAX_GRAD_NORM, TRAININGS, train
from training import assert_close, assert_differ

ROOT = Path(__file__).parents[2]
RECIPES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
WRAPPED = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM"}
# What is trained in the processes that are launched with a recipe.
LAUNCHED = {
    "ddp": {"ddp"},
    "fsdp2": {"fsdp2"},
    "zero3": {"zero1", "zero2", "zero3", "configuration2", "configuration3"},
}


def file_of(recipe: str) -> Path:
    return ROOT / "configs" / "accelerate" / f"{recipe}.yaml"


def launch_lines(recipe: str) -> list[list[str]]:
    """The commands in the head of a recipe."""
    lines = file_of(recipe).read_text(encoding="utf-8").splitlines()
    return [shlex.split(line.lstrip("# ")) for line in lines if line.startswith("#   accelerate launch")]


def command(recipe: str, folder: Path, script: str) -> list[str]:
    """The second command in the head of a recipe, with a script of ours on two processes, in float32."""
    words = launch_lines(recipe)[1]
    words[words.index("--num_processes") + 1] = "2"
    options = [*words[1 : words.index("train.py")], "--mixed_precision", "no", "--main_process_port", "0"]
    module = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    return [*module, *options, script, recipe, str(folder)]


def launch(recipe: str, folder: Path, script: str) -> dict[str, Any]:
    """What a script has found on two processes that run a recipe."""
    if recipe.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    path = [os.environ.get("PYTHONPATH"), str(ROOT / "tests" / "helpers")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        command(recipe, folder, script), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=LAUNCHED)
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Where the trainings under a recipe have saved, and what they have logged."""
    recipe = request.param
    folder = tmp_path_factory.mktemp(recipe)
    found = launch(recipe, folder, launch_script.__file__)
    assert set(found) == LAUNCHED[recipe]
    return folder, found


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The same on this process alone, and once without clipping."""
    folder = tmp_path_factory.mktemp("single")
    trainings = {**TRAININGS, "unclipped": {}}
    return folder, {name: train(folder / name, **settings) for name, settings in trainings.items()}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_save_the_adapter_of_one(launched: tuple[Path, dict[str, Any]], single: tuple[Path, Any]):
    folder, found = launched
    for way, of_way in found.items():
        for name in of_way.keys() & TRAININGS:
            assert_close(adapter(folder / way / name), adapter(single[0] / name), 1e-5)
            assert of_way[name]["wrapped"] == WRAPPED.get(way, "DeepSpeedEngine")
            assert of_way[name]["stage"] == (0 if way in WRAPPED else int(way[-1]))
            assert of_way[name]["fsdp"] == (2 if way == "fsdp2" else 0)
        assert_differ(adapter(folder / way / "full"), adapter(single[0] / "off"))
        assert_differ(adapter(folder / way / "full"), adapter(single[0] / "unclipped"))


@pytest.mark.distributed
@pytest.mark.slow
def test_both_norms_are_logged(launched: tuple[Path, dict[str, Any]], single: tuple[Path, Any]):
    for of_way in launched[1].values():
        for name in of_way.keys() & TRAININGS:
            history, expected = of_way[name]["history"], single[1][name]["history"]
            assert len(history) == len(expected) == 6
            for entry, other in zip(history, expected, strict=True):
                assert entry.keys() == other.keys()
                assert entry["grad_norm"] > MAX_GRAD_NORM
                assert ("lora_pro_grad_norm" in entry) == (name != "off")
                for key, value in other.items():
                    assert entry[key] == pytest.approx(value, rel=1e-4), (name, key)


@pytest.mark.distributed
@pytest.mark.slow
def test_resumed_equals_uninterrupted_to_the_bit(launched: tuple[Path, dict[str, Any]]):
    folder, found = launched
    for way, of_way in found.items():
        resumed, whole = (adapter(folder / way / name) for name in ("resumed", "full"))
        assert resumed.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.equal(resumed[name], tensor), (way, name)
        assert of_way["resumed"]["history"] == of_way["full"]["history"]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("launched", ["fsdp2"], indirect=True)
def test_adapters_that_would_not_be_saved(launched: tuple[Path, dict[str, Any]], single: tuple[Path, dict[str, Any]]):
    """Under FSDP2: refused on all ranks, and saved with the remedy that the messages name."""
    folder, found = launched
    messages = found["fsdp2"]["refused"]
    assert_close(adapter(folder / "fsdp2" / "checkpointed"), adapter(single[0] / "full"), 1e-5)
    for of_ranks in messages.values():
        assert len(of_ranks) == 2 and of_ranks[0] == of_ranks[1]
    for kind in ("own", "plain"):
        assert "fsdp_activation_checkpointing: true" in messages[kind][0]
        assert "gradient_checkpointing=True" in messages[kind][0]
    for kind, file in (("sharded", "pytorch_model_fsdp_0"), ("full", "adapter_model.safetensors")):
        assert f"checkpoint-1/{file}: " in messages[kind][0]
        assert "1.mlp.down_proj.lora_B.weight is missing there" in messages[kind][0]
    assert not list((folder / "fsdp2" / "refused").glob("checkpoint-*/trainer_state.json"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_open_with_how_to_launch_them(recipe: str):
    text = file_of(recipe).read_text(encoding="utf-8")
    head = text[: text.index("\ncompute_environment")].splitlines()
    assert all(line.startswith("#") for line in head)
    start = ["accelerate", "launch", "--config_file", str(file_of(recipe).relative_to(ROOT))]
    plain, overriding = launch_lines(recipe)
    assert plain == [*start, "train.py", "--bf16"]
    assert overriding == [*start, "--num_processes", "4", "train.py", "--bf16"]
    assert load_config_from_file(str(file_of(recipe))).num_processes == 8
