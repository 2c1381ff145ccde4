"""Every cell of the support table: what works takes the oracle's step, trains and loads in PEFT; the rest raises."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel
from torch import nn

import support_table
from lorapro_hf import LoRAPair, LoRAProCallback, create_lorapro_optimizer, find_lora_pairs
from lorapro_hf.functional.reference import (
    RTOL,
    DenseFactoredAdamW,
    DenseFullAdamW,
    DenseRite,
    DenseSpectral,
    factor_gradients,
    lengthened,
)
from support_cases import CASES, LAYERS, OTHER_FIELDS
from support_rows import COLUMNS, Case, replaced

EPS = 1e-4
SETTINGS = {"rite": {"rite_skip": 0.0}}  # gradients of any length are to take part
DENSE = {"factored": DenseFactoredAdamW, "spectral": DenseSpectral}
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.1}


class Stepper:
    """The optimizer of a column: `create_lorapro_optimizer` in a mode, or AdamW behind the callback."""

    def __init__(self, model: nn.Module, case: Case, column: str) -> None:
        self.optimizer: torch.optim.Optimizer
        self.callback = None
        if column == "callback":
            parameters = [p for p in model.parameters() if p.requires_grad] or [nn.Parameter(torch.ones(1))]
            self.optimizer = torch.optim.AdamW(parameters, lr=case.lr, eps=EPS, weight_decay=0)
            self.callback = LoRAProCallback({"mode": "efficient", **case.config})
            self.callback.on_train_begin(None, SimpleNamespace(), None, model=model, optimizer=self.optimizer)
        else:
            self.optimizer = create_lorapro_optimizer(
                model,
                lr=case.lr,
                eps=EPS,
                config={"mode": column, "trust_region": 0, **SETTINGS.get(column, {}), **case.config},
            )

    def step(self) -> None:
        if self.callback is not None:
            self.callback.on_pre_optimizer_step(None, None, None)
        self.optimizer.step()
        self.optimizer.zero_grad()


def matrices(pair: LoRAPair, of_A: torch.Tensor, of_B: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Both as matrices in float64, a pair of them for each expert or group."""
    A, B = (tensor.detach().clone() for tensor in (of_A, of_B))
    A, B = pair.matrix_A(A).double(), pair.matrix_B(B).double()
    return [(A, B)] if pair.layout == "matrix" else list(zip(A, B, strict=True))


def gradient_of_the_weight(A, B, grad_A, grad_B, scaling) -> torch.Tensor:
    """The part of it that the factors can follow, from the factors' gradients."""
    through_B = B @ torch.linalg.pinv(B.T @ B, hermitian=True, rtol=RTOL) @ grad_A / scaling
    through_A = grad_B @ torch.linalg.pinv(A @ A.T, hermitian=True, rtol=RTOL) @ A / scaling
    return through_B + through_A - B @ torch.linalg.pinv(B, rtol=RTOL) @ through_A


def oracle_step(column: str, lr: float, A, B, grad_A, grad_B, scaling, norm: float) -> torch.Tensor:
    """By how much the first step moves the weight, densely and in float64; `norm` is that of `clipped_norm`."""
    g = gradient_of_the_weight(A, B, grad_A, grad_B, scaling)
    if column == "callback":
        h_A, h_B = factor_gradients(g, A, B, scaling)
        new_A, new_B = A - lr * h_A / (h_A.abs() + EPS), B - lr * h_B / (h_B.abs() + EPS)
    elif column == "efficient":
        new_A = A + lengthened(-lr * grad_A / (grad_A.abs() + EPS), B, lr)
        new_B = B - lr * grad_B / (grad_B.abs() + EPS)
    elif column == "rite":
        rite = DenseRite(A, B, scaling, skip=0.0, lr=lr, eps=EPS)
        rite.step(g, norm)
        new_A, new_B = rite.A, rite.B
    else:
        dense = DENSE.get(column, DenseFullAdamW)(A, B, scaling, lr=lr, eps=EPS)
        dense.step(g)
        new_A, new_B = dense.A, dense.B
    return scaling * (new_B @ new_A - B @ A)


def clipped_norm(pairs: list[LoRAPair], before: list[Any]) -> float:
    """The norm of the gradients of all pairs that mode rite clips."""
    squares = 0.0
    for pair, (old, gradients) in zip(pairs, before, strict=True):
        for (A, B), (grad_A, grad_B) in zip(old, gradients, strict=True):
            g = gradient_of_the_weight(A, B, grad_A, grad_B, pair.scaling)
            found = DenseRite(A, B, pair.scaling, skip=0.0, lr=0.0).unmagnified(g)
            squares += sum(float(each.square().sum()) for each in found)
    return squares**0.5


