"""Checkpoints as FSDP2 and DeepSpeed write them, made on one process from one that is their own."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from lorapro_hf.checkpoints.engines import FULL, SHARDED
from lorapro_hf.checkpoints.manifest import MANIFEST
from trainer_helpers import run

ZERO2, ZERO3 = "DeepSpeed ZeRO 2", "DeepSpeed ZeRO 3"
ENGINES = (SHARDED, FULL, ZERO2, ZERO3)
RANKS, STEP = 2, 2
STATES = f"global_step{STEP}"
DATA, META = "optimizer_0/__0_0.distcp", "optimizer_0/.metadata"


def train(folder: Path, **settings: Any) -> Path:
    """A checkpoint of one process."""
    settings = {"lora_pro_mode": "full", "max_steps": STEP, **settings}
    run(folder, save_strategy="steps", save_steps=STEP, **settings)
    return folder / f"checkpoint-{STEP}"


def written(engine: str, source: Path, folder: Path) -> Path:
    """A copy of a checkpoint of one process, with the files of two ranks of an engine in the place of its optimizer."""
    shutil.copytree(source, folder)
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    shutil.copy(folder / "rng_state.pth", folder / "rng_state_1.pth")
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    for name in ("optimizer.pt", MANIFEST):
        (folder / name).unlink(missing_ok=True)
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    state["state"] = {name: state["state"][number] for number, name in enumerate(names)}
    for group in state["param_groups"]:
        group["params"] = list(group["param_names"])
    weights = load_file(folder / "adapter_model.safetensors")
    if engine == SHARDED:
        _save_shards(folder / "pytorch_model_fsdp_0", {"model": weights})
        _save_shards(folder / "optimizer_0", {"optimizer": state})
    elif engine == FULL:
        torch.save(weights, folder / "pytorch_model_fsdp.bin")
        torch.save(state, folder / "optimizer.bin")
    else:
        _write_deepspeed(folder, int(engine[-1]), state)
    return folder


def _save_shards(folder: Path, state: dict[str, Any]) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def _write_deepspeed(folder: Path, stage: int, state: dict[str, Any]) -> None:
    states = folder / STATES
    states.mkdir()
    (folder / "latest").write_text(states.name)
    group = state["param_groups"][0]
    for rank in range(RANKS):
        if stage == 3 or rank == 0:
            name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
            model = {"module": {}, "dp_world_size": RANKS, "global_steps": STEP, "lr_scheduler": None}
            torch.save(model, states / f"{name}_model_states.pt")
        partition = {"zero_stage": stage, "partition": torch.ones(8)}
        torch.save({"optimizer_state_dict": partition}, states / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        about = {"rank": rank, "ranks": RANKS, "global_steps": STEP, "mode": group["lora_pro_mode"], "pairs": {}}
        file = states / f"lora_pro_rank{rank}.safetensors"
        save_file({"exp_avg": torch.ones(2)}, file, metadata={"lora_pro": json.dumps(about)})


class Hostile:
    """What makes a folder as it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def plant(file: Path, marker: Path) -> None:
    """Put code into a file that whoever unpickles it runs: it makes the marker."""
    hostile = {"state": Hostile(marker), "param_groups": []}
    if file.name == ".metadata":
        file.write_bytes(pickle.dumps(hostile))
    elif file.suffix == ".distcp":
        _plant_in_shard(file, hostile)
    else:
        torch.save(hostile, file)


def _plant_in_shard(file: Path, hostile: Any) -> None:
    """Have the metadata of a folder point to code in the place of a value that is no tensor."""
    metadata = pickle.loads((file.parent / ".metadata").read_bytes())
    content = io.BytesIO()
    torch.save(hostile, content)
    index = next(index for index in metadata.storage_data if index.fqn.endswith(".lr"))
    info = metadata.storage_data[index]
    info.offset, info.length = file.stat().st_size, len(content.getvalue())
    with file.open("ab") as shard:
        shard.write(content.getvalue())
    (file.parent / ".metadata").write_bytes(pickle.dumps(metadata))
