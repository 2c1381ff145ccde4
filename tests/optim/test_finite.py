"""NaN and Inf in what a training goes on from are told by name, and never saved; gradients are left out of the step."""

from __future__ import annotations

import copy
from math import inf

import pytest
import torch

from grids import rest_slow
from lorapro_hf import LoRAProAdamW, create_lorapro_optimizer, find_lora_pairs, project_lora_gradients
from lorapro_hf.functional.bases import symmetric_eigh
from lorapro_hf.optim import lora_pro
from lorapro_hf.optim.finite import find_broken
from lorapro_hf.optim.projected_gradients import project_pair_gradients_
from optimizer_helpers import backward, ordinary, small_model

CONFIGS = [
    {"mode": "full"},
    {"mode": "full", "update": "sequential"},
    {"mode": "full", "moments_dtype": "bfloat16"},
    {"mode": "full_8bit"},
    {"mode": "factored"},
    {"mode": "factored", "update": "linear"},
    {"mode": "spectral"},
    {"mode": "rite", "rite_escape": True},
    {"mode": "efficient"},
    {"mode": "efficient", "update": "sequential"},
    {"mode": "full", "master_factors": True},
    {"mode": "efficient", "master_factors": True},
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
each_rank = pytest.mark.parametrize("r", rest_slow([3, 1, 2, 4], fast=2))
mostly_rank_3 = pytest.mark.parametrize("r", rest_slow([3, 1, 2, 4]))
FACTOR = r"NaN or Inf in lora_{} of base_model\.model\.3 \(adapter 'default'\)( and 1 more)?\. No step can mend that"


@pytest.fixture
def unread(monkeypatch):
    """As on CUDA: the host does not look at values at each step."""
    monkeypatch.setattr(lora_pro, "can_be_read", lambda tensor: False)


def build(config, r=2, steps=0):
    dtype = torch.bfloat16 if config.get("master_factors") else torch.float32
    optimizer = create_lorapro_optimizer(small_model(dtype, r=r, init_lora_weights=False), lr=1e-3, config=config)
    for _ in range(steps):
        give_gradients(optimizer)
        optimizer.step()
    return optimizer


def give_gradients(optimizer):
    """Finite ones: a factor alone is not."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)


@torch.no_grad()
def spoil(tensor, poison=float("nan")):
    tensor.view(-1)[-1] = poison


def everything(optimizer):
    """Copies of all parameters and all state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return copy.deepcopy([[parameter.detach(), dict(optimizer.state[parameter])] for parameter in parameters])


def assert_unchanged(optimizer, before):
    for (parameter, state), (kept, known) in zip(everything(optimizer), before, strict=True):
        assert torch.equal(parameter.nan_to_num(7.0), kept.nan_to_num(7.0)) and state.keys() == known.keys()
        # masters follow whoever writes parameters
        assert all(torch.equal(state[name], known[name]) for name in state if name != "master")


@each_config
@mostly_rank_3
@pytest.mark.parametrize(
    ("factor", "poison"), [("A", float("nan")), pytest.param("B", float("-inf"), marks=pytest.mark.slow)]
)
def test_the_step_after_names_a_factor_and_changes_nothing(config, r, factor, poison):
    optimizer = build(config, r, steps=2)
    give_gradients(optimizer)
    spoil(getattr(optimizer.pairs[1], factor), poison)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=FACTOR.format(factor)):
        optimizer.step()
    assert_unchanged(optimizer, before)
    assert optimizer.skipped_steps == 0


@each_config
@mostly_rank_3
def test_without_a_look_at_each_step_the_next_look_names_it(config, r, unread):
    optimizer = build(config, r, steps=2)
    assert optimizer.checked_skipped_steps() == 0
    spoil(optimizer.pairs[1].B)
    before = everything(optimizer)
    for _ in range(3):
        give_gradients(optimizer)
        optimizer.step()
    assert_unchanged(optimizer, before)
    assert optimizer.skipped_steps == 3
    for look in (optimizer.checked_skipped_steps, optimizer.state_dict, optimizer.finish_training):
        with pytest.raises(ValueError, match=FACTOR.format("B")):
            look()


