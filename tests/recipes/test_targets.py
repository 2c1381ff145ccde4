"""Names in an adapter's settings that match nothing in the model are refused, with the ones that were meant."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.model import AdapterArguments, add_adapter
from lorapro_hf.recipes.targets import require_known_names
from trainer_helpers import tiny_base

LAYERS = "Its linear layers: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lora_target_modules": ["q_porj"]}, f"q_porj (did you mean q_proj or v_proj or o_proj?). {LAYERS}."),
    ({"lora_target_modules": ["q_proj", "qqq", "query"]}, f"has no qqq, query. {LAYERS}."),
    ({"lora_target_modules": ["self_attn.v_prj"]}, "self_attn.v_prj (did you mean self_attn.v_proj or"),
    ({"lora_target_modules": [".*q_porj"]}, "the pattern '.*q_porj' matches no whole name in Llama"),
    ({"lora_target_modules": ["(q_proj"]}, "'(q_proj' is no regular expression: missing )"),
    (
        {"lora_modules_to_save": ["lm_haed"]},
        "LlamaForCausalLM has no lm_haed (did you mean lm_head?).",
    ),
    (
        {"lora_target_parameters": ["mlp.gate_prj.weight"]},
        "has no mlp.gate_prj.weight (did you mean mlp.gate_proj.w",
    ),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_names_that_match_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        add_adapter(tiny_base(), AdapterArguments(**settings), "CAUSAL_LM")
    said = str(raised.value)
    assert message in said and said.startswith(next(iter(settings))) and "\n" not in said


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj"], ["layers.1.mlp.up_proj", "embed_tokens"], r".*layers\.1\..*_proj"]
)
def test_names_that_peft_takes(targets: Any) -> None:
    model, config = tiny_base(), LoraConfig(target_modules=targets, modules_to_save=["lm_head"])
    before = config.to_dict()
    require_known_names(model, config)
    assert config.to_dict() == before
    assert get_peft_model(model, config).targeted_module_names


@pytest.mark.skipif(transformers.__version__ < "5", reason="the experts have these names in the model itself")
def test_names_of_experts_that_peft_translates() -> None:
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    require_known_names(MixtralForCausalLM(config), LoraConfig(target_modules=["q_proj", "w1", "w2", "w3"]))


def test_layers_of_a_sequence_go_by_number() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    require_known_names(model, LoraConfig(target_modules=["0.2"]))
    with pytest.raises(
        UsageError, match=r"Sequential has no 0\.3 \(did you mean 0\.2 or 0\.0\?\)\. .* layers: 0\.0, 0\.2\."
    ):
        require_known_names(model, LoraConfig(target_modules=["0.3"]))
