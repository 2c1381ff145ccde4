"""How does a task get a small pretrained model without a download? It is trained here once, and kept."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from lorapro_hf.commands.compare.plan import digest
from lorapro_hf.commands.compare.tasks.base import Batch, to_device

RECIPE = 1  # raise it when the trainings below, the models or their data change
_WARMUP = 100
_CHECK = "sha256"


def pretrained(
    name: str,
    make: Callable[[], Any],
    facts: dict[str, Any],
    batches: Callable[[], Iterable[Batch]],
    loss_of: Callable[[Any, Batch], tuple[Tensor, int]],
) -> Any:
    """A model with the weights of its pretraining: from the cache, or trained now and stored there.

    `make` makes the model from torch's generator. `facts` are plain values that decide how the training ends, among
    them its `steps` and `learning_rate`; their hash and that of the versions is in the name of the file. A process
    that finds another one training waits for its result.
    """
    # sums of another device end in other digits
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "recipe": RECIPE}
    path = cache_folder() / f"{name}-{digest({**facts, **versions, 'device': device.type})}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")), torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        if not _read(model, path):
            _train(model.to(device), name, facts, batches(), loss_of)
            _write(model.cpu(), path)
    return model.eval()


def cache_folder() -> Path:
    """The folder of pretrained models, in that of Hugging Face (`HF_HOME`, or else by `XDG_CACHE_HOME`)."""
    return Path(constants.HF_HOME) / "lorapro_hf"


def _train(
    model: Any,
    name: str,
    facts: dict[str, Any],
    batches: Iterable[Batch],
    loss_of: Callable[[Any, Batch], tuple[Tensor, int]],
) -> None:
    """AdamW, a warm-up and half a cosine."""
    steps, rate = facts["steps"], facts["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARMUP) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
    )
    model.train()
    for batch in tqdm(batches, f"Pretraining for {name}, once", total=steps, disable=None, leave=False):
        loss_of(model, to_device(batch, model))[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def _write(model: nn.Module, path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    partial = path.with_suffix(f".{os.getpid()}")
    save_file(state, partial, metadata={_CHECK: _hash(state)})
    os.replace(partial, path)


def _read(model: nn.Module, path: Path) -> bool:
    """Take the weights from the file; a damaged one is left to be made again."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            intact = (file.metadata() or {}).get(_CHECK) == _hash(state)
    except (OSError, SafetensorError):
        intact = False
    if intact:
        model.load_state_dict(state)
    else:
        print(f"{path} is damaged and is made again.", file=sys.stderr)
    return intact


def _hash(state: dict[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name in sorted(state):
        content.update(name.encode())
        content.update(state[name].numpy().tobytes())
    return content.hexdigest()
