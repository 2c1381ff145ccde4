"""Compares three ways of storing steps that are smaller than the spacing of bfloat16 factors.

    python benchmarks/narrow_factors.py           # about twenty minutes on one core; no GPU, no download
    python benchmarks/narrow_factors.py --quick   # a few steps of one seed, to see that it runs; keeps no file

Prints the tables that `docs/precision.md` sums up and writes them to `narrow_factors.md` beside this script, or to
`--output`. Base model and factors are in bfloat16. The new factors are rounded to the nearest, rounded stochastically
(to either neighbor, so that the mean is right), or kept in float32 masters, which are rounded to the parameters. All
trainings start from the same factors and see the same batches. The script compares their last parameters in float32
with those of a training with float32 factors under autocast, which computes the same products of the same base. A new
adapter, with B = 0, is trained at usual learning rates; a trained adapter is trained further at small rates.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from lorapro_hf import LoRAProAdamW, create_lorapro_optimizer
from lorapro_hf.kernels.storage import dithered

RANK, SCALING, WARM_UP, HELD_OUT = 8, 2.0, 10, 8
MODES = ("full", "efficient", "factored")
WAYS = ("float32 factors", "float32 throughout", "nearest", "stochastic", "masters")


class Size(NamedTuple):
    """How much to run, and the learning rates of the modes in their order."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: tuple[int, int] = (300, 200)  # on the network and on the language model
    usual: tuple[float, float, float] = (3e-4, 1e-3, 3e-4)
    small: tuple[float, float, float] = (1e-5, 5e-5, 1e-5)


QUICK = Size(seeds=(0,), steps=(2, 2))


class Task(NamedTuple):
    """What to train: a base model and the loss of a batch, both drawn from a seed."""

    base: Callable[[int], nn.Module]
    loss: Callable[[nn.Module, int, int], Tensor]  # of a model, a seed and the number of a batch
    targets: str | list[str]


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = seed * 10007 + number
    return torch.Generator().manual_seed(seed)


def _layers(seed: int, change: float = 0.0) -> list[Tensor]:
    start, moved = _generator(1, seed), _generator(2, seed)
    shapes = (64, 48), (24, 64)
    return [
        (torch.randn(*shape, generator=start) + change * torch.randn(*shape, generator=moved)) / shape[1] ** 0.5
        for shape in shapes
    ]


def network(seed: int) -> nn.Module:
    """Two layers, to be fine-tuned towards `_layers(seed, 0.5)`."""
    layers = [nn.Linear(weight.shape[1], weight.shape[0], bias=False) for weight in _layers(seed)]
    for layer, weight in zip(layers, _layers(seed), strict=True):
        layer.weight.data.copy_(weight)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def network_loss(model: nn.Module, seed: int, batch: int) -> Tensor:
    """Mean square of the distance to the noisy target."""
    generator, (first, second) = _generator(3, seed, batch), _layers(seed, 0.5)
    inputs = torch.randn(64, 48, generator=generator)
    noise = 0.1 * torch.randn(64, 24, generator=generator)
    target = torch.tanh(inputs @ first.T) @ second.T + noise
    return (model(inputs.to(_dtype(model))).float() - target).square().mean()


