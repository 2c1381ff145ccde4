"""LoRA-Pro's AdamW: factor pairs step towards full fine-tuning, every other parameter gets `torch.optim.AdamW`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lorapro_hf.checkpoint import check_state_dict
from lorapro_hf.config import LoRAProConfig
from lorapro_hf.moments import adam_factor_gradients, new_dense_state, new_factor_state, new_step_state, state_bytes
from lorapro_hf.pair_gradients import ProjectedBatch, global_norm, project_pairs
from lorapro_hf.pairs import LoRAPair, find_lora_pairs
from lorapro_hf.projection import compute_dtype


class LoRAProAdamW(torch.optim.Optimizer):
    r"""AdamW whose steps on LoRA factors move the adapted weight as full fine-tuning would (arXiv 2407.18242).

    For a pair with gradients `g_A`, `g_B` and adjusted gradients `h_A`, `h_B` (see `project_lora_gradients`):

    * `mode="full"`: Adam's moments M, V are those of the equivalent gradient `s (B h_A + h_B A)`. Their direction
      `u = M̂ / (√V̂ + ε)` is projected once more, from `s Bᵀ u` and `s u Aᵀ`, and the factors step along the result.
      Weight decay multiplies both factors by `√(1 − lr·λ)`, so that `s B A` decays by `1 − lr·λ`; the frozen weight is
      not touched. Learning rates are those of full fine-tuning. State: 8 bytes per adapted weight element.
    * `mode="efficient"`: plain AdamW on the factors, fed with `h_A`, `h_B`. Learning rates are those of LoRA.

    Parameters of no pair (biases, `modules_to_save`, DoRA magnitudes) get what `torch.optim.AdamW` gives them, to the
    bit. Moments of a pair are kept in float32 (float64 for float64 factors), also for bf16 factors and through
    `load_state_dict`. If any gradient holds NaN or Inf the whole step is left out and counted in `skipped_steps`; no
    parameter and no state changes. (Steps that a `GradScaler` leaves out do not reach the optimizer, nor its count.) A
    pair that no backward reached is left out of the step.

    Args:
        params: as for any optimizer, best as named parameters: `model.named_parameters()` or groups of them. It must
            hold all factors of `pairs`.
        pairs: from `find_lora_pairs(model)`.
        lr: learning rate; groups may have their own, also A and B of one pair.
        betas: decay rates of the moments; in full mode both factors of a pair need the same.
        eps: added to the denominator; in full mode both factors of a pair need the same.
        weight_decay: decoupled weight decay.
        config: mode and projection settings, a `LoRAProConfig` or a dictionary; default `LoRAProConfig()`.

    Raises:
        ValueError: no pairs, factors missing from `params`, or hyperparameters out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        pairs: Sequence[LoRAPair],
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        config: LoRAProConfig | Mapping[str, Any] | None = None,
    ) -> None:
        if not pairs:
            raise ValueError("no LoRA pairs to optimize; pass find_lora_pairs(model), or use torch.optim.AdamW.")
        _check_hyperparameters(lr, betas, eps, weight_decay)
        self.config = LoRAProConfig.of(config)
        self.pairs = list(pairs)
        self.last_grad_norm: Tensor | None = None
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.param_groups[0].setdefault("skipped_steps", 0)
        self._groups_of_pairs()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of ordinary parameters or of factors, as in `torch.optim.Optimizer`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # What a checkpoint must agree in: kept in the group because that is what state_dict saves.
        group["lora_pro_mode"] = self.config.mode
        group["param_shapes"] = [list(parameter.shape) for parameter in group["params"]]

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because a gradient was not finite."""
        return self.param_groups[0]["skipped_steps"]

    def estimated_state_bytes(self) -> int:
        """Bytes of optimizer state once every parameter has been stepped, the pairs' and the others'."""
        of_pairs = self._ids_of_pair_parameters()
        stepped = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        others = [p for p in stepped if id(p) not in of_pairs]
        return state_bytes(self.pairs, self.config.mode) + sum(2 * p.numel() * p.element_size() for p in others)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step, or none if a gradient is not finite.

        Raises:
            ValueError: a closure is given, a scaling is 0, a factor is not finite or lost its place in `param_groups`.
            RuntimeError: no pair has a gradient, or one is missing for one factor of a pair, sparse or sharded. Nothing
                has been changed in any of these cases.
        """
        if closure is not None:
            raise ValueError(
                "LoRAProAdamW takes no closure, since it adjusts the gradients once per step. Call loss.backward() "
                "before step()."
            )
        groups = self._groups_of_pairs()
        projected = project_pairs(self.pairs, self.config)
        if not projected:
            raise RuntimeError(
                f"none of the {len(self.pairs)} LoRA pairs has a gradient. Call loss.backward() before step(), and "
                "build the optimizer from the model that is trained, with the adapter active that it was built for."
            )
        self.last_grad_norm = global_norm(projected)
        if not _all_finite(self.param_groups, projected):
            self.param_groups[0]["skipped_steps"] += 1
            return
        self._step_others()
        self._count_step(projected)
        if self.config.mode == "full":
            self._full_step(projected, groups)
        else:
            self._efficient_step(projected, groups)

    def _groups_of_pairs(self) -> dict[int, dict[str, Any]]:
        """The param group of each parameter, after checking that all factors are there."""
        groups = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        for pair in self.pairs:
            if any(id(factor) not in groups for factor in (pair.A, pair.B, *pair.tied_parameters)):
                raise ValueError(
                    f"{pair.name}: its factors are not in the optimizer's param_groups. Build the optimizer from the "
                    "model it trains, after moving or wrapping it: create_lorapro_optimizer(model, lr=...)."
                )
            if self.config.mode == "full":
                of_A, of_B = groups[id(pair.A)], groups[id(pair.B)]
                if (*of_A["betas"], of_A["eps"]) != (*of_B["betas"], of_B["eps"]):
                    raise ValueError(
                        f"{pair.name}: lora_A and lora_B have different betas or eps, but mode 'full' keeps one pair "
                        "of moments for both. Give both groups the same, or use mode 'efficient'."
                    )
        return groups

    def _ids_of_pair_parameters(self) -> set[int]:
        return {id(p) for pair in self.pairs for p in (pair.A, pair.B, *pair.tied_parameters)}

    def _count_step(self, projected: list[ProjectedBatch]) -> None:
        """Count the step for those parameters of the pairs that have no moments of their own."""
        for pair in (pair for batch in projected for pair in batch.batch.pairs):
            without = pair.tied_parameters + ([pair.B] if self.config.mode == "full" else [])
            for parameter in without:
                if not self.state[parameter]:
                    self.state[parameter].update(new_step_state())
                self.state[parameter]["step"] += 1

    def _step_others(self) -> None:
        """What torch.optim.AdamW does, for the parameters of no pair."""
        of_pairs = self._ids_of_pair_parameters()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and id(p) not in of_pairs]
            for p in parameters:
                if not self.state[p]:
                    self.state[p].update(
                        step=torch.zeros((), dtype=torch.float32),
                        exp_avg=torch.zeros_like(p, memory_format=torch.preserve_format),
                        exp_avg_sq=torch.zeros_like(p, memory_format=torch.preserve_format),
                    )
            _adamw(parameters, [p.grad for p in parameters], [self.state[p] for p in parameters], group)

    def _efficient_step(self, projected: list[ProjectedBatch], groups: dict[int, dict[str, Any]]) -> None:
        """AdamW on the factors with their adjusted gradients."""
        work: dict[int, list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]]] = {}
        for (pairs, *_), batch_A, batch_B in projected:
            for pair, matrix_A, matrix_B in zip(pairs, batch_A, batch_B, strict=True):
                for factor, h in ((pair.A, pair.factor_A(matrix_A)), (pair.B, pair.factor_B(matrix_B))):
                    if not self.state[factor]:
                        self.state[factor].update(new_factor_state(factor))
                    # AdamW in the dtype of the moments: rounded to bf16 only once, at the end.
                    exact = factor.to(compute_dtype(factor))
                    work.setdefault(id(groups[id(factor)]), []).append((factor, exact, h, self.state[factor]))
        for group in self.param_groups:
            if id(group) in work:
                factors, exacts, gradients, states = map(list, zip(*work[id(group)], strict=True))
                _adamw(exacts, gradients, states, group)
                for factor, exact in zip(factors, exacts, strict=True):
                    if exact is not factor:
                        factor.copy_(exact)

    def _full_step(self, projected: list[ProjectedBatch], groups: dict[int, dict[str, Any]]) -> None:
        """Adam on the equivalent gradients; their directions, projected again, move the factors."""
        for batch in projected:
            self._full_step_of_batch(batch, groups)

    def _full_step_of_batch(self, projected: ProjectedBatch, groups: dict[int, dict[str, Any]]) -> None:
        batch = projected.batch
        directions = []
        for i, pair in enumerate(batch.pairs):
            state = self.state[pair.A]
            if not state:
                state.update(new_dense_state(pair))
            group = groups[id(pair.A)]
            inputs = (batch.A[i], batch.B[i], projected.h_A[i], projected.h_B[i], batch.scaling[i])
            directions.append(adam_factor_gradients(state, *inputs, betas=group["betas"], eps=group["eps"]))
        grad_A, grad_B = (torch.stack(gradients) for gradients in zip(*directions, strict=True))
        h_A, h_B = batch.project(grad_A, grad_B, self.config)
        for i, pair in enumerate(batch.pairs):
            _move(pair.A, pair.factor_A(batch.A[i]), pair.factor_A(h_A[i]), groups[id(pair.A)])
            _move(pair.B, pair.factor_B(batch.B[i]), pair.factor_B(h_B[i]), groups[id(pair.B)])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, keeping the moments of factors in float32 at least.

        Raises:
            ValueError: the checkpoint is of another mode, rank or model, or of another optimizer. Nothing has been
                changed then.
        """
        check_state_dict(state_dict, self.param_groups, self.pairs, self.config.mode)
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        loaded = [parameter for group in self.param_groups for parameter in group["params"]]
        factors = {id(factor) for pair in self.pairs for factor in (pair.A, pair.B)}
        for key, parameter in zip(saved, loaded, strict=True):
            if id(parameter) in factors and key in state_dict["state"]:
                # torch casts floating state to the parameter's dtype, which would round the moments of bf16 factors.
                for name, value in state_dict["state"][key].items():
                    if name != "step":
                        self.state[parameter][name] = value.to(parameter.device, compute_dtype(parameter))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "pairs": self.pairs, "config": self.config, "last_grad_norm": None}


def create_lorapro_optimizer(
    model: nn.Module,
    *,
    lr: float,
    config: LoRAProConfig | Mapping[str, Any] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_parameters: Collection[str] | None = None,
) -> LoRAProAdamW:
    """LoRA-Pro's optimizer for a PEFT model, with one group that decays and one (biases and norms) that does not.

    Args:
        model: a model with trainable LoRA adapters, already on its device.
        lr: learning rate; that of full fine-tuning in mode `"full"`, that of LoRA in mode `"efficient"`.
        config: `LoRAProConfig`, a dictionary of its settings, or `None` for the default.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay of the first group.
        decay_parameters: names of the parameters that decay; by default all but biases and parameters of norms.

    Raises:
        ValueError: the model has no trainable LoRA pair, or a setting is out of range.
    """
    pairs = find_lora_pairs(model)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if decay_parameters is None:
        decay_parameters = _decaying_names(model)
    decaying = [(name, parameter) for name, parameter in trainable if name in decay_parameters]
    others = [(name, parameter) for name, parameter in trainable if name not in decay_parameters]
    groups = [
        {"params": named, "weight_decay": decay} for named, decay in ((decaying, weight_decay), (others, 0.0)) if named
    ]
    return LoRAProAdamW(groups, pairs, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, config=config)


class LoRAProOptimizerFactory:
    """`create_lorapro_optimizer` as a factory: `Trainer(optimizer_cls_and_kwargs=(LoRAProOptimizerFactory, {...}))`.

    The learning rate goes into the dictionary: `Trainer` passes none of its arguments on to a factory.
    """

    def __call__(self, model: nn.Module, **kwargs: Any) -> LoRAProAdamW:
        """Build the optimizer; `kwargs` as in `create_lorapro_optimizer`.

        Raises:
            ValueError: `lr` is missing, or as in `create_lorapro_optimizer`.
        """
        if "lr" not in kwargs:
            raise ValueError(
                "LoRAProOptimizerFactory needs the learning rate: Trainer passes none on to an optimizer factory. Use "
                'optimizer_cls_and_kwargs=(LoRAProOptimizerFactory, {"lr": args.learning_rate}).'
            )
        return create_lorapro_optimizer(model, **kwargs)


def _adamw(
    parameters: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
) -> None:
    """The functional form of `torch.optim.AdamW`, which chooses between loop and foreach as the class does."""
    beta1, beta2 = group["betas"]
    adamw(
        parameters,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _decaying_names(model: nn.Module) -> set[str]:
    """Names of all parameters but biases and those of normalisation layers."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if not name.endswith("bias") and "norm" not in type(module).__name__.lower()
    }


