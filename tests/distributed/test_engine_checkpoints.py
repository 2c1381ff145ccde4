"""Two processes of FSDP2 or DeepSpeed refuse checkpoints that are not theirs, alike, and load nothing of them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import accelerate
import pytest
from packaging.version import Version
from safetensors.torch import load_file

from engine_checkpoints import DATA, STATES, STEP, ZERO2, ZERO3, plant, train, written
from engine_script import resume, resume_under
from lorapro_hf.checkpoints.engines import FULL, SHARDED, written_by
from lorapro_hf.checkpoints.manifest import MANIFEST
from lorapro_hf.checkpoints.resume import find_flaw
from processes import run_afresh
from training import assert_close

OF_RESUME = ("optimizer.pt", "scheduler.pt", "rng_state*", MANIFEST)
ENGINE = {"fsdp2": SHARDED, "zero2": ZERO2}
HOSTILE = {"fsdp2": DATA, "zero2": f"{STATES}/zero_pp_rank_0_mp_rank_00_optim_states.pt"}
REFUSALS = {
    "another engine": "it was written by {other}, and the training runs with {engine}, which does not read these files",
    "one process": "it was written by one process, and the training runs with {engine}",
    "damaged": "scheduler.pt is missing",
    "hostile": "objects that could run code, such as posix.mkdir",
}
OF_FSDP2 = {"mode": "optimizer_0: the checkpoint is of LoRA-Pro mode 'full', but this optimizer has LoRA-Pro mode"}
OF_ZERO = {"weights": "it holds no optimizer state (save_only_model=True), and {engine} resumes from its own files"}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "zero2")])
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A recipe, where it ran, and the messages of both ranks by the names of the checkpoints."""
    recipe = request.param
    if recipe == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    if recipe == "fsdp2" and Version(accelerate.__version__) < Version("1.6"):
        pytest.skip("this accelerate keeps FSDP to GPUs")
    folder = tmp_path_factory.mktemp(recipe)
    source, refused = train(folder / "training"), folder / "refused"
    weights = (refused if recipe == "zero2" else folder) / "weights"
    shutil.copytree(source, weights, ignore=shutil.ignore_patterns(*OF_RESUME))
    shutil.copytree(source, refused / "one process")
    written(ZERO3 if recipe == "zero2" else FULL, source, refused / "another engine")
    for name in ("damaged", "hostile", *(OF_FSDP2 if recipe == "fsdp2" else ())):
        written(ENGINE[recipe], source, refused / name)
    (refused / "damaged" / "scheduler.pt").unlink()
    plant(refused / "hostile" / HOSTILE[recipe], folder / "executed")
    run_afresh(resume_under, 2, folder, recipe, str(folder), environment={"DS_ACCELERATOR": "cpu"})
    return recipe, folder, json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.mark.distributed
def test_every_rank_refuses_by_name_and_loads_nothing(launched: tuple[str, Path, Any]):
    recipe, folder, found = launched
    expected = {**REFUSALS, **(OF_FSDP2 if recipe == "fsdp2" else OF_ZERO)}
    assert found.keys() == expected.keys()
    other = ZERO3 if recipe == "zero2" else FULL
    for name, messages in found.items():
        assert messages[0].startswith(f"cannot resume from {folder / 'refused' / name}")
        assert expected[name].format(engine=ENGINE[recipe], other=other) in messages[0]
        assert messages == [messages[0]] * 2
    assert not (folder / "executed").exists()


@pytest.mark.distributed
def test_what_the_engine_itself_writes_has_no_flaw(launched: tuple[str, Path, Any]):
    recipe, folder, _ = launched
    own = folder / "own" / f"checkpoint-{STEP}"
    assert written_by(own) == [ENGINE[recipe]] and find_flaw(own) is None
    (own / "rng_state_1.pth").unlink()
    assert find_flaw(own) == "rng_state_1.pth is missing"


@pytest.mark.distributed
def test_what_can_be_read_goes_on_as_it_does_elsewhere(launched: tuple[str, Path, Any], tmp_path: Path):
    recipe, folder, _ = launched
    if recipe == "fsdp2":
        resume(tmp_path, folder / "weights", batch=4)
        one, other, tolerance = tmp_path, folder / "from weights", 1e-5
    else:
        one, other, tolerance = folder / "zero1", folder / "zero2", 0.0
    assert_close(*(load_file(place / "adapter_model.safetensors") for place in (one, other)), tolerance)
