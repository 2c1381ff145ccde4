"""How does a training find flat minima by random perturbations of the merged weights?

Flat-LoRA (arXiv 2409.14396) trains under noise on `W' = W + s B A`, whose size follows the rows of W'. GGPO
(arXiv 2502.14538, first version) adds the rows of the gradient. The noise is made anew wherever it is used, see
`noisy_products`: no step adds it to W or takes it off again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from lorapro_hf.config import check_choice
from lorapro_hf.factors.pairs import LoRAPair, find_lora_pairs
from lorapro_hf.factors.perturbing import WithGradients
from lorapro_hf.factors.stacks import exact_arithmetic
from lorapro_hf.factors.weight_gradients import require_whole_parameters
from lorapro_hf.factors.wrappers import is_compiled
from lorapro_hf.functional.bases import compute_dtype, gradient_coordinates, row_bases
from lorapro_hf.functional.row_norms import squared_row_norms
from lorapro_hf.kernels.noise import NoiseKey
from lorapro_hf.methods.base import LoRAMethod
from lorapro_hf.methods.noisy_layers import Noise, NoisyLayer, has_dora, noisy_layers
from lorapro_hf.methods.noisy_products import perturbed

SCHEDULES = ("cosine", "constant")
GRADIENTS = ("projected", "unprojected")
_LARGEST_SEED = 2**63 - 1
_KEEP_ONE = "Both perturb the weights. Keep one of them."


class FlatLoRACallback(LoRAMethod):
    """Trains under noise on each adapted weight: Flat-LoRA, and GGPO with `beta`.

    ```python
    trainer = LoRAProTrainer(model, args, train_dataset=data, callbacks=[FlatLoRACallback(sigma=0.05)])
    ```

    `LoRAProTrainingArguments(flat_lora_sigma=0.05)` has the trainer do so itself. In the window before step t of T, an
    element of row i of `W' = W + s B A`, with n columns, gets normal noise of the variance
    `(f σ)² / n (‖W'_i‖² + β ‖g_i‖²)`, where `f = ½ (1 − cos(π t / T))`. All micro-batches of the window and all ranks
    see the same noise; evaluation, generation and other passes without gradients see none. W is never written to, and
    the random states of torch do not change. Under DoRA W' is the scaled weight. Parameters of experts get the noise in
    their own dtype.

    The row norms of W' are those at the beginning of the window. The gradient g is that of the step before, as the
    optimizer saw it, therefore clipped where the training clips; the first step has none.

    Args:
        sigma: σ, 0.05 for language models and 0.15 for CLIP in the paper; 0 for no noise.
        beta: β; 0 for Flat-LoRA, 0.01 in GGPO.
        schedule: `"cosine"` for the f above, or `"constant"` for `f = 1`.
        every: k, to perturb only the windows before steps k, 2k and so on.
        seed: of the noise, from 0 to 2⁶³ − 1; by default torch's initial seed, of the first rank.
        gradient: `"projected"` for LoRA-Pro's equivalent gradient, `"unprojected"` for `s (B g_A + g_B A)` as in the
            paper. Neither depends on the optimizer.
        total_steps: T; a trainer knows it.

    Raises:
        ValueError: a setting outside its range.
    """

    name: ClassVar[str] = "flat_lora"
    conflicts: ClassVar[dict[str, str]] = {
        "beamlora": "it takes the weights of its slots out of B before beta (GGPO) reads the gradient. Leave out "
        "beta (flat_lora_beta), or BeamLoRA (beamlora_every).",
        "lora_sb": "LoRA-SB fixes the factors, whose gradients and pairs the noise is sized by. Leave out one of them.",
        "mgpo": _KEEP_ONE,
        "torch_compile=True": "Compiled layers would not see the noise. Set torch_compile=False.",
        "xgblora": "The noise is sized by the weight plus s B A, to which it adds more. Keep one of both methods.",
    }

    def __init__(
        self,
        sigma: float = 0.05,
        beta: float = 0.0,
        schedule: str = "cosine",
        every: int = 1,
        seed: int | None = None,
        *,
        gradient: str = "projected",
        total_steps: int | None = None,
    ) -> None:
        check_sizes(sigma, beta)
        check_choice("schedule", schedule, SCHEDULES)
        check_choice("gradient", gradient, GRADIENTS)
        for name, value in (("every", every), ("total_steps", total_steps)):
            if (value is not None or name == "every") and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r} must be a whole number of steps, at least 1.")
        _check_seed(seed)
        self.sigma, self.beta, self.schedule, self.every, self.seed = sigma, beta, schedule, every, seed
        self.gradient, self.total_steps = gradient, total_steps
        if not beta:  # then no gradient is read
            self.__dict__["conflicts"] = {name: why for name, why in self.conflicts.items() if name != "beamlora"}
        self._weights: NoisyWeights | None = None
        self._steps, self._seed, self._planned = 0, 0, total_steps
        self._gradient_norms: dict[str, Tensor] = {}
        self._state: TrainerState | None = None

    def before_training(self, model: nn.Module, batches: Iterable[Any] | None) -> None:
        """Find the layers and agree on a seed; row norms are computed in each window."""
        self._weights = NoisyWeights(model, self.beta)
        self._steps, self._gradient_norms, self._planned = 0, {}, self.total_steps
        device = self._weights.layers[0].pairs[0].A.device
        self._seed = _agreed_seed(device) if self.seed is None else self.seed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Like the parent; take over the number of steps."""
        super().on_train_begin(args, state, control, **kwargs)
        self._planned, self._state = self.total_steps or state.max_steps, state

    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which forward passes in training mode, with gradients, see the noise of this window."""
        if self._weights is None:
            raise RuntimeError("FlatLoRACallback has seen no model. Call before_training(model, None) first.")
        step = self._steps + 1
        sigma = self.sigma * self._factor(step)
        if step % self.every or not sigma:
            return contextlib.nullcontext()
        norms = self._gradient_norms if self.beta else {}
        return self._weights.perturbed(sigma, self.beta, norms, (self._seed, step), in_training_only=True)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the row norms of the gradient for the next window, if β is not 0."""
        if not self.beta or self._weights is None:
            return
        kind = self.gradient
        if getattr(self._state, "_lora_pro_callback", None) is not None:  # the factors hold h_A and h_B instead
            if kind == "unprojected":
                raise ValueError('LoRAProCallback has projected the gradients before. Set gradient="projected".')
            kind = "unprojected"
        self._gradient_norms |= self._weights.gradient_norms(kind, self._gradient_norms)

    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Begin a new window."""
        self._steps = step

    def state_dict(self) -> dict[str, Any]:
        """The seed, the number of steps, and the squared row norms of the gradient."""
        return {"seed": self._seed, "steps": self._steps, "gradient_norms": self._gradient_norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the state; a `ValueError` tells of another seed or other layers."""
        if self.seed not in (None, state["seed"]):
            raise ValueError(
                f"seed={self.seed}, but the checkpoint was written with the seed {state['seed']}. Leave out the seed."
            )
        layers = {} if self._weights is None else {layer.name: layer for layer in self._weights.layers}
        norms = {}
        for name, saved in state["gradient_norms"].items():
            if name not in layers or layers[name].rows_shape != tuple(saved.shape):
                raise ValueError(
                    f"{name}: the checkpoint holds row norms of another model. Resume with the one it was written for."
                )
            norms[name] = saved.to(layers[name].pairs[0].A.device)
        self._seed, self._steps, self._gradient_norms = state["seed"], state["steps"], norms

    def described(self) -> dict[str, str]:
        """Like the parent."""
        schedule = (
            f"{self.schedule} schedule" if self.every == 1 else f"{self.schedule} schedule, every {self.every} steps"
        )
        of_gradient = f"beta {self.beta:g} ({self.gradient} gradient), " if self.beta else ""
        return {"noise on the weights": f"Flat-LoRA, sigma {self.sigma:g}, {of_gradient}{schedule}"}

    def _factor(self, step: int) -> float:
        if self.schedule == "constant":
            return 1.0
        if self._planned is None:
            raise ValueError(
                'schedule="cosine" needs the number of steps of the training. Give total_steps=..., or '
                'schedule="constant".'
            )
        return (1 - math.cos(math.pi * min(step / self._planned, 1))) / 2


