"""An optimizer steps the pairs that it was built for; a model whose adapters have changed since is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from grids import rest_slow
from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments, create_lorapro_optimizer, find_lora_pairs
from lorapro_hf.optim.groups import require_same_pairs
from trainer_helpers import arguments, assert_same, build, differ, factors, tiny_lora


def two() -> nn.Module:
    model = tiny_lora(target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    return model


def trainer_of(folder: Path, model: nn.Module, **settings: Any) -> Any:
    callbacks = settings.pop("callbacks", [])
    args = arguments(folder, LoRAProTrainingArguments, max_steps=2, **settings)
    return build(LoRAProTrainer, args, model=model, callbacks=callbacks)


def activate_both(model: Any) -> None:
    model.base_model.set_adapter(["default", "other"])


def activate_the_other(model: Any) -> None:
    model.set_adapter("other")


def delete(model: Any) -> None:
    model.delete_adapter("default")


def merge(model: Any) -> None:
    model.merge_adapter()


def unload(model: Any) -> None:
    model.unload()


def load_anew(model: Any) -> None:
    """As PEFT loads adapters in bfloat16: their parameters are new ones, in float32."""
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.double())


CHANGES: dict[Callable[[Any], None], str] = {
    activate_both: r"2 of the model are not in the optimizer, .*v_proj of adapter 'other'.*trainer.optimizer = None",
    activate_the_other: r"not in the optimizer, .*'other'; 2 of the optimizer are not trained, .* adapter 'default'",
    delete: r"not in the optimizer, .*'other'; 2 of the optimizer are not trained, .* adapter 'default'",
    merge: r"adapter 'default' is merged .*unmerge_adapter",
    unload: "has no LoRA layer",
    load_anew: "1 of the model are not in the optimizer, .*layers.0.self_attn.q_proj of adapter 'default'",
}


@pytest.mark.parametrize("change", rest_slow(CHANGES))
def test_second_training_after_the_adapters_changed(change: Callable[[Any], None], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, two())
    trainer.train()
    change(trainer.model)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=CHANGES[change]):
        trainer.train()
    assert_same({name: p.detach() for name, p in trainer.model.named_parameters()}, before)


def test_the_remedy(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, two())
    trainer.train()
    activate_both(trainer.model)
    before = factors(trainer)
    trainer.optimizer = None
    trainer.train()
    after = factors(trainer)
    for name in ("default", "other"):
        assert differ(*({n: p for n, p in each.items() if f".{name}." in n} for each in (before, after)))


def test_second_training_of_the_same_adapters(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, two())
    trainer.train()
    trainer.model.add_adapter("third", LoraConfig(r=2, target_modules=["v_proj"]))  # not active
    trainer.train()


def test_pairs_that_are_stepped_as_ordinary_parameters() -> None:
    """A choice that an optimizer built by hand may have made."""
    model = tiny_lora()
    optimizer = create_lorapro_optimizer(model, lr=1e-2)
    optimizer.pairs = optimizer.pairs[1:]
    require_same_pairs(optimizer.pairs, optimizer.param_groups, find_lora_pairs(model))


class Deleting(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        model.delete_adapter("default")


@pytest.mark.parametrize(
    "make", rest_slow([lambda: tiny_lora(target_modules=["q_proj"]), two]), ids=["the only one", "one of two"]
)
def test_an_adapter_deleted_while_training(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, make(), callbacks=[Deleting()])
    with pytest.raises(RuntimeError, match=r"'default' is no longer in the model: it was deleted .*optimizer = None"):
        trainer.train()


def test_an_adapter_deleted_before_a_step() -> None:
    model = two()
    activate_both(model)
    optimizer = create_lorapro_optimizer(model, lr=1e-2)
    batch = {"input_ids": torch.arange(3, 11)[None], "labels": torch.arange(3, 11)[None]}
    model(**batch).loss.backward()
    model.delete_adapter("other")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="'other' is no longer in the model"):
        optimizer.step()
    assert_same({name: p.detach() for name, p in model.named_parameters()}, before)
