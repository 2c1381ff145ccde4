"""The gradients of frozen weights as autograd computes them for trainable ones."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lorapro_hf import find_lora_pairs


def of_autograd(model, loss):
    """Gradients of the frozen weights themselves, shaped like `B @ A`."""
    model = copy.deepcopy(model)
    weights = {pair.name: own_weight(pair).requires_grad_(True) for pair in find_lora_pairs(model)}
    loss(model).backward()
    return {pair.name: as_product(pair, weights[pair.name].grad) for pair in find_lora_pairs(model)}


def own_weight(pair):
    return getattr(pair.layer.get_base_layer(), getattr(pair.layer, "parameter_name", "weight"))


def as_product(pair, weight):
    product = pair.matrix_B(pair.B.detach()) @ pair.matrix_A(pair.A.detach())
    delta = pair.layer.get_delta_weight(pair.adapter_name) / pair.scaling
    if pair.layout == "experts":
        turned = not torch.allclose(product, delta) if product.shape == delta.shape else True
        return weight.mT if turned else weight
    turned = isinstance(pair.layer.get_base_layer(), nn.Embedding) or getattr(pair.layer, "fan_in_fan_out", False)
    return (weight.mT if turned else weight).reshape(product.shape)
