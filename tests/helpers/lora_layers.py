"""The table of layer kinds and adapter settings that LoRA-Pro handles: how to build each one small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D


class Net(nn.Module):
    """One layer named `body`, then a nonlinearity, so that a loss of the output is not linear in the weight."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        many = "MultiheadAttention" in type(self.body).__name__
        x = self.body(x, x, x)[0] if many else self.body(x)
        return torch.tanh(x)


class Invoked(Net):
    """Tells the layer, as PEFT does for aLoRA, at how many last tokens its adapter is on."""

    def forward(self, x):
        return torch.tanh(self.body(x, alora_offsets=[3, 5, 2]))


class Experts(nn.Module):
    """A stack of expert matrices as the MoE blocks of transformers keep them."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(3, 6, 5) if is_transposed else torch.randn(3, 5, 6))

    def forward(self, x):
        weight = self.weight if self.is_transposed else self.weight.mT
        return torch.einsum("bi,eio->beo", x, weight)


class TwoStacks(nn.Module):
    """An MoE block with two expert parameters in one module, around which PEFT nests its wrappers."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        return torch.einsum("beh,eho->beo", torch.tanh(torch.einsum("bi,eih->beh", x, self.up)), self.down)


class UsedTwice(nn.Module):
    """One block called twice, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.again = self.body

    def forward(self, x):
        return self.again(torch.tanh(self.body(x)))


def vectors():
    return torch.randn(9, 6)


def tokens():
    return torch.arange(18).view(3, 6) * 7 % 11


def image():
    return torch.randn(3, 4, 6, 6)


def sequence():
    return torch.randn(3, 4, 8)


def volume():
    return torch.randn(3, 4, 3, 3, 3)


DEFAULTS = {"r": 3, "lora_alpha": 5, "target_modules": ["body"], "init_lora_weights": False}


@dataclass
class Row:
    """A kind of layer or a setting of the adapter."""

    name: str
    model: Callable[[], nn.Module]
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], torch.Tensor] = vectors
    pairs: int = 1
    dtype: torch.dtype = torch.float64

    def build(self, **settings: Any) -> PeftModel:
        """The adapted model, with random factors (B is not zero)."""
        model = self.adapt(self.model(), LoraConfig(**{**DEFAULTS, **self.settings, **settings}))
        return model.to(self.dtype) if self.dtype == torch.float64 else model

    def adapt(self, model: nn.Module, config: LoraConfig) -> PeftModel:
        return get_peft_model(model, config)

    def output(self, model: nn.Module) -> torch.Tensor:
        """What the model makes of the inputs, always the same."""
        torch.manual_seed(1)
        inputs = self.inputs()
        out = model(inputs.to(self.dtype) if inputs.is_floating_point() else inputs)
        return getattr(out, "logits", out)

    def loss(self, model: nn.Module) -> torch.Tensor:
        """A scalar that every output element enters with a weight of its own."""
        out = self.output(model)
        return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()


def quantized(bits: int) -> nn.Module:
    import bitsandbytes as bnb

    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    model = Net(layer).to("cpu")
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def wide_vectors():
    return torch.randn(9, 64)


ALL_ROWS = [
    Row("linear", lambda: Net(nn.Linear(6, 5))),
    Row("linear with rsLoRA", lambda: Net(nn.Linear(6, 5)), {"use_rslora": True}),
    Row("linear with r above the size of the weight", lambda: Net(nn.Linear(6, 5)), {"r": 8}),
    Row("linear with r = 1", lambda: Net(nn.Linear(6, 5)), {"r": 1}),
    Row("linear with a bias on lora_B", lambda: Net(nn.Linear(6, 5)), {"lora_bias": True}),
    Row("linear with DoRA", lambda: Net(nn.Linear(6, 5)), {"use_dora": True}),
    Row(
        "linear with aLoRA",
        lambda: Invoked(nn.Linear(6, 5)),
        {"alora_invocation_tokens": [1]},
        lambda: torch.randn(3, 5, 6),
    ),
    Row("Conv1D of GPT-2", lambda: Net(Conv1D(5, 6)), {"fan_in_fan_out": True}),
    Row("embedding", lambda: Net(nn.Embedding(11, 6)), inputs=tokens),
    Row("embedding with DoRA", lambda: Net(nn.Embedding(11, 6)), {"use_dora": True}, inputs=tokens),
    Row("Conv2d", lambda: Net(nn.Conv2d(4, 6, 3)), inputs=image),
    Row("Conv2d of kernel 1", lambda: Net(nn.Conv2d(4, 6, 1)), inputs=image),
    Row("Conv2d with DoRA", lambda: Net(nn.Conv2d(4, 6, 3)), {"use_dora": True}, inputs=image),
    Row("Conv2d with groups", lambda: Net(nn.Conv2d(4, 6, 3, groups=2)), {"r": 4}, inputs=image),
    Row("Conv1d", lambda: Net(nn.Conv1d(4, 6, 3)), inputs=sequence),
    Row("Conv3d", lambda: Net(nn.Conv3d(4, 6, 2)), inputs=volume),
    Row("MultiheadAttention", lambda: Net(nn.MultiheadAttention(6, 2)), pairs=2),
    Row("experts (in, out)", lambda: Net(Experts(True)), {"target_parameters": ["body.weight"], "target_modules": []}),
    Row("experts (out, in)", lambda: Net(Experts(False)), {"target_parameters": ["body.weight"], "target_modules": []}),
    Row(
        "two expert parameters of one module",
        lambda: Net(TwoStacks()),
        {"target_parameters": ["body.up", "body.down"], "target_modules": []},
        pairs=2,
    ),
    Row("a block used twice", UsedTwice),
    Row("4-bit base", lambda: quantized(4), inputs=wide_vectors, dtype=torch.float32),
    Row("8-bit base", lambda: quantized(8), inputs=wide_vectors, dtype=torch.float32),
]

# Those that the installed PEFT can build.
ROWS = [row for row in ALL_ROWS if set(row.settings) <= set(LoraConfig.__dataclass_fields__)]


def tied_llama(**settings: Any) -> PeftModel:
    """Input embedding and output head adapted by the same factors, held in two parameters each."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=23,
        tie_word_embeddings=True,
    )
    settings = {"r": 3, "target_modules": ["embed_tokens", "lm_head"], "init_lora_weights": False, **settings}
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(ensure_weight_tying=True, **settings))


def peft_ties_adapters() -> bool:
    """Newer versions do; 0.18 has the setting, but ties `modules_to_save` only."""
    if "ensure_weight_tying" not in LoraConfig.__dataclass_fields__:
        return False
    model = tied_llama().base_model.model
    return model.lm_head.lora_B["default"].weight.data_ptr() == (
        model.model.embed_tokens.lora_embedding_A["default"].data_ptr()
    )


needs_weight_tying = pytest.mark.skipif(not peft_ties_adapters(), reason="this PEFT does not tie adapters")
