"""`accelerate launch` with each of the recipes: `LoRAProTrainer` on two processes takes the steps of one."""

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
from launch_script import RESUMED, TRAININGS, train
from training import assert_close, assert_differ

ROOT = Path(__file__).parents[2]
RECIPES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
WRAPPED = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM"}

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def launch_lines(recipe: str) -> list[list[str]]:
    """The commands in the head of a recipe."""
    lines = (ROOT / "configs" / "accelerate" / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line.lstrip("# ")) for line in lines if line.startswith("#   accelerate launch")]


def command(recipe: str, folder: Path) -> list[str]:
    """The second command in the head, with two processes, in float32, of our script."""
    words = launch_lines(recipe)[1]
    words[words.index("--num_processes") + 1] = "2"
    words = words[1 : words.index("train.py")]
    words += ["--mixed_precision", "no", "--main_process_port", "0"]
    script = [launch_script.__file__, recipe, str(folder)]
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words, *script]


@pytest.fixture(scope="module", params=RECIPES)
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """The name of the recipe, where its trainings have saved, and what they have logged."""
    recipe = request.param
    if recipe.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp(recipe)
    path = [os.environ.get("PYTHONPATH"), *map(str, (ROOT / "tests", ROOT / "tests" / "distributed"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        command(recipe, folder), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return recipe, folder, json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The same on this process alone."""
    folder = tmp_path_factory.mktemp("single")
    return folder, {name: train(folder / name, **settings) for name, settings in TRAININGS.items()}


def test_two_processes_save_the_adapter_of_one(launched: tuple[str, Path, Any], single: tuple[Path, Any]):
    recipe, folder, found = launched
    assert set(found) == {"recipe"} | ({"configuration"} if recipe in ("zero2", "zero3") else set())
    for way, of_way in found.items():
        for name in TRAININGS:
            assert_close(adapter(folder / way / name), adapter(single[0] / name), 1e-5)
            assert of_way[name]["wrapped"] == WRAPPED.get(recipe, "DeepSpeedEngine")
            assert of_way[name]["stage"] == (int(recipe[-1]) if recipe.startswith("zero") else 0)
            assert of_way[name]["fsdp"] == (2 if recipe == "fsdp2" else 0)
        for name in ("full", "efficient"):
            assert_differ(adapter(folder / way / name), adapter(folder / way / "off"))
        assert_differ(adapter(folder / way / "clipped"), adapter(folder / way / "full"))


def test_both_norms_are_logged(launched: tuple[str, Path, Any], single: tuple[Path, Any]):
    for of_way in launched[2].values():
        for name in TRAININGS:
            history, expected = of_way[name]["history"], single[1][name]["history"]
            assert len(history) == len(expected) == 6
            for entry, other in zip(history, expected, strict=True):
                assert {"loss", "grad_norm"} <= entry.keys() == other.keys()
                assert ("lora_pro_grad_norm" in entry) == (name != "off")
                for key, value in other.items():
                    assert entry[key] == pytest.approx(value, rel=1e-4), (name, key)
        assert all(entry["grad_norm"] > 0.05 for entry in of_way["clipped"]["history"])


def test_resumed_equals_uninterrupted_to_the_bit(launched: tuple[str, Path, Any]):
    _, folder, found = launched
    for way, of_way in found.items():
        resumed, whole = (adapter(folder / way / name) for name in ("resumed", RESUMED))
        assert resumed.keys() == whole.keys()
        for name, tensor in whole.items():
            assert torch.equal(resumed[name], tensor), (way, name)
        assert of_way["resumed"]["history"] == of_way[RESUMED]["history"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_open_with_what_they_are_and_how_to_launch_them(recipe: str):
    file = ROOT / "configs" / "accelerate" / f"{recipe}.yaml"
    assert file.read_text(encoding="utf-8").startswith("# ")
    for words in launch_lines(recipe):
        assert words[: words.index("train.py")][:4] == [
            "accelerate",
            "launch",
            "--config_file",
            str(file.relative_to(ROOT)),
        ]
    assert len(launch_lines(recipe)) == 2
    configuration = load_config_from_file(str(file))
    assert configuration.num_machines == 1