@pytest.mark.parametrize("at", [1, 10])
def test_the_first_and_the_tenth_step_look(at, unread):
    optimizer = build({"mode": "full"}, r=1)
    for step in range(1, at + 1):
        give_gradients(optimizer)
        if step == max(1, at - 3):
            spoil(optimizer.pairs[1].A)
        if step == at:
            with pytest.raises(ValueError, match=FACTOR.format("A")):
                optimizer.step()
        else:
            optimizer.step()


def test_steps_left_out_for_gradients_alone_are_only_counted(unread):
    optimizer = build({"mode": "full"}, r=1, steps=1)
    give_gradients(optimizer)
    spoil(optimizer.pairs[0].B.grad)
    optimizer.step()
    assert optimizer.checked_skipped_steps() == 1 == optimizer.state_dict()["param_groups"][0]["skipped_steps"]


def test_the_count_that_a_cuda_graph_adds_to_stays_where_it_is():
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2, mode="efficient")
    counts = set()
    for step in range(2):
        backward(model, step)
        optimizer.step()
        counts.add(optimizer._skipped.data_ptr())
        optimizer.state_dict()  # settles the count
    assert len(counts) == 1


def test_a_training_that_no_step_reaches_is_looked_at():
    """As under the gradient scaler of fp16, or DeepSpeed, which leave out steps themselves."""
    optimizer = build({"mode": "full"}, r=1, steps=2)
    assert optimizer.checked_skipped_steps() == 0
    spoil(optimizer.pairs[1].B)
    with pytest.raises(ValueError, match=FACTOR.format("B")):
        optimizer.checked_skipped_steps()


def test_a_parameter_of_no_pair_is_named():
    optimizer = build({"mode": "full"}, steps=1)
    spoil(ordinary(optimizer)[0])
    with pytest.raises(ValueError, match=r"NaN or Inf in base_model\.model\.4\.modules_to_save\.default\.weight\. No"):
        optimizer.state_dict()
    spoil(optimizer.pairs[0].A)
    with pytest.raises(ValueError, match=r"NaN or Inf in lora_A of base_model\.model\.0 \(adapter 'default'\) and 1 m"):
        optimizer.state_dict()


# ---- moments and learning rates ----


def test_tensors_without_values_are_passed_over():
    named = [("meta", torch.empty(2, device="meta")), ("whole", torch.ones(2)), ("broken", torch.tensor([1.0, inf]))]
    assert find_broken(named[:2]) == ""
    assert find_broken(named) == "broken"


@each_config
def test_moments_of_a_checkpoint_are_named_before_anything_is_loaded(config):
    optimizer = build(config, steps=2)
    saved = optimizer.state_dict()
    loading = build(config, steps=1)
    before, found = everything(loading), 0
    for key, state in saved["state"].items():
        for name, tensor in state.items():
            if tensor.is_floating_point():
                damaged = copy.deepcopy(saved)
                damaged["state"][key][name].fill_(float("inf"))
                with pytest.raises(ValueError, match=f"the checkpoint holds NaN or Inf in '{name}' of base_model.mod"):
                    loading.load_state_dict(damaged)
                found += 1
    assert found >= 12
    assert_unchanged(loading, before)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": float("nan")}, "lr=nan in param group 1 of the checkpoint must be a finite number"),
        ({"lr": torch.tensor(float("inf"))}, r"lr=tensor\(inf\) in param group 1 of the checkpoint must be a finite"),
        ({"weight_decay": float("nan")}, "weight_decay=nan in param group 1 of the checkpoint must be"),
        ({"betas": (0.9, float("nan"))}, r"betas=\(0.9, nan\) in param group 1 of the checkpoint must be"),
    ],
)
def test_settings_of_a_checkpoint_are_named(setting, message):
    optimizer = build({"mode": "full"}, steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1].update(setting)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)


@each_config
def test_a_moment_that_has_been_spoilt_otherwise_is_not_saved(config):
    optimizer = build(config, steps=1)
    name, moment = next((n, x) for n, x in optimizer.state[optimizer.pairs[1].A].items() if x.is_floating_point())
    spoil(moment)
    with pytest.raises(ValueError, match=rf"NaN or Inf in the state '{name}' of lora_A of base_model\.model\.3"):
        optimizer.state_dict()


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), torch.tensor(float("nan"))], ids=str)
def test_a_learning_rate_is_named_before_the_step(lr):
    optimizer = build({"mode": "full"}, steps=2)
    give_gradients(optimizer)
    optimizer.param_groups[1]["lr"] = lr
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"the learning rate of param group 1 is .*optimizer\.param_groups\[1\]\['lr'"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.param_groups[1]["lr"] = 1e-3
    optimizer.step()


