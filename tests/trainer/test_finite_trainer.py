"""A trainer ends where a factor has become NaN or Inf, by name, instead of saving it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from lorapro_hf import LoRAProAdamW, LoRAProCallback, LoRAProTrainer, find_lora_pairs
from lorapro_hf.optim.lora_pro import unwrap_optimizer
from trainer_helpers import arguments, build, run, tiny_lora

NAMED = r"NaN or Inf in lora_B of base_model\.model\.model\.layers\.0\.mlp\.gate_proj \(adapter 'default'\)"

SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}


class SpoilAt(TrainerCallback):
    """Writes NaN into a factor at the end of a step, and keeps the trainer's steps."""

    def __init__(self, step: int) -> None:
        self.step, self.steps = step, 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps = state.global_step
        if state.global_step == self.step:
            named = {pair.name: pair for pair in find_lora_pairs(model)}
            named["base_model.model.model.layers.0.mlp.gate_proj"].B.data[0, 0] = float("nan")


@pytest.fixture
def unread(monkeypatch):
    """As on CUDA: the host does not look at values at each step."""
    for module in ("lora_pro", "projected_gradients"):
        monkeypatch.setattr(f"lorapro_hf.optim.{module}.can_be_read", lambda tensor: False)


def train(
    folder: Path, spoilt: int, by_callback: bool = False, match: str = NAMED, logging_steps: int = 50, **settings: Any
) -> int:
    """Train in vain and say how far."""
    spoil = SpoilAt(spoilt)
    cls, callbacks = (Trainer, [spoil, LoRAProCallback()]) if by_callback else (LoRAProTrainer, [spoil])
    with pytest.raises(ValueError, match=match):
        run(folder, cls, {"callbacks": callbacks}, max_steps=12, logging_steps=logging_steps, **settings)
    return spoil.steps


def test_the_log_after_a_step_that_was_left_out_ends_it(tmp_path: Path, unread):
    assert train(tmp_path, spoilt=3, logging_steps=5) == 5


def test_nothing_is_written_at_a_save(tmp_path: Path, unread):
    assert train(tmp_path, spoilt=4, **SAVES) == 4
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_end_of_a_training_ends_in_an_error(tmp_path: Path, unread):
    assert train(tmp_path, spoilt=12) == 12


def test_the_first_log_ends_a_training_whose_scaler_leaves_out_all_steps(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(LoRAProAdamW, "step", lambda self, closure=None: None)
    assert train(tmp_path, spoilt=1, logging_steps=2) == 2


@pytest.fixture
def looks(monkeypatch) -> list[bool]:
    """For each look at all values whether it is at the moments, too."""
    found: list[bool] = []
    look = LoRAProAdamW.require_finite

    def noted(self: LoRAProAdamW, state: bool = True) -> None:
        found.append(state)
        look(self, state)

    monkeypatch.setattr(LoRAProAdamW, "require_finite", noted)
    return found


def test_a_save_looks_once(tmp_path: Path, looks: list[bool]):
    trainer = build(
        LoRAProTrainer, arguments(tmp_path, max_steps=2, logging_steps=50, save_strategy="steps", save_steps=1)
    )
    trainer.train()
    # accelerate asks for the state before the first step; then two saves and the end
    assert looks == [True, True, True, True, False]
    unwrap_optimizer(trainer.optimizer).state_dict()
    assert looks[5:] == [True]


def test_a_log_by_one_rank_waits_for_no_other(tmp_path: Path, looks: list[bool]):
    trainer = build(LoRAProTrainer, arguments(tmp_path, max_steps=2, logging_steps=1))
    trainer.train()
    looks.clear()
    for _ in range(2):
        trainer.log({"loss": 1.0})
    assert not looks
    assert trainer.state.log_history[-1]["lora_pro_skipped_steps"] == 0


# ---- optimizers that are not ours ----


def test_the_callback_ends_it_at_the_step(tmp_path: Path):
    assert train(tmp_path, 3, by_callback=True) == 3


def test_the_callback_ends_it_at_a_log_where_steps_are_not_read(tmp_path: Path, unread):
    assert train(tmp_path, 3, by_callback=True, match="NaN or Inf in lora_A of .* and 27 more", logging_steps=5) == 5


def test_the_callback_ends_it_at_a_save_where_steps_are_not_read(tmp_path: Path, unread):
    assert train(tmp_path, 4, by_callback=True, **SAVES) == 4


def test_gradients_that_are_not_finite_are_left_to_another_optimizer(tmp_path: Path):
    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 1:
                find_lora_pairs(model)[0].B.grad[0, 0] = float("nan")

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 1:  # what an optimizer that skips the step leaves behind
                for pair in find_lora_pairs(model):
                    pair.A.data.nan_to_num_(0.1)
                    pair.B.data.nan_to_num_(0.1)

    def sgd(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    model = tiny_lora()
    settings = {"model": model, "callbacks": [Spoil(), LoRAProCallback()], "optimizers": (sgd(model), None)}
    trainer = build(Trainer, arguments(tmp_path, max_steps=4), **settings)
    trainer.train()
    assert trainer.state.global_step == 4