@contextlib.contextmanager
def perturbed_weights(model: nn.Module, *, sigma: float, beta: float = 0.0, seed: int | None = None) -> Iterator[None]:
    """Perturb each adapted weight within this context, in training and in evaluation mode.

    ```python
    from lorapro_hf import perturbed_weights

    with perturbed_weights(model, sigma=0.05, seed=1):
        loss = model(**batch).loss
        loss.backward()
    ```

    Run the backward pass inside as well if the model has gradient checkpointing. The model is as before when the
    context ends, also by an exception.

    Args:
        model: a model with LoRA layers, also inside `DistributedDataParallel`.
        sigma: as for `FlatLoRACallback`.
        beta: as for `FlatLoRACallback`; the gradient is the one that the factors hold when the context begins, if any.
        seed: from 0 to 2⁶³ − 1; by default torch's initial seed, which several ranks should set alike. The same seed
            gives the same noise each time.

    Raises:
        ValueError: a setting outside its range, a model that `find_lora_pairs` refuses, or a layer whose weight cannot
            be perturbed.
        RuntimeError: sharded parameters (FSDP, tensor parallelism, DeepSpeed), or weights that are perturbed already.
    """
    check_sizes(sigma, beta)
    _check_seed(seed)
    weights = NoisyWeights(model, beta)
    norms = weights.gradient_norms(GRADIENTS[0], {}) if beta else {}
    key = _initial_seed() if seed is None else seed, 0
    with weights.perturbed(sigma, beta, norms, key, in_training_only=False) if sigma else contextlib.nullcontext():
        yield