def assert_first_step_is_the_oracles(model: nn.Module, stepper: Stepper, case: Case, column: str) -> None:
    pairs = find_lora_pairs(model)
    assert len(pairs) == case.pairs
    before = [(matrices(pair, pair.A, pair.B), matrices(pair, *pair.gradients())) for pair in pairs]
    rest = others(model, pairs)
    if case.ordinary:
        assert rest and all(case.ordinary[1] in name for name in rest)
    else:
        assert not rest
    kept = {name: (parameter.detach().clone(), parameter.grad.clone()) for name, parameter in rest.items()}

    stepper.step()
    tolerance, norm = TOLERANCES[case.dtype], clipped_norm(pairs, before)
    for pair, (old, gradients) in zip(pairs, before, strict=True):
        for (A, B), (grad_A, grad_B), (new_A, new_B) in zip(
            old, gradients, matrices(pair, pair.A, pair.B), strict=True
        ):
            # both gradients are those of one weight, which the scaling and the factors make
            allowed = tolerance * float(grad_A.norm() * A.norm())
            torch.testing.assert_close(B.T @ grad_B, grad_A @ A.T, rtol=0, atol=allowed)
            expected = oracle_step(column, case.lr, A, B, grad_A, grad_B, pair.scaling, norm)
            moved = pair.scaling * (new_B @ new_A - B @ A)
            assert (moved - expected).norm() <= tolerance * expected.norm(), pair
            assert expected.norm() > 0 or not grad_B.any()
    for name, (start, gradient) in kept.items():
        expected = start - case.lr * gradient / (gradient.abs() + EPS)
        torch.testing.assert_close(rest[name].detach(), expected, rtol=1e-4, atol=1e-6, msg=name)


def others(model: nn.Module, pairs: list[LoRAPair]) -> dict[str, nn.Parameter]:
    """What is trained beside the factors, by name."""
    factors = {id(p) for pair in pairs for p in (pair.A, pair.B, *pair.tied_parameters)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {name: p for name, p in trained.items() if id(p) not in factors}


def loss_in_evaluation(model: nn.Module, case: Case) -> float:
    was_training = model.training
    with torch.no_grad():
        loss = case.loss(model.eval()).item()
    model.train(was_training)
    return loss


def assert_loaded_alike(model: PeftModel, case: Case, folder: Path, start: Path | None) -> None:
    converted = {"path_initial_model_for_weight_conversion": str(start)} if start else {}
    model.save_pretrained(folder, selected_adapters=["default"] if len(model.peft_config) == 1 else None, **converted)
    folders = {name: folder if name == "default" else folder / name for name in model.peft_config}
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(case.model(), folders.pop("default"))
    for name, other in folders.items():
        loaded.load_adapter(other, name)
    loaded.base_model.set_adapter(model.active_adapters)
    loaded = loaded.to(case.dtype).eval()
    with torch.no_grad():
        found, expected = case.output(loaded), case.output(model.eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def default_columns(number: int, case: Case) -> set[str]:
    """Two columns of a layer, one of any other row, which take turns; the other cells are slow."""
    if case.name == "torch.compile":
        return set()
    if len(case.refused) not in (0, len(COLUMNS)):
        return set(case.refused) | {"full"}
    return {COLUMNS[(number + shift) % len(COLUMNS)] for shift in ((0, 3) if case in LAYERS else (0,))}


def cells() -> list[Any]:
    return [
        pytest.param(
            case,
            column,
            id=f"{case.name}-{column}",
            marks=() if column in default_columns(number, case) else pytest.mark.slow,
        )
        for number, case in enumerate(CASES)
        for column in COLUMNS
    ]


def require_of_peft(case: Case) -> None:
    missing = [name for name in case.settings if name not in LoraConfig.__dataclass_fields__]
    if missing or Version(peft.__version__) < Version(case.since or "0"):
        pytest.skip(f"PEFT {peft.__version__} does not know {missing or case.name}")


@pytest.mark.parametrize(("case", "column"), cells())
def test_cell(case: Case, column: str, tmp_path: Path) -> None:
    require_of_peft(case)
    if column == "spectral" and case.dtype == torch.bfloat16:
        case = replaced(case, lr=5 * case.lr)  # elements move by a fifth of the rate: let them move beyond rounding
    torch.manual_seed(0)
    model = case.build()
    if column in case.refused:
        with pytest.raises(ValueError, match=case.refused[column]):
            Stepper(model, case, column)
        return
    start = None
    if case.reload == "converted":
        start = tmp_path / "start"
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = case.settings["init_lora_weights"]
    stepper = Stepper(model, case, column)
    before = loss_in_evaluation(model, case)
    case.loss(model).backward()
    assert_first_step_is_the_oracles(model, stepper, case, column)
    for _ in range(4):
        case.loss(model).backward()
        stepper.step()
    assert loss_in_evaluation(model, case) < before
    if case.reload:
        assert_loaded_alike(model, case, tmp_path / "adapter", start)


def test_the_table_in_the_docs_is_the_one_of_the_tests() -> None:
    written = support_table.PATH.read_text(encoding="utf-8")
    assert written == support_table.page(), "make support-table writes it anew"


def test_every_field_of_peft_has_a_row_or_a_reason() -> None:
    covered = {"r", "lora_alpha", *(name for case in CASES for name in case.settings)}
    assert set(LoraConfig.__dataclass_fields__) - covered - set(OTHER_FIELDS) == set()


def test_every_refusal_says_why() -> None:
    assert all(case.note for case in CASES if case.refused)
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
