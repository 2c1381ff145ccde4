"""`LoRAProTrainer` on two processes, as torchrun starts them, takes the steps of one with the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer_script
from lorapro_hf.config import MODES
from trainer_script import TRAININGS, result, train
from training import assert_close, assert_differ

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# 8-bit codes turn differences of rounding into differences of a code
TOLERANCES = {"full_8bit": 2e-2}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of all trainings on each rank."""
    results = tmp_path_factory.mktemp("ranks")
    script = Path(trainer_script.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = [folder for folder in (os.environ.get("PYTHONPATH"), str(script.parent.parent)) if folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [*command, str(script), str(results)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(results / f"result-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same on this process alone."""
    folder = tmp_path_factory.mktemp("single")
    return {name: result(train(folder / name, 1, **settings)) for name, settings in TRAININGS.items()}


@pytest.mark.parametrize("name", TRAININGS)
def test_two_ranks_take_the_steps_of_one(found: list[dict[str, Any]], single: dict[str, Any], name: str):
    for of_rank in found:
        assert of_rank[name]["wrapped"] == "DistributedDataParallel"
        assert_close(of_rank[name]["parameters"], single[name]["parameters"], TOLERANCES.get(name, 1e-5))
    for parameter, value in found[0][name]["parameters"].items():
        assert torch.equal(value, found[1][name]["parameters"][parameter]), parameter
    logs, expected = (json.loads(each[name]["history"]) for each in (found[0], single))
    assert len(logs) == len(expected) == 6
    for entry, other in zip(logs, expected, strict=True):
        assert entry.keys() == other.keys()
        assert ("lora_pro_grad_norm" in entry) == (name not in ("off", "callback"))
        for key, value in other.items():
            assert entry[key] == pytest.approx(value, rel=1e-2 if name in TOLERANCES else 1e-4), key


def test_trainings_differ(found: list[dict[str, Any]]):
    of = {name: each["parameters"] for name, each in found[0].items()}
    for name in set(TRAININGS) - {"off"}:
        assert_differ(of[name], of["off"])
    assert_differ(of["clipped"], of["full"])
    assert_close(of["accumulated"], of["full"], 1e-4)


@pytest.mark.parametrize("name", MODES)
def test_each_rank_keeps_its_share_of_the_state(found: list[dict[str, Any]], single: dict[str, Any], name: str):
    shares = [of_rank[name]["own"] / single[name]["own"] for of_rank in found]
    assert sum(shares) == pytest.approx(1)
    assert all(0.4 < share < 0.6 for share in shares)
