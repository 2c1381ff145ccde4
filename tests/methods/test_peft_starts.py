"""Each start of PEFT that needs no download trains in every mode, over the base that PEFT has left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorapro_hf import create_lorapro_optimizer
from lorapro_hf.config import MODES
from trainer_helpers import sequences, tiny_base

SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def batch() -> dict[str, torch.Tensor]:
    rows = sequences(8)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def corda(model: Any) -> Any:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(), **SETTINGS)

    def run_model() -> None:
        for row in sequences(8):
            model(**{key: value[None] for key, value in row.items()})  # CorDA takes one sequence at a time

    preprocess_corda(model, config, run_model=run_model)
    return get_peft_model(model, config)


def eva(model: Any) -> Any:
    config = LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0), **SETTINGS)
    adapted = get_peft_model(model, config)
    peft.initialize_lora_eva_weights(adapted, [batch()], show_progress_bar=False)
    return adapted


def lora_ga(model: Any) -> Any:
    lora = pytest.importorskip("peft.tuners.lora.loraga", reason="this PEFT has no LoRA-GA")
    config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(), **SETTINGS)
    lora.preprocess_loraga(model, config, lambda: model(**batch()).loss.backward())
    adapted = get_peft_model(model, config)
    adapted.zero_grad()
    return adapted


def named(name: str) -> Callable[[Any], Any]:
    return lambda model: get_peft_model(model, LoraConfig(init_lora_weights=name, **SETTINGS))


STARTS = {"pissa": named("pissa"), "olora": named("olora"), "corda": corda, "eva": eva, "lora_ga": lora_ga}


@pytest.mark.parametrize("mode", [m if m == "full" else pytest.param(m, marks=pytest.mark.slow) for m in MODES])
@pytest.mark.parametrize("name", STARTS)
def test_every_mode_trains_from_the_start(name, mode):
    before = tiny_base()(**batch())
    model = STARTS[name](tiny_base())
    first = model(**batch())
    torch.testing.assert_close(first.logits, before.logits, rtol=1e-3, atol=1e-4)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config={"mode": mode})
    for _ in range(5):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(**batch()).loss < first.loss - 5e-4
    assert optimizer.skipped_steps == 0
    assert all(torch.equal(value, dict(model.named_parameters())[n]) for n, value in base.items())
