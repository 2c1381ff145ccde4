"""One small training that is run on one process and on several, whose results must agree."""

import pytest
import torch
from torch import nn

from lorapro_hf import create_lorapro_optimizer, find_lora_pairs
from optimizer_helpers import small_model

STEPS = 10
BATCH = 12  # is divided by 1, 2 and 3 ranks


def config_of(mode, **settings):
    """Settings of a mode, with limits that act on this training."""
    limit = {"rite_clip": 0.05} if mode == "rite" else {}
    return {"mode": mode, "trust_region": 0.03, **limit, **settings}


def slow(cases):
    """Cases of a grid that `make test` leaves out."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


def build(dtype=torch.float64, **settings):
    return small_model(dtype, **settings)


def batches(dtype=torch.float64, steps=STEPS):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(steps, BATCH, 9, generator=generator, dtype=torch.float64).to(dtype)


def share(batch, rank, ranks):
    return batch[rank * BATCH // ranks : (rank + 1) * BATCH // ranks]


def loss_of(model, batch):
    return (model(batch[:, :6]) - batch[:, 6:]).square().mean()


def make_optimizer(model, config, **kwargs):
    if config == "adamw":
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    return create_lorapro_optimizer(model, lr=1e-2, weight_decay=0.1, config=config, **kwargs)


def train(model, optimizer, rank=0, ranks=1, steps=range(STEPS), accumulate=1, clip=None, dtype=torch.float64):
    """Steps on the rank's share of each batch, in `accumulate` parts; the parameters are clipped as Trainer does."""
    data = batches(dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for step in steps:
        optimizer.zero_grad()
        for part in share(data[step], rank, ranks).chunk(accumulate):
            (loss_of(model, part) / accumulate).backward()
        if clip is not None:
            norms.append(float(whole(nn.utils.clip_grad_norm_(parameters, clip))))
        optimizer.step()
    return norms


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def result(model):
    """Copies of all trainable parameters by their names in the unwrapped model."""
    return {
        name.removeprefix("module."): whole(p.detach()).clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def factor_names(model):
    return {
        f"{pair.name}.lora_{letter}.{pair.adapter_name}.weight" for pair in find_lora_pairs(model) for letter in "AB"
    }


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name] - value).norm() / value.norm()
        assert difference <= tolerance, f"{name}: relative difference {difference:.1e}"


def assert_differ(one, other):
    """All factors have moved elsewhere."""
    for name, value in other.items():
        if "lora_" in name:
            assert (one[name] - value).norm() > 1e-3 * value.norm(), name


def single(config, dtype=torch.float64, model_settings=None, **options):
    """The result of the training on one process."""
    model = build(dtype, **(model_settings or {}))
    train(model, make_optimizer(model, config), dtype=dtype, **options)
    return result(model)


def every_mode(trained, rank, ranks, modes, shared, dtypes, model_settings):
    """What `trained` returns in each of the modes, for each value of `shard_states` and dtype."""
    return {
        f"{mode} {shard_states} {dtype}": trained(
            rank,
            ranks,
            config_of(mode, shard_states=shard_states),
            getattr(torch, dtype),
            model_settings=model_settings,
        )
        for mode in modes
        for shard_states in shared
        for dtype in dtypes
    }


def assert_every_mode_equals_one_process(found, modes, shared, tolerances, model_settings):
    """Compare what `every_mode` has returned on each rank with one process."""
    for dtype, tolerance in tolerances.items():
        plain = single("adamw", getattr(torch, dtype), model_settings)
        for mode in modes:
            expected = single(config_of(mode), getattr(torch, dtype), model_settings)
            assert_differ(expected, plain)
            if mode == "rite":
                assert_differ(expected, single(config_of(mode, rite_clip=0.0), getattr(torch, dtype), model_settings))
            # 8-bit codes turn differences of rounding into differences of a code
            allowed = max(tolerance, 1e-3) if mode == "full_8bit" else tolerance
            for of_rank in found:
                for shard_states in shared:
                    assert_close(of_rank[f"{mode} {shard_states} {dtype}"], expected, allowed)
