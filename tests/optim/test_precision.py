"""Mixed and narrow precision, quantised bases, checkpointing, compiled models and clipping: every row of the docs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from packaging.version import Version
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, set_seed

from grids import rest_slow
from lorapro_hf import (
    LoRAProCallback,
    LoRAProOptimizerFactory,
    LoRAProTrainer,
    LoRAProTrainingArguments,
    create_lorapro_optimizer,
)
from lorapro_hf.config import MODES
from optimizer_helpers import backward, small_model
from trainer_helpers import VOCABULARY, arguments, assert_same, build, factors, logged, run, sequences, tiny_lora

FLOAT_MODES = ["full", "factored", "spectral", "rite", "efficient"]
each_mode = pytest.mark.parametrize("mode", FLOAT_MODES)
mostly_full = pytest.mark.parametrize("mode", rest_slow(FLOAT_MODES))
# Second moments of r x r are inverted, and so exact.
WIDER = {"rite": {torch.float64}}
# An element moves by about a fifth of the rate.
RATES = {"spectral": 5.0}
LR = 1e-2


@pytest.fixture(autouse=True)
def _leave_no_settings(monkeypatch):
    # transformers leaves these behind for every later test of the process
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def _needs_bitsandbytes():
    pytest.importorskip("bitsandbytes")


class Watch(TrainerCallback):
    """Collects what `look(model)` gives before each step of the optimizer."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self.look(kwargs["model"]))


def dtypes_of_gradients(model: nn.Module) -> set[torch.dtype]:
    return {p.grad.dtype for p in model.parameters() if p.requires_grad}


def moved(trainer: Trainer) -> torch.Tensor:
    """How far all factors have come from where they started, in one vector."""
    start = {name: p.detach() for name, p in tiny_lora().named_parameters()}
    return torch.cat([(p.float() - start[name]).flatten() for name, p in factors(trainer).items()])


def moments(optimizer: Any) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]


# ---- bf16 ----


@pytest.mark.parametrize("mode", rest_slow(MODES))
def test_bf16_autocast_steps_float32_adapters_in_float32(tmp_path: Path, mode: str):
    settings = {"lora_pro_mode": mode, "adam_epsilon": 1e-4, "learning_rate": 1e-3}
    exact, watch = run(tmp_path / "a", **settings), Watch(dtypes_of_gradients)
    mixed = run(tmp_path / "b", build_with={"callbacks": [watch]}, bf16=True, **settings)
    assert watch.seen == [{torch.float32}] * 6
    assert {tensor.dtype for tensor in factors(mixed).values()} == {torch.float32}
    allowed = {torch.float32, torch.uint8} | WIDER.get(mode, set())
    assert {moment.dtype for moment in moments(mixed.optimizer)} <= allowed
    assert logged(mixed, "loss") != logged(exact, "loss")  # autocast was in force
    # bfloat16 keeps 8 bits of each product
    assert (moved(mixed) - moved(exact)).norm() < 0.1 * moved(exact).norm()
    for key in ("grad_norm", "lora_pro_grad_norm"):
        for one, other in zip(logged(mixed, key), logged(exact, key), strict=True):
            assert math.isclose(one, other, rel_tol=2e-2)