def test_a_learning_rate_on_a_device_is_named_at_a_look(monkeypatch):
    monkeypatch.setattr(lora_pro, "can_be_read", lambda tensor: False)
    optimizer = build({"mode": "full"})
    optimizer.param_groups[2]["lr"] = torch.tensor(float("nan"))
    give_gradients(optimizer)
    with pytest.raises(ValueError, match="NaN or Inf in the learning rate of param group 2"):
        optimizer.step()


# ---- gradients that are too long to be squared ----


@pytest.mark.parametrize(
    ("mode", "longest"), [("full", 1.8e19), ("factored", 1e15), ("efficient", 1.8e19), ("full_8bit", 1.8e19)]
)
def test_gradients_are_left_out_beyond_what_second_moments_hold(mode, longest):
    for share, skipped in ((0.9, 0), (1.1, 1)):
        optimizer = build({"mode": mode}, r=1)
        if mode == "efficient":  # whose moments see the gradient of B, here longer by the scaling
            share /= optimizer.pairs[-1].scaling
        for pair in optimizer.pairs:
            pair.A.data.div_(pair.A.data.norm())
            pair.B.data.div_(pair.B.data.norm() * pair.scaling)
            pair.A.grad, pair.B.grad = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
        pair.A.grad.copy_(pair.A).mul_(share * longest)
        pair.B.grad.copy_(pair.B).mul_(pair.scaling * share * longest)
        optimizer.step()
        assert optimizer.skipped_steps == skipped
        if not skipped:
            assert float(optimizer.last_grad_norm) == pytest.approx(share * longest, rel=1e-4)
        optimizer.require_finite()  # no moment has overflown


def test_ordinary_gradients_are_left_out_beyond_what_second_moments_hold():
    for size, skipped in ((1.8e19, 0), (1.9e19, 1)):
        optimizer = build({"mode": "full"})
        give_gradients(optimizer)
        ordinary(optimizer)[0].grad.fill_(size)
        optimizer.step()
        assert optimizer.skipped_steps == skipped
        optimizer.require_finite()


def test_float64_holds_longer_gradients():
    model = small_model(torch.float64, init_lora_weights=False)
    optimizer = create_lorapro_optimizer(model, lr=1e-3, mode="full")
    give_gradients(optimizer)
    optimizer.pairs[0].A.grad.mul_(1e30)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    optimizer.require_finite()


# ---- without an optimizer of ours ----


@each_rank
@pytest.mark.parametrize("factor", ["A", "B"])
def test_projections_name_the_factor(r, factor):
    model = small_model(r=r, init_lora_weights=False)
    backward(model)
    pairs = find_lora_pairs(model)
    spoil(getattr(pairs[1], factor))
    with pytest.raises(ValueError, match=f"the factor {factor} holds NaN or Inf"):
        project_lora_gradients(pairs[1].A, pairs[1].B, pairs[1].A.grad, pairs[1].B.grad, 2.0)
    config = LoRAProAdamW([p for p in model.parameters() if p.requires_grad], pairs, mode="efficient").config
    with pytest.raises(ValueError, match=FACTOR.format(factor)):
        project_pair_gradients_(pairs, config)
    assert all(factor.grad.isfinite().all() for pair in pairs for factor in (pair.A, pair.B))


@each_rank
def test_only_the_broken_matrix_of_a_batch_has_no_eigenvectors(r):
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(4, r, 6, generator=generator, dtype=torch.float64)
    matrices = factors @ factors.mT
    expected = torch.linalg.eigh(matrices)
    matrices[1, -1, -1], matrices[3, 0, 0] = float("nan"), float("inf")
    for found, whole in zip(symmetric_eigh(matrices), expected, strict=True):
        assert found[1].isnan().all() and found[3].isnan().all()
        assert torch.equal(found[0], whole[0]) and torch.equal(found[2], whole[2])
