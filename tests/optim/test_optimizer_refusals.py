"""What LoRAProAdamW refuses: each with the thing and the remedy named, and nothing changed."""

import pytest
import torch
from torch import nn

from lorapro_hf import (
    LoRAProAdamW,
    LoRAProConfig,
    LoRAProOptimizerFactory,
    create_lorapro_optimizer,
    find_lora_pairs,
)
from optimizer_helpers import LINEAR, assert_same, backward, both_modes, ordinary, small_model, snapshot


def test_step_without_any_gradient_is_refused():
    optimizer = create_lorapro_optimizer(small_model(), lr=1e-2)
    other = small_model()
    backward(other)
    with pytest.raises(RuntimeError, match=r"none of the 2 LoRA pairs has a gradient\..*the model that is trained"):
        optimizer.step()


def test_sparse_gradients_are_refused():
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2)
    backward(model)
    weight = ordinary(optimizer)[0]
    weight.grad = weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        optimizer.step()


def construct(**changes):
    model = LINEAR.build()
    pairs = changes.pop("pairs", None)
    pairs = find_lora_pairs(model) if pairs is None else pairs
    return LoRAProAdamW(changes.pop("params", model.parameters()), pairs, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": []}, r"no LoRA pairs to optimize; pass find_lora_pairs\(model\)"),
        ({"params": [nn.Parameter(torch.ones(2))]}, r"body: its factors are not in the optimizer's param_groups"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"lr": None}, "lr=None must be a finite number of at least 0, such as 2e-4"),
        ({"betas": 0.9}, "betas=0.9 must be two numbers"),
        ({"config": {"mode": "slow"}}, "mode='slow' is unknown"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"eps": -1e-8}, "eps="),
        ({"eps": 0.0, "config": {"mode": "full"}}, "eps=0.0 is 0 in float32: in mode 'full' elements.*Use 1e-8"),
        ({"eps": 1e-60, "config": {"mode": "full_8bit"}}, "eps=1e-60 is 0 in float32: in mode 'full_8bit'"),
        ({"eps": 0.0, "config": {"mode": "efficient"}}, "eps=0.0 is 0 in float32: in mode 'efficient'"),
        ({"weight_decay": -0.1}, "weight_decay="),
    ],
)
def test_bad_construction(changes, message):
    with pytest.raises(ValueError, match=message):
        construct(**changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mode": "fast"},
            "mode='fast' is unknown; valid values are 'full', 'full_8bit', 'factored', 'spectral', 'rite', 'efficient'",
        ),
        ({"x_mode": "one"}, "x_mode='one' is unknown; valid values are 'sylvester', 'zero', 'symmetric'"),
        ({"update": "one"}, "update='one' is unknown; valid values are 'linear', 'sequential'"),
        ({"moments_dtype": "float16"}, "moments_dtype='float16' is unknown; valid values are 'float32', 'bfloat16'"),
        ({"backend": "cuda"}, "backend='cuda' is unknown; valid values are 'auto', 'torch', 'triton'"),
        ({"mode": "full_8bit", "moments_dtype": "bfloat16"}, "mode 'full_8bit' .* so moments_dtype='bfloat16' has no"),
        ({"mode": "factored", "backend": "torch"}, "mode 'factored' .* so backend='torch' has no meaning"),
        ({"trust_region": True}, "trust_region=True must be a fraction below 1 such as 0.04, 0 for no limit"),
        ({"trust_region": -0.1}, "trust_region=-0.1 must be a fraction below 1 such as 0.04, 0 for no limit"),
        ({"trust_region": float("inf")}, "trust_region=inf must be a fraction below 1 such as 0.04, 0 for no limit"),
        ({"trust_region": 1}, "trust_region=1 must be a fraction below 1.*could replace the frozen weight"),
        ({"trust_region": 3.0}, r"trust_region=3\.0 must be a fraction below 1"),
        (
            {"mode": "full", "spectral_iterations": 3},
            "mode 'full' does not know it, so spectral_iterations=3 .*use mode 'spectral'",
        ),
        ({"mode": "factored", "rite_clip": 0}, "mode 'factored' does not know it, so rite_clip=0 .*use mode 'rite'"),
        ({"mode": "spectral", "rite_skip": 2}, "mode 'spectral' does not know it, so rite_skip=2 .*use mode 'rite'"),
        ({"mode": "full", "rite_escape": True}, "mode 'full' does not know it, so rite_escape=True .*use mode 'rite'"),
        ({"mode": "rite", "spectral_iterations": 2}, "mode 'rite' does not know it, so spectral_iterations=2"),
        ({"mode": "rite", "update": "sequential"}, "mode 'rite' has one way to move both .* so update='sequential' ha"),
        (
            {"mode": "efficient", "x_mode": "zero"},
            "takes the gradients of the factors as they are, so x_mode='zero' has no meaning.*efficient_projected=True",
        ),
        (
            {"mode": "full", "efficient_projected": True},
            "mode 'full' does not know it, so efficient_projected=True .*mode 'efficient'",
        ),
        ({"mode": "rite", "x_mode": "zero"}, "mode 'rite' has one way to move both factors, so x_mode='zero' has no"),
        ({"mode": "spectral", "backend": "torch"}, "mode 'spectral' .* so backend='torch' has no meaning"),
        ({"mode": "spectral", "spectral_iterations": 0}, "spectral_iterations=0 must be a whole number from 1 on"),
        ({"mode": "spectral", "spectral_iterations": True}, "spectral_iterations=True must be a whole number from 1"),
        (
            {"mode": "spectral", "spectral_iterations": 1.5},
            "spectral_iterations=1.5 must be a whole number from",
        ),
        ({"mode": "rite", "rite_clip": -1}, "rite_clip=-1 must be a number from 0 on; 0 is no limit"),
        ({"mode": "rite", "rite_clip": float("nan")}, "rite_clip=nan must be a number from 0 on"),
        ({"mode": "rite", "rite_skip": float("inf")}, "rite_skip=inf must be a number from 0 on"),
        ({"mode": "rite", "rite_skip": True}, "rite_skip=True must be a number from 0 on"),
        ({"mode": "rite", "rite_escape": 2}, "rite_escape=2 is unknown; valid values are True, False"),
        ({"rtol": 2.0}, r"rtol=2.0 must be a number in \[0, 1\)"),
        ({"rtol": "1e-6"}, r"rtol='1e-6' must be a number in \[0, 1\)"),
        ({"mode": "factord"}, r"mode='factord' is unknown; valid .*\. Did you mean 'factored'\?"),
        ({"modus": "full"}, r"\['modus'\] are no LoRA-Pro settings \(did you mean 'mode'\?\); the settings are \["),
        ({"lora_pro_mode": "full"}, r"\['lora_pro_mode'\] are no .* \(did you mean 'mode'\?\)"),
        ({"mode": "rite", "gradient_clip": 1.0}, r"\['gradient_clip'\] are no .* max_grad_norm .* 'rite' rite_clip"),
        ({"lr": 1e-3}, r"\['lr'\] are no LoRA-Pro settings; the settings are \['mode'"),
    ],
)
def test_bad_config(settings, message):
    with pytest.raises(ValueError, match=message):
        create_lorapro_optimizer(LINEAR.build(), lr=1e-2, config=settings)