@each_mode
def test_a_step_under_autocast_is_the_same_to_the_bit(mode: str):
    found = []
    for enabled in (False, True):
        model = tiny_lora()
        optimizer = create_lorapro_optimizer(model, lr=LR, config={"mode": mode})
        for batch in batches(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
            optimizer.zero_grad()
        found.append(trained(model))
    assert_same(*found)


@pytest.mark.parametrize("masters", rest_slow([True, False]))
@mostly_full
def test_narrow_adapters(tmp_path: Path, mode: str, masters: bool):
    rate = 1e-3 * RATES.get(mode, 1.0)
    settings = {"lora_pro_mode": mode, "adam_epsilon": 1e-4, "learning_rate": rate, "max_steps": 8}
    exact, watch = run(tmp_path / "a", **settings), Watch(dtypes_of_gradients)
    build_with = {"model": tiny_lora().bfloat16(), "callbacks": [watch]}
    narrow = run(tmp_path / "b", build_with=build_with, lora_pro_master_factors=masters, **settings)
    assert watch.seen == [{torch.bfloat16}] * 8
    assert {tensor.dtype for tensor in factors(narrow).values()} == {torch.bfloat16}
    assert {moment.dtype for moment in moments(narrow.optimizer)} == {torch.float32} | WIDER.get(mode, set())
    assert logged(narrow, "loss")[-1] < logged(narrow, "loss")[0]
    assert (moved(narrow) - moved(exact)).norm() < 0.3 * moved(exact).norm()


# ---- fp16 and its gradient scaler ----


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    rows = sequences(4 * count)
    return [
        {name: torch.stack([row[name] for row in rows[4 * i : 4 * i + 4]]) for name in rows[0]} for i in range(count)
    ]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def kept(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    state = {
        f"{of} of {parameter}": value.clone()
        for parameter, p in model.named_parameters()
        for of, value in optimizer.state.get(p, {}).items()
    }
    return {**trained(model), **state}


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("mode", rest_slow(MODES))
def test_steps_that_the_scaler_leaves_out_change_nothing(mode: str, accelerated: bool):
    model, plain_model = tiny_lora(lora_bias=True), tiny_lora(lora_bias=True)
    config = {"lr": LR, "config": {"mode": mode}, "eps": 1e-4}
    optimizer, plain = create_lorapro_optimizer(model, **config), create_lorapro_optimizer(plain_model, **config)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    Accelerator(cpu=True)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler) if accelerated else optimizer
    scales, norms = [], []
    for step, batch in enumerate(batches(5)):
        scaler.scale(model(**batch).loss).backward()
        if step == 2:
            optimizer.pairs[3].A.grad[0, 0] = float("inf")
        before = kept(model, optimizer)
        scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        if accelerated:
            wrapped.step()
            assert wrapped.step_was_skipped is (step == 2)
        else:
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
        if step == 2:
            assert_same(before, kept(model, optimizer))
        else:  # the same without a scaler, on powers of two
            plain_model(**batch).loss.backward()
            assert nn.utils.clip_grad_norm_(plain_model.parameters(), 0.5).item() == norms[-1]
            plain.step()
            assert torch.equal(optimizer.last_grad_norm, plain.last_grad_norm)
        optimizer.zero_grad()
        plain.zero_grad()
    assert scales == [1024.0, 1024.0, 512.0, 512.0, 512.0] and not math.isfinite(norms[2])
    assert_same(kept(plain_model, plain), kept(model, optimizer))
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}
    assert optimizer.skipped_steps == 0  # the scaler counts its own


@pytest.mark.slow
def test_fp16_autocast_in_a_loop():
    model, exact = tiny_lora(), tiny_lora()
    optimizers = [create_lorapro_optimizer(each, lr=1e-3, eps=1e-4) for each in (model, exact)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    taken = 0
    for batch in batches(2) * 15:
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch).loss
        scale, before = scaler.get_scale(), kept(model, optimizers[0])
        scaler.scale(loss).backward()
        scaler.step(optimizers[0])
        scaler.update()
        if scaler.get_scale() < scale:  # overflow in float16: left out
            assert_same(before, kept(model, optimizers[0]))
        else:
            taken += 1
            exact(**batch).loss.backward()
            optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert 5 <= taken < 30 and scaler.get_scale() < 2.0**40
    assert {float(optimizers[0].state[pair.A]["step"]) for pair in optimizers[0].pairs} == {float(taken)}
    start, exactly = trained(tiny_lora()), trained(exact)
    for name, factor in trained(model).items():
        assert (factor - exactly[name]).norm() < 0.1 * (exactly[name] - start[name]).norm()


