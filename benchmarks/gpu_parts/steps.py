"""Does a step leave the host free, and can a CUDA graph record and replay it?"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu_parts.oracles import settings_of_modes
from gpu_parts.record import Record, distance
from lorapro_hf import LoRAProAdamW, find_lora_pairs
from lorapro_hf.commands.bench.probes import waits_for_device
from lorapro_hf.commands.bench.workloads import SyntheticModel, Workload
from lorapro_hf.config import MODES
from lorapro_hf.kernels.dense import has_triton
from lorapro_hf.optim.first_steps import FIRST_STEPS

RANK, BEYOND = 16, 80
BLOCK = (("q_proj", 256, 224), ("down_proj", 160, 320))
REPLAYS = 3
LIMIT = 1e-4  # of replays beside eager steps, which run the same kernels


class Training:
    """Pairs of two shapes and a parameter of no pair, with gradients in place, after the steps that wait."""

    def __init__(self, device: torch.device, rank: int, config: dict[str, Any]) -> None:
        dtype = "bf16" if config.get("master_factors") else "fp32"
        self.model = SyntheticModel(Workload("check", BLOCK, 2, rank, dtype), device)
        self.bias = nn.Parameter(torch.ones(50, device=device))
        self.bias.grad = torch.full_like(self.bias, 0.1)
        self.parameters = [*self.model.factors, self.bias]
        self.rate = torch.tensor(1e-3, device=device)
        pairs = find_lora_pairs(self.model.model)
        self.optimizer = LoRAProAdamW(self.parameters, pairs, lr=self.rate, weight_decay=0.1, config=config)  # type: ignore[arg-type]

    def warm_up(self) -> None:
        """Take the first steps, of which two wait for the device."""
        for _ in range(FIRST_STEPS + 1):
            self.optimizer.step()

    def change(self, replay: int) -> None:
        """Other gradients and another rate, in the same memory."""
        for index, parameter in enumerate(self.parameters):
            generator = torch.Generator().manual_seed(100 * replay + index)
            assert parameter.grad is not None
            parameter.grad.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
        self.rate.fill_(1e-3 / (1 + replay))

    def tensors(self) -> list[Tensor]:
        """All parameters and their state."""
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        return [*self.parameters, *(tensor for state in states for _, tensor in sorted(state.items()))]


def check_steps(record: Record) -> None:
    """Check every mode and update, with float32 factors and with bfloat16 factors and master copies."""
    if not record.on_cuda:
        record.not_done("waits of the host and CUDA graphs: they need a GPU")
        return
    if not has_triton():
        record.not_done("waits of the host and CUDA graphs: without triton torch decomposes small matrices, and waits")
        return
    for config in settings_of_modes(RANK):
        for masters in (False, True):
            name = f"{config['mode']} {config['update']}{', bf16 with masters' if masters else ''}"
            whole = {**config, "master_factors": masters}
            record.attempt(f"{name}: waits", partial(check_waits, record, name, whole))
            record.attempt(f"{name}: CUDA graph", partial(check_graph, record, name, whole))
    for mode in MODES:
        record.attempt(f"{mode}: waits at r={BEYOND}", partial(_note_waits, record, mode))


def check_waits(record: Record, name: str, config: dict[str, Any]) -> None:
    """A step in which the host may not wait: of all pairs, and of all but one."""
    training = Training(record.device, RANK, config)
    training.warm_up()
    _require_no_wait(record, name, training)
    for factor in training.model.factors[:2]:
        factor.grad = None
    training.optimizer.step()  # compiles what a part of the pairs needs
    _require_no_wait(record, f"{name}, one pair without a gradient", training)


def _require_no_wait(record: Record, name: str, training: Training) -> None:
    reason = waits_for_device(training.optimizer.step)
    record.check(f"{name}: waits for the device", float(reason is not None), 0)
    if reason is not None:
        record.found.figures[f"{name} waits"] = reason


def check_graph(record: Record, name: str, config: dict[str, Any]) -> None:
    """Replays of a recorded step beside eager steps, with other gradients, other rates and one step to be skipped."""
    training, twin = (Training(record.device, RANK, config) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training.warm_up()
    torch.cuda.current_stream().wait_stream(side)
    twin.warm_up()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training.optimizer.step()
    for replay in range(REPLAYS):
        for each in (training, twin):
            each.change(replay)
        graph.replay()
        twin.optimizer.step()
    pairs = zip(training.tensors(), twin.tensors(), strict=True)
    record.check(f"{name}: replays beside eager steps", max(distance(one, other) for one, other in pairs), LIMIT)
    before = [tensor.detach().clone() for tensor in training.tensors()]
    for skipped in (1, 2):
        training.optimizer.state_dict()  # settles the count of skipped steps
        assert training.bias.grad is not None
        training.bias.grad[0] = torch.nan
        graph.replay()
        missed = skipped - training.optimizer.skipped_steps
        record.check(f"{name}: skipped replays that are not counted, {skipped}", float(abs(missed)), 0)
    changed = sum(not torch.equal(one, other) for one, other in zip(before, training.tensors(), strict=True))
    record.check(f"{name}: tensors that a skipped replay changes", float(changed), 0)


def _note_waits(record: Record, mode: str) -> None:
    """Why a step waits at a rank beyond the eigensolver, which is no error."""
    training = Training(record.device, BEYOND, {"mode": mode})
    training.warm_up()
    record.found.figures[f"{mode} waits at r={BEYOND}"] = waits_for_device(training.optimizer.step)