@pytest.mark.parametrize("config", ["efficient", LoRAProConfig, 3])
def test_settings_of_a_wrong_kind(config):
    with pytest.raises(TypeError, match="must be a LoRAProConfig or a dictionary of its settings such as"):
        create_lorapro_optimizer(LINEAR.build(), lr=1e-2, config=config)


def test_an_unknown_keyword_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"\['lora_pro_mode'\] are no LoRA-Pro settings \(did you mean 'mode'\?\)"):
        LoRAProConfig(lora_pro_mode="full")


def test_config_round_trip():
    config = LoRAProConfig(mode="efficient", x_mode="zero", rtol=1e-3)
    assert LoRAProConfig.from_dict(config.to_dict()) == config


def test_different_moments_settings_for_one_pair_are_refused_in_full_mode():
    model = LINEAR.build()
    (pair,) = find_lora_pairs(model)
    groups = [{"params": [pair.A], "betas": (0.8, 0.9)}, {"params": [pair.B]}]
    with pytest.raises(ValueError, match=r"body: lora_A and lora_B have different betas or eps.*mode 'efficient'"):
        LoRAProAdamW(groups, [pair], mode="full")
    LoRAProAdamW(groups, [pair], config=LoRAProConfig(mode="efficient"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modus": "full"}, r"\['modus'\] are no LoRA-Pro settings \(did you mean 'mode'\?\); the settings are \["),
        ({"lora_pro_mode": "full"}, r"\['lora_pro_mode'\] are no LoRA-Pro settings \(did you mean 'mode'\?\)"),
        ({"max_grad_norm": 1.0}, r"\['max_grad_norm'\] are no LoRA-Pro settings\. max_grad_norm of the trainer's arg"),
        ({"weigth_decay": 0.1}, r"\['weigth_decay'\] are no LoRA-Pro settings \(did you mean 'weight_decay'\?\)"),
        ({"mode": "full", "config": {}}, r"config= and mode= both hold settings of LoRA-Pro\. Put all of them"),
        ({"trust_region": 3}, "trust_region=3 must be a fraction below 1"),
    ],
)
@pytest.mark.parametrize("build", [create_lorapro_optimizer, LoRAProOptimizerFactory()])
def test_bad_keywords(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(LINEAR.build(), lr=1e-2, **settings)
    if build is create_lorapro_optimizer:
        with pytest.raises(ValueError, match=message):
            construct(**settings)


@both_modes
def test_scaling_zero_at_step_time_is_refused_and_changes_nothing(mode):
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config={"mode": mode})
    backward(model)
    optimizer.pairs[1].layer.set_scale("default", 0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="scaling of adapter 'default' is 0"):
        optimizer.step()
    assert_same(before, snapshot(optimizer))


def test_parameters_swapped_under_the_optimizer_are_refused():
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2)
    layer = optimizer.pairs[0].layer
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.detach().clone())
    backward(model)
    with pytest.raises(ValueError, match="its factors are not in the optimizer's param_groups"):
        optimizer.step()


def test_factory():
    model = LINEAR.build()
    for settings in ({"config": {"mode": "efficient"}}, {"mode": "efficient"}):
        optimizer = LoRAProOptimizerFactory()(model, lr=3e-3, **settings)
        assert isinstance(optimizer, LoRAProAdamW) and optimizer.config.mode == "efficient"
    with pytest.raises(ValueError, match="needs the learning rate"):
        LoRAProOptimizerFactory()(model)
    with pytest.raises(TypeError, match=r"from transformers 5 on.*optimizers=\(create_lorapro_optimizer"):
        LoRAProOptimizerFactory([{"params": list(model.parameters())}], lr=3e-3)


def test_triton_without_cuda_is_refused_before_training():
    with pytest.raises(RuntimeError, match=r"backend='triton' needs CUDA .* the factors are on cpu"):
        create_lorapro_optimizer(small_model(), lr=1e-2, config={"mode": "full", "backend": "triton"})