@mostly_full
def test_fp16_in_trainer(tmp_path: Path, mode: str):
    """On the CPU accelerate runs fp16 without autocast and scaler; here they are put where it has them on CUDA."""
    settings = {"lora_pro_mode": mode, "fp16": True, "adam_epsilon": 1e-4}
    found: dict[str, Any] = {"scales": [], "before": [], "after": []}

    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                found["before"].append(kept(kwargs["model"], kwargs["optimizer"]))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found["scales"].append(scaler.get_scale())
            if state.global_step == 4:
                found["after"].append(kept(kwargs["model"], kwargs["optimizer"]))

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (float("inf") if trainer.state.global_step == 3 else 1.0)

    trainer = build(LoRAProTrainer, arguments(tmp_path, LoRAProTrainingArguments, **settings), callbacks=[Spoil()])
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    assert trainer.accelerator.mixed_precision == "fp16"
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, scaler
    next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(spoil)
    trainer.train()
    assert found["scales"] == [256.0] * 3 + [128.0] * 3
    assert_same(found["before"][0], found["after"][0])
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {5.0}
    assert all(math.isfinite(value) for value in logged(trainer, "lora_pro_grad_norm"))
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]


# ---- quantised bases ----


def quantized_lora(folder: Path, bits: int, **settings: Any) -> Any:
    """A tiny Llama with all its linear layers but the head in 4 or 8 bits, as `from_pretrained` makes it."""
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_key_value_heads=2)).save_pretrained(folder)
    if bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    else:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map="cpu")
    model = prepare_model_for_kbit_training(model, **settings)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.usefixtures("_needs_bitsandbytes")
@pytest.mark.parametrize("bits", rest_slow([4, 8]))
@mostly_full
def test_quantized_bases_train(tmp_path: Path, bits: int, mode: str):
    def train(name: str, **settings: Any) -> Any:
        model = quantized_lora(tmp_path / f"base {name}", bits, **settings)
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        assert any(p.dtype in (torch.uint8, torch.int8) for p in frozen.values())
        rate = 1e-2 * RATES.get(mode, 1.0)
        trainer = run(
            tmp_path / name, build_with={"model": model}, lora_pro_mode=mode, learning_rate=rate, max_steps=12
        )
        assert_same(frozen, {n: p for n, p in trainer.model.named_parameters() if not p.requires_grad})
        return trainer

    plain = train("plain", use_gradient_checkpointing=False)
    assert len(plain.optimizer.optimizer.pairs) == 14
    losses = logged(plain, "loss")
    assert sum(losses[-3:]) < 0.985 * sum(losses[:3])
    if mode == "full":
        for use_reentrant in (True, False):
            checkpointed = train(
                f"reentrant {use_reentrant}", gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
            )
            assert checkpointed.model.base_model.model.is_gradient_checkpointing
            assert_same(factors(plain), factors(checkpointed), rtol=1e-4, atol=1e-5)


# ---- gradient checkpointing ----


@pytest.mark.parametrize("use_reentrant", rest_slow([True, False]))
@mostly_full
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, mode: str, use_reentrant: bool):
    settings = {"lora_pro_mode": mode, "adam_epsilon": 1e-4, "max_steps": 4}

    def train(name: str, **more: Any) -> Any:
        model = tiny_lora(lora_dropout=0.2)
        model.enable_input_require_grads()  # without which the reentrant kind would reach no adapter
        return run(tmp_path / name, build_with={"model": model}, **settings, **more)

    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    plain, checkpointed = train("a"), train("b", gradient_checkpointing=True, **checkpointing)
    assert checkpointed.model.base_model.model.is_gradient_checkpointing
    assert_same(factors(plain), factors(checkpointed), rtol=1e-5, atol=1e-6)
    assert logged(plain, "lora_pro_grad_norm") == pytest.approx(logged(checkpointed, "lora_pro_grad_norm"), rel=1e-5)


# ---- compiled models ----