class NoisyWeights:
    """The layers of a model that are perturbed, with the sizes of their noise.

    Args:
        model: as for `perturbed_weights`.
        beta: whether gradients count, which excludes DoRA and shared factors.
    """

    def __init__(self, model: nn.Module, beta: float) -> None:
        require_whole_parameters(model, "Flat-LoRA")
        if is_compiled(model):
            raise ValueError(
                "the model or a part of it is compiled, and would not see the noise. Leave out torch.compile."
            )
        self.layers, self._model = noisy_layers(model), model
        self._pairs = {(id(pair.layer), pair.adapter_name): pair for pair in find_lora_pairs(model)}
        self._key: tuple[int, int] | None = None
        self._noises: list[tuple[NoisyLayer, Noise]] = []
        for layer in self.layers if beta else ():
            reason = "DoRA scales its gradient by row" if has_dora(layer.pairs[0]) else None
            if any((id(layer.layer), name) not in self._pairs for name in layer.trained):
                reason = "it shares its factors with another layer"
            if reason is not None:
                raise ValueError(f"{layer.name}: {reason}, so that beta has no meaning for it. Set beta=0.")

    @contextlib.contextmanager
    def perturbed(
        self, sigma: float, beta: float, gradient_norms: dict[str, Tensor], key: tuple[int, int], in_training_only: bool
    ) -> Iterator[None]:
        """A context with the noise of a seed and window, which is sized when a window begins."""
        if key != self._key:
            noises = []
            for layer in self.layers:
                squares = layer.squared_norms()
                if layer.name in gradient_norms:
                    squares = squares + beta * gradient_norms[layer.name]
                deviations = squares.mul_(sigma**2 / layer.in_features).sqrt_()
                noises.append((layer, layer.noise(NoiseKey(key[0], layer.index, key[1]), deviations)))
            self._key, self._noises = key, noises
        with contextlib.ExitStack() as stack:
            is_on = WithGradients() if in_training_only else None
            if is_on is not None:
                stack.enter_context(is_on.watching(self._model, [layer.name for layer in self.layers]))
            stack.enter_context(perturbed(self._noises, is_on))
            yield

    @torch.no_grad()
    def gradient_norms(self, kind: str, before: dict[str, Tensor]) -> dict[str, Tensor]:
        """The squared row norms of the gradients, `(batch, m)` by layer, as far as the factors have gradients.

        Those of `before` stay where a gradient is not finite.
        """
        found: dict[str, Tensor] = {}
        for layer in self.layers:
            pairs = [self._pairs[id(layer.layer), name] for name in sorted(layer.trained)]
            parts = [part for pair in pairs if (part := _thin_gradient(pair, kind)) is not None]
            if not parts:
                continue
            left, right = torch.cat([part[0] for part in parts], dim=-1), torch.cat([part[1] for part in parts], dim=-2)
            squares = squared_row_norms(left, right).view(layer.rows_shape)
            old = before.get(layer.name, torch.zeros_like(squares))
            found[layer.name] = torch.where(squares.isfinite().all(), squares, old)
        return found


def check_sizes(sigma: float, beta: float, prefix: str = "") -> None:
    """Raise a `ValueError` unless both settings are finite numbers, not below 0, and β has a σ to act with."""
    for name, value in ((f"{prefix}sigma", sigma), (f"{prefix}beta", beta)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r} must be a finite number, 0 or above.")
    if beta and not sigma:
        raise ValueError(f"{prefix}beta={beta!r} would be ignored: set {prefix}sigma above 0, or leave it out.")


def _thin_gradient(pair: LoRAPair, kind: str) -> tuple[Tensor, Tensor] | None:
    """Matrices `(batch, m, 2r)` and `(batch, 2r, n)` whose product is the gradient of the weight."""
    gradients = pair.gradients()
    if gradients is None:
        return None
    dtype, s = compute_dtype(pair.A, pair.B), pair.scaling
    matrices = [pair.matrix_A(pair.A.detach()), pair.matrix_A(gradients[0])]
    matrices += [pair.matrix_B(pair.B.detach()), pair.matrix_B(gradients[1])]
    A, of_A, B, of_B = (each.to(dtype).reshape(pair.batch, *each.shape[-2:]) for each in matrices)
    if kind == "unprojected":
        return torch.cat([s * B, s * of_B], dim=-1), torch.cat([of_A, A], dim=-2)
    with exact_arithmetic([A]):
        basis_A, basis_B = row_bases([A, B.mT])
        a, b = gradient_coordinates(basis_A, basis_B, of_A, of_B.mT, s)
    return torch.cat([basis_B.rows.mT, b.mT], dim=-1), torch.cat([a, basis_A.rows], dim=-2)


def _check_seed(seed: int | None) -> None:
    if seed is not None and (type(seed) is not int or not 0 <= seed <= _LARGEST_SEED):
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2**63 - 1, or None.")


def _initial_seed() -> int:
    return torch.initial_seed() & _LARGEST_SEED


def _agreed_seed(device: torch.device) -> int:
    """The initial seed of the first rank, so that all ranks make the same noise."""
    own = _initial_seed()
    if not (dist.is_available() and dist.is_initialized()):
        return own
    agreed = torch.tensor(own, device=device)
    dist.broadcast(agreed, 0)
    return int(agreed)