def language_model(seed: int) -> nn.Module:
    """A Llama of one layer with random weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def language_loss(model: nn.Module, seed: int, batch: int) -> Tensor:
    """Cross-entropy of the next token in sequences of a random Markov chain."""
    chain = torch.softmax(3 * torch.randn(64, 64, generator=_generator(4, seed)), dim=-1)
    generator = _generator(5, seed, batch)
    tokens = [torch.randint(64, (16,), generator=generator)]
    for _ in range(12):
        tokens.append(torch.multinomial(chain[tokens[-1]], 1, generator=generator)[:, 0])
    ids = torch.stack(tokens, dim=1)
    logits = model(input_ids=ids[:, :-1]).logits.float()
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


TASKS = {
    "network": Task(network, network_loss, ["0", "2"]),
    "language model": Task(language_model, language_loss, "all-linear"),
}


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _adapted(task: Task, seed: int, way: str, is_new: bool) -> PeftModel:
    """The model with factors that bfloat16 can hold."""
    base = task.base(seed).bfloat16()
    adapter = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=task.targets)
    torch.manual_seed(seed)
    model = get_peft_model(base, adapter, autocast_adapter_dtype=False)  # as narrow as the base
    generator = _generator(6, seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not is_new:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    if way == "float32 throughout":
        return model.float()
    if way == "float32 factors":
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    return model


@torch.no_grad()
def _round_stochastically(optimizer: LoRAProAdamW) -> None:
    """Have the masters, and with them the parameters, hold nothing that bfloat16 does not."""
    for pair in optimizer.pairs:
        for factor in (pair.A, pair.B):
            master = optimizer.state[factor]["master"]
            master.copy_(dithered(master, optimizer.state[factor]["step"]))
            factor.copy_(master)


def _product(model: nn.Module) -> Tensor:
    """`s B A` of all layers, in one vector."""
    modules = [module for module in model.modules() if hasattr(module, "lora_A")]
    factors = [(module.lora_A["default"].weight, module.lora_B["default"].weight) for module in modules]
    return torch.cat([(SCALING * B.detach().float() @ A.detach().float()).flatten() for A, B in factors])


@torch.no_grad()
def _held_out(task: Task, model: PeftModel, seed: int) -> float:
    return _mean([task.loss(model.float(), seed, 10**6 + batch).item() for batch in range(HELD_OUT)])


def train(
    task: Task, seed: int, way: str, mode: str, lr: float, steps: int, is_new: bool = True
) -> tuple[Tensor, float]:
    """How the weights have changed at the end of one training, and the held-out loss."""
    model = _adapted(task, seed, way, is_new).train()
    start = _product(model)
    # Steps without a limit, and in mode factored sequential ones: it is the rounding that is compared.
    config: dict[str, Any] = {"mode": mode, "trust_region": 0, "master_factors": way in ("stochastic", "masters")}
    if mode == "factored":
        config["update"] = "sequential"
    optimizer = create_lorapro_optimizer(model, lr=lr, config=config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, (t + 1) / WARM_UP) * (1 - t / steps))
    for step in range(steps):
        optimizer.zero_grad()
        autocast = torch.autocast("cpu", torch.bfloat16) if way == "float32 factors" else nullcontext()
        with autocast:
            loss = task.loss(model, seed, step)
        loss.backward()
        optimizer.step()
        schedule.step()
        if way == "stochastic":
            _round_stochastically(optimizer)
    return _product(model) - start, _held_out(task, model, seed)


def table(task: Task, seeds: Sequence[int], steps: int, rates: Sequence[float], is_new: bool) -> list[str]:
    """A row for each mode: how far the ways end from the training with float32 factors, and at which loss."""
    lines = [f"| mode | learning rate | loss at first | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 3) + "|"]
    first = [_held_out(task, _adapted(task, seed, WAYS[0], is_new), seed) for seed in seeds]
    for mode, lr in zip(MODES, rates, strict=True):
        losses: dict[str, list[float]] = {way: [] for way in WAYS}
        distances: dict[str, list[float]] = {way: [] for way in WAYS}
        for seed in seeds:
            measure = torch.empty(0)
            for way in WAYS:
                change, loss = train(task, seed, way, mode, lr, steps, is_new)
                measure = change if way == WAYS[0] else measure
                losses[way].append(loss)
                distances[way].append(float((change - measure).norm() / measure.norm()))
        cells = [f"{_mean(losses[WAYS[0]]):.4f}"]
        cells += [f"{_mean(losses[way]):.4f} / {_mean(distances[way]):.1%}" for way in WAYS[1:]]
        lines.append(f"| {mode} | {lr:g} | {_mean(first):.4f} | {' | '.join(cells)} |")
    return lines


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def report(size: Size) -> str:
    """All tables, with what they were made with."""
    seeds = ", ".join(map(str, size.seeds))
    lines = [
        "# Storing the steps of bfloat16 factors\n",
        f"`python benchmarks/narrow_factors.py`, torch {torch.__version__} on {platform.machine()}; means of seeds "
        f"{seeds}; rank {RANK}, scaling {SCALING:g}; {size.steps[0]} steps of the network, {size.steps[1]} of the "
        f"language model; learning rates rise over {WARM_UP} steps and fall to 0. Held-out loss / distance of the "
        "change of `s B A` to that with float32 factors, relative to its length.",
    ]
    for kind, rates, is_new in (
        ("a new adapter at usual rates", size.usual, True),
        ("trained on at small rates", size.small, False),
    ):
        for (name, task), steps in zip(TASKS.items(), size.steps, strict=True):
            lines += [f"\n{name.capitalize()}, {kind}:\n", *table(task, size.seeds, steps, rates, is_new)]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps of one seed; writes no file unless told where")
    parser.add_argument("--output", type=Path, help="file to write (default: narrow_factors.md beside this script)")
    options = parser.parse_args(arguments)
    output = options.output or (None if options.quick else Path(__file__).with_suffix(".md"))
    text = report(QUICK if options.quick else Size())
    print(text, end="")
    if output is not None:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are too small to share out, and sums keep their order
    main()
