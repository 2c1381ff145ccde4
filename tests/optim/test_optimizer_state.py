"""LoRAProAdamW's state: its dtype and size, saving, loading, and checkpoints that do not belong to it."""

import copy
import pickle

import pytest
import torch

from lorapro_hf import create_lorapro_optimizer
from lorapro_hf.config import MODE, UPDATE, UPDATES
from optimizer_helpers import assert_same, backward, both_modes, reloaded, small_model, snapshot, take, trained

OTHER = next(update for update in UPDATES if update != UPDATE)


def test_states_with_and_without_escape_are_told_apart():
    states = {escape: trained(mode="rite", rite_escape=escape)[1].state_dict() for escape in (True, False)}
    for escape, saved in states.items():
        _, optimizer = trained(mode="rite", rite_escape=not escape)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=r"is of LoRA-Pro mode 'rite'.*, but this optimizer has LoRA-Pro mode 'ri"):
            optimizer.load_state_dict(saved)
        assert_same(before, snapshot(optimizer))


@pytest.mark.parametrize("mode", ["full", "factored", "spectral", "efficient"])
def test_moments_of_bf16_factors_are_fp32_and_stay_so(mode):
    model, optimizer = trained(dtype=torch.bfloat16, mode=mode)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = create_lorapro_optimizer(small_model(torch.bfloat16), lr=1e-2, config={"mode": mode})
    fresh.load_state_dict(saved)
    for loaded in (optimizer, fresh):
        for pair in loaded.pairs:
            kept = [value for p in (pair.A, pair.B) for k, value in loaded.state.get(p, {}).items() if k != "step"]
            assert kept and all(value.dtype == torch.float32 for value in kept)
    assert_same(([], saved), ([], fresh.state_dict()))
    # The moments hold what bf16 cannot: they were not rounded on the way.
    pair = fresh.pairs[0]
    moment = fresh.state[pair.A if mode == "full" else pair.B]["exp_avg"]
    assert not torch.equal(moment.bfloat16().float(), moment)


def test_an_empty_state_stays_empty_when_it_is_loaded():
    """accelerate loads what it has just saved before it exchanges the parameters."""
    optimizer = create_lorapro_optimizer(small_model(), lr=1e-2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(optimizer.state) == 0


def test_codes_of_8_bits_are_loaded_as_they_are():
    model, optimizer = trained(mode="full_8bit")
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = create_lorapro_optimizer(small_model(), lr=1e-2, config={"mode": "full_8bit"})
    fresh.load_state_dict(saved)
    for pair in fresh.pairs:
        state = fresh.state[pair.A]
        assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.uint8}
        assert {state[name].dtype for name in ("exp_avg_absmax", "exp_avg_sq_absmax")} == {torch.float32}
    assert_same(([], saved), ([], fresh.state_dict()))


@both_modes
def test_a_step_on_zero_gradients_at_lr_zero_is_harmless(mode):
    """torch.distributed.checkpoint makes such a step to create the state."""
    model, optimizer = trained(0, lr=0.0, weight_decay=0.1, mode=mode)
    before = snapshot(optimizer)[0]
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(before, snapshot(optimizer)[0], strict=True))
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


@both_modes
def test_resume_equals_uninterrupted_to_the_bit(mode):
    straight, optimizer = trained(3, mode=mode)
    saved = reloaded({"model": straight.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = small_model()
    resumed.load_state_dict(saved["model"])
    again = create_lorapro_optimizer(resumed, lr=1e-2, config={"mode": mode})
    again.load_state_dict(saved["optimizer"])
    take(range(3, 6), (straight, optimizer), (resumed, again))
    assert_same(snapshot(optimizer), snapshot(again))


def test_skipped_steps_survive_a_resume():
    model, optimizer = trained(0)
    backward(model)
    optimizer.pairs[0].A.grad.fill_(float("nan"))
    optimizer.step()
    again = create_lorapro_optimizer(small_model(), lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    assert again.skipped_steps == 1


@both_modes
def test_state_is_tensors_and_its_size_is_estimated(mode):
    model, optimizer = trained(mode=mode)
    tensors = [(name, value) for state in optimizer.state.values() for name, value in state.items()]
    assert all(isinstance(value, torch.Tensor) for _, value in tensors)
    measured = sum(value.numel() * value.element_size() for name, value in tensors if name != "step")
    assert measured == optimizer.estimated_state_bytes()


@both_modes
def test_optimizer_can_be_copied_and_pickled(mode):
    model, optimizer = trained(mode=mode)
    model2, optimizer2 = pickle.loads(pickle.dumps((model, optimizer)))
    take([1], (model, optimizer), (model2, optimizer2))
    assert_same(snapshot(optimizer), snapshot(optimizer2))


@both_modes
def test_distributed_checkpoint_functions_carry_the_state(mode):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    (model, optimizer), (fresh, again) = trained(2, mode=mode), trained(0, mode=mode)
    set_optimizer_state_dict(fresh, again, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    fresh.load_state_dict(model.state_dict())
    take([2], (model, optimizer), (fresh, again))
    assert_same(snapshot(optimizer), snapshot(again))


@pytest.mark.parametrize("mode", ["full", "factored", "efficient"])
def test_state_of_float64_factors_loads_into_float32_ones(mode):
    _, optimizer = trained(dtype=torch.float64, mode=mode)
    narrow, again = trained(0, mode=mode)
    again.load_state_dict(optimizer.state_dict())
    take([1], (narrow, again))
    assert all(value.dtype == torch.float32 for state in again.state.values() for value in state.values())


def trained_state(mode="full", **options):
    settings = {key: options.pop(key) for key in ("r", "target_modules", "modules_to_save") if key in options}
    model = small_model(**settings)
    optimizer = create_lorapro_optimizer(model, lr=1e-2, mode=mode, **options)
    backward(model)
    optimizer.step()
    return optimizer.state_dict()


def plain_adamw_state():
    model = small_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return optimizer.state_dict()


def renamed_state():
    state = trained_state()
    state["param_groups"][0]["param_names"][1] = "other.layer.weight"
    return state


def damaged_state():
    state = trained_state()
    state["state"][0]["exp_avg"] = torch.zeros(3)
    return state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: trained_state(mode="rite", rite_escape=True),
            "of LoRA-Pro mode 'rite' with escape, but this optimizer has LoRA-Pro mode 'full'",
        ),
        (lambda: trained_state(mode="efficient"), "of LoRA-Pro mode 'efficient'.* has LoRA-Pro mode 'full'"),
        (plain_adamw_state, "checkpoint is of another optimizer"),
        (lambda: trained_state(r=3), r"has shape \[2, 6\], but \[3, 6\] in the checkpoint"),
        (lambda: trained_state(target_modules=["0"]), "2 parameters|param groups|parameters in a group"),
        (renamed_state, "state of 'other.layer.weight' where this optimizer has 'base_model"),
        (lambda: (state := trained_state(), state["state"][0].pop("exp_avg"))[0], "lacks the moments of base_model"),
        (damaged_state, r"has moments of shape \(7, 6\), but \(3,\) in the checkpoint"),
    ],
)
def test_foreign_checkpoints_are_refused_and_change_nothing(make, message):
    optimizer = create_lorapro_optimizer(small_model(), lr=1e-2, mode="full")
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make())
    assert_same(before, snapshot(optimizer))