@pytest.mark.slow
@each_mode
def test_compiled_models_train_alike(tmp_path: Path, mode: str):
    settings = {"lora_pro_mode": mode, "adam_epsilon": 1e-4, "max_steps": 4}
    plain = run(tmp_path / "a", **settings)
    compiled = run(tmp_path / "b", torch_compile=True, torch_compile_backend="aot_eager", **settings)
    assert hasattr(compiled.model_wrapped, "_orig_mod")
    assert_same(factors(plain), factors(compiled), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_in_a_loop():
    ends = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager")):
        model = wrap(small_model())
        optimizer = create_lorapro_optimizer(model, lr=LR, eps=1e-4)
        assert len(optimizer.pairs) == 2
        for step in range(3):
            backward(model, step)
            optimizer.step()
        ends.append({name.removeprefix("_orig_mod."): value for name, value in trained(model).items()})
    assert_same(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_by_inductor(tmp_path: Path):
    settings = {"adam_epsilon": 1e-4, "max_steps": 3}
    plain, compiled = run(tmp_path / "a", **settings), run(tmp_path / "b", torch_compile=True, **settings)
    assert_same(factors(plain), factors(compiled), rtol=1e-3, atol=1e-4)


# ---- clipping ----


@pytest.mark.parametrize("max_grad_norm", rest_slow([0.05, 1e9]))
def test_clipping_means_the_same_on_every_path(tmp_path: Path, max_grad_norm: float):
    if Version(transformers.__version__) < Version("5"):
        pytest.skip("transformers 4 knows no optimizer factories")
    settings = {"max_grad_norm": max_grad_norm, "adam_epsilon": 1e-4, "weight_decay": 0.1}
    raw = Watch(lambda model: nn.utils.get_total_norm([p.grad for p in model.parameters() if p.requires_grad]).item())
    of_mode = {"lora_pro_mode": "efficient", "lora_pro_efficient_projected": True}
    trainer = run(tmp_path / "a", build_with={"callbacks": [raw]}, **of_mode, **settings)
    config = {"mode": "efficient", "efficient_projected": True}
    options = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, "config": config}
    factory = run(tmp_path / "b", Trainer, {"optimizer_cls_and_kwargs": (LoRAProOptimizerFactory, options)}, **settings)
    callback = LoRAProCallback()
    with_callback = run(tmp_path / "c", Trainer, {"callbacks": [callback]}, **settings)
    assert_same(factors(trainer), factors(factory), rtol=1e-5, atol=1e-6)
    assert_same(factors(trainer), factors(with_callback), rtol=1e-4, atol=1e-5)
    # Logged: of the raw gradients before clipping, the same on every path; and of the equivalent gradient after it.
    norms = logged(trainer, "grad_norm")
    for other in (factory, with_callback):
        assert norms == pytest.approx(logged(other, "grad_norm"), rel=1e-3)
    last = logged(trainer, "lora_pro_grad_norm")[-1]
    assert float(factory.optimizer.optimizer.last_grad_norm) == pytest.approx(last, rel=1e-3)
    assert float(callback.last_grad_norm) == pytest.approx(last, rel=1e-3)
    # What the optimizer was given: raw gradients, of the norm asked for.
    assert raw.seen == pytest.approx([min(norm, max_grad_norm) for norm in norms], rel=1e-3)
    assert len(norms) == len(logged(trainer, "lora_pro_grad_norm")) == 6 and min(norms) > 0.05


@pytest.mark.parametrize("mode", rest_slow(mode for mode in FLOAT_MODES if mode != "rite"))  # which refuses the limit
def test_the_equivalent_gradient_scales_with_the_clipped_one(tmp_path: Path, mode: str):
    free, clipped = (
        run(tmp_path / str(norm), max_grad_norm=norm, max_steps=1, lora_pro_mode=mode) for norm in (1e9, 0.05)
    )
    (raw,), (equivalent,) = logged(free, "grad_norm"), logged(free, "lora_pro_grad_norm")
    assert logged(clipped, "grad_norm") == [raw] and raw > 0.05
    assert logged(clipped, "lora_pro_grad_norm") == pytest.approx([equivalent * 0.05 / raw], rel=1e-3)