def _move(factor: Tensor, exact: Tensor, h: Tensor, group: dict[str, Any]) -> None:
    lr = float(group["lr"])
    keep = max(0.0, 1 - lr * group["weight_decay"]) ** 0.5
    factor.copy_(exact.mul(keep).sub_(h, alpha=lr))


def _all_finite(param_groups: list[dict[str, Any]], projected: list[ProjectedBatch]) -> bool:
    """Whether all gradients are finite, and those that were made of them; waits for the device once."""
    gradients = [p.grad for group in param_groups for p in group["params"] if p.grad is not None]
    if any(gradient.is_sparse for gradient in gradients):
        raise RuntimeError("a parameter has a sparse gradient, which AdamW does not take; use sparse=False.")
    gradients += [h for batch in projected for h in (batch.h_A, batch.h_B)]
    return bool(torch.nn.utils.get_total_norm(gradients, norm_type=float("inf")).isfinite())


def _check_hyperparameters(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if not isinstance(lr, int | float | Tensor) or not 0 <= lr < float("inf"):
        raise ValueError(f"lr={lr!r} must be a finite number of at least 0.")
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(f"betas={betas!r} must be two numbers in [0, 1).")
    if not eps >= 0:
        raise ValueError(f"eps={eps!r} must be at least 0.")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay!r} must be at least 0.")