@pytest.mark.parametrize("earlier", [mode for mode in ("full", "factored") if mode != MODE])
def test_a_mode_that_is_left_open_does_not_change_on_resume(earlier):
    """These were the default once, so that the settings of such a training name no mode."""
    saved = reloaded(trained(mode=earlier)[1].state_dict())
    _, again = trained(0)
    before = snapshot(again)
    with pytest.raises(ValueError, match=rf"mode '{MODE}'\. Resume with .*, mode='{earlier}' \(--lora_pro_mode\)"):
        again.load_state_dict(saved)
    assert_same(before, snapshot(again))
    trained(0, mode=earlier)[1].load_state_dict(saved)


@pytest.mark.parametrize(("name", "value", "other"), [("trust_region", 0.1, 0.2), ("update", OTHER, UPDATE)])
def test_a_setting_that_is_left_open_does_not_change_on_resume(name, value, other):
    _, optimizer = trained(mode="full", **{name: value})
    saved = reloaded(optimizer.state_dict())
    _, again = trained(0, mode="full")
    before = snapshot(again)
    with pytest.raises(ValueError, match=f"was written with {name}={value!r}.* Set {name}={value!r} .*to go on as be"):
        again.load_state_dict(saved)
    assert_same(before, snapshot(again))
    for stated in (value, other):
        _, again = trained(0, mode="full", **{name: stated})
        again.load_state_dict(saved)
        assert {group[name] for group in again.state_dict()["param_groups"]} == {stated}
    _, again = trained(0, mode="rite", rite_clip=0.0)  # which leaves nothing open
    again.load_state_dict(again.state_dict())


def test_efficient_mode_of_an_earlier_version_goes_on_with_projected_gradients():
    saved = trained(mode="efficient", efficient_projected=True)[1].state_dict()
    for group in saved["param_groups"]:
        del group["efficient_projected"]
    with pytest.raises(ValueError, match=r"efficient_projected=True, or by an earlier .* now False"):
        trained(0, mode="efficient")[1].load_state_dict(saved)
    for stated in (True, False):
        trained(0, mode="efficient", efficient_projected=stated)[1].load_state_dict(saved)


@pytest.mark.parametrize("kept", [{"trust_region": 0.03}, {}])
def test_a_trust_region_of_an_earlier_version_is_not_taken_for_one_of_today(kept):
    """Those of early versions limited the product of both changes, at 0.03 where a checkpoint does not say it."""
    saved = trained(mode="full", update="linear")[1].state_dict()
    for group in saved["param_groups"]:
        del group["trust_region"], group["trust_region_of"], group["update"]
        group.update(kept)
    for same in ({}, {"trust_region": 0.03}):
        with pytest.raises(ValueError, match=r"trust_region=0\.03, a limit of the product .* Set trust_region=0 "):
            trained(0, mode="full", update="linear", **same)[1].load_state_dict(saved)
    for other in (0, 0.05):
        _, again = trained(0, mode="full", update="linear", trust_region=other)
        again.load_state_dict(saved)
        assert {group["trust_region"] for group in again.state_dict()["param_groups"]} == {other}
        assert {group["trust_region_of"] for group in again.state_dict()["param_groups"]} == {"weight"}
    settings = {"mode": "efficient", "efficient_projected": True}
    early = trained(**settings)[1].state_dict()
    for group in early["param_groups"]:
        del group["trust_region"], group["trust_region_of"]
    trained(0, **settings)[1].load_state_dict(early)  # which had no limit then
