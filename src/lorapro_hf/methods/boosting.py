"""How does XGBLoRA train one low-rank booster after the other, each on what the boosters before it have left?"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorapro_hf.checkpoints.adapters import active_adapters
from lorapro_hf.config import check_choice
from lorapro_hf.factors.pairs import LoRAPair, address, find_lora_pairs
from lorapro_hf.factors.recording import holders_of_factors
from lorapro_hf.factors.wrappers import is_compiled
from lorapro_hf.methods.base import LoRAMethod, require_same_settings
from lorapro_hf.methods.boosters import adapters_of, add_booster, as_one_adapter, boosters_of, save_whole, set_boosters
from lorapro_hf.optim.lora_pro import LoRAProAdamW, unwrap_optimizer

Subspace = Callable[[LoRAPair, torch.Generator], Tensor]
Sampler = Callable[[list[str], torch.Generator], Collection[str]]
_COMPILED = "compiled code would leave out the boosters that come later. Leave out torch_compile and model.compile()."
_STARTS = ("True", "False", "gaussian")  # of PEFT's `init_lora_weights`


def check_steps_per_booster(steps: int, name: str = "steps_per_booster") -> None:
    """Raise a `ValueError` unless the number of steps is a positive whole number."""
    _check_count(name, steps, "of optimizer steps")


class BoostingCallback(LoRAMethod):
    """XGBLoRA (arXiv 2410.19694): after some steps the factors become a frozen booster, and fresh ones begin.

    ```python
    model = get_peft_model(base, LoraConfig(r=1, target_modules="all-linear"))
    trainer = LoRAProTrainer(model, args, train_dataset=data, callbacks=[BoostingCallback(steps_per_booster=100)])
    ```

    The forward pass adds all boosters `s B A` to the weight, without rounding them into it; the base itself is never
    written. After T boosters of rank 1 a layer multiplies by two thin matrices of rank T, which costs
    `T (m + n) / (m n)` of a layer `(m, n)`. A fresh booster starts as PEFT starts an adapter, with B = 0, so that no
    output changes, and with the optimizer's state of a new training: moments and step counts of the factors are 0 in
    each mode of LoRA-Pro and in AdamW, the moments of the weight in mode full as well. The learning rate follows its
    schedule, and other trained parameters keep their state.

    Every save of the model, also by its own `save_pretrained`, holds one plain LoRA adapter of rank T over the original
    base. The last booster may be shorter. A step that the optimizer leaves out counts as a step. A model with boosters
    from an earlier training gets more of them.

    Args:
        steps_per_booster: optimizer steps until the next booster begins.
        layers: how many layers, chosen at random, each booster acts on; by default all. A layer is a block of the
            model with all its adapted matrices; a matrix outside the numbered blocks is a layer of its own. The
            factors of other layers are 0 until the next booster.
        rank: the rank of a booster, which must be that of the adapter; `None` for any that the adapter has.
        subspace: `"fresh"` draws A as PEFT does. Or a function of a pair and a generator that returns A in the shape of
            `pair.A`, for instance orthogonal to the earlier `pair.layer.boosters.A`.
        sampler: `"all"`, from which `layers` draws. Or a function of the names of all layers and a generator that
            returns the names of those to train. It is called for each booster.

    Both functions must return the same on all ranks: they may draw from the generator, whose state is saved.

    Raises:
        ValueError: a number is out of range, or an unknown choice; before a training: `rank` is not that of the
            adapter, there are fewer layers, the model is compiled, or a layer has DoRA, a bias of its adapter, several
            adapters or shared factors, or is `nn.MultiheadAttention`. Nothing has been changed then.
    """

    name: ClassVar[str] = "xgblora"
    conflicts: ClassVar[dict[str, str]] = {
        "beamlora": "it moves directions within one adapter, but a booster has few or one. Keep one of both methods.",
        "gradient_start": "each booster starts from B = 0. Leave out lora_pro_init or GradientStart.",
        "lora_sb": "each booster trains A and B. Keep one of both methods.",
        "torch_compile=True": _COMPILED,
    }

    def __init__(
        self,
        steps_per_booster: int,
        layers: int | None = None,
        rank: int | None = 1,
        *,
        subspace: str | Subspace = "fresh",
        sampler: str | Sampler = "all",
    ) -> None:
        check_steps_per_booster(steps_per_booster)
        if rank is not None:
            _check_count("rank", rank, "that is the adapter's r")
        if layers is not None:
            _check_count("layers", layers, "of layers, or None for all")
        if not callable(subspace):
            check_choice("subspace", subspace, ("fresh",))
        if not callable(sampler):
            check_choice("sampler", sampler, ("all",))
        elif layers is not None:
            raise ValueError(f"layers={layers} would be ignored: the sampler chooses. Leave out one of both.")
        self.steps_per_booster, self.layers, self.rank = steps_per_booster, layers, rank
        self.subspace, self.sampler = subspace, sampler
        self._pairs: list[LoRAPair] = []
        self._generator, self._start_by = torch.Generator(), "True"
        self._steps, self._must_reset = 0, False
        self._optimizer: torch.optim.Optimizer | None = None  # once it is known

    # ---- the calls of a training ----

    def before_training(self, model: nn.Module, batches: Iterable[Any] | None) -> None:
        """Examine the layers; choose those of the first booster, whose factors are the adapter's own."""
        pairs = find_lora_pairs(model)
        _require_boostable(model, pairs, self.rank)
        names = _layers(pairs)
        if self.layers is not None and self.layers > len(names):
            raise ValueError(f"layers={self.layers}, but the adapter is in {len(names)} layers: {names}. Lower layers.")
        self._start_by = _start_of(model, pairs[0].adapter_name)
        self._pairs, self._steps, self._must_reset, self._optimizer = pairs, 0, False, None
        self._generator.manual_seed(_common_seed(pairs[0].A.device))
        save_whole(model)
        if batches is not None:
            self._begin_booster(is_first=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Like the parent; refuse a plain `Trainer` that would load a best checkpoint into the present factors."""
        if not self._is_led and args.load_best_model_at_end:
            raise ValueError(
                "a plain Trainer cannot load the boosters of its best checkpoint. Use LoRAProTrainer (also with "
                "lora_pro=False), or set load_best_model_at_end=False."
            )
        super().on_train_begin(args, state, control, **kwargs)
        self._optimizer = kwargs["optimizer"]

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin the next booster where it is due, before any method sees the factors of this step."""
        self._begin_if_due()
        super().on_step_begin(*args, **kwargs)

    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        """Begin the next booster where it is due: only before a step that trains it, so that none begins at the end."""
        self._begin_if_due()
        return contextlib.nullcontext()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Reset the optimizer's state of the factors before the first step of a booster."""
        if self._must_reset:
            self._must_reset = False
            reset_state(optimizer, self._pairs)

    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Count the step."""
        self._optimizer = optimizer
        self._steps += 1

    def release(self) -> None:
        """Like the parent; a later training may have another optimizer."""
        super().release()
        self._optimizer = None

    def state_dict(self) -> dict[str, Any]:
        """The settings, the boosters of each layer, the steps of the present one and the state of the generator."""
        boosters = {pair.name: boosters_of(pair.layer) for pair in self._pairs}
        return {
            "settings": self._settings(),
            "steps": self._steps,
            "must_reset": self._must_reset,
            "generator": self._generator.get_state(),
            "boosters": {
                name: {"A": each.A.detach(), "B": each.B.detach()}
                for name, each in boosters.items()
                if each is not None
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give the layers the boosters of a state; a `ValueError` names a setting or a layer that does not fit."""
        require_same_settings("XGBLoRA", self._settings(), state["settings"])
        pairs, saved = {pair.name: pair for pair in self._pairs}, state["boosters"]
        for name, own in saved.items():
            if name not in pairs or not _fits(pairs[name], own["A"], own["B"]):
                raise ValueError(
                    f"{name}: the checkpoint holds boosters of another shape, or of a layer without an adapter. It is "
                    "a checkpoint of another model; resume with the model it was written for."
                )
        for name, pair in pairs.items():
            own = saved.get(name, {})
            set_boosters(pair, own.get("A"), own.get("B"))
        self._steps, self._must_reset = state["steps"], state["must_reset"]
        self._generator.set_state(state["generator"])

    def export(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """A context in which the adapter holds all boosters: rank T for T boosters of rank 1."""
        return as_one_adapter(model)

    def described(self) -> dict[str, str]:
        """The length of a booster, its rank and the number of its layers."""
        layers = "chosen layers" if callable(self.sampler) else f"{self.layers or 'all'} layers"
        rank = "" if self.rank is None else f" of rank {self.rank}"
        return {"boosters (XGBLoRA)": f"one{rank} in each {self.steps_per_booster} steps, on {layers}"}

    def _settings(self) -> dict[str, Any]:
        """The settings by which a training goes on; functions are not saved."""
        return {
            "steps_per_booster": self.steps_per_booster,
            "layers": self.layers,
            "subspace": "a function" if callable(self.subspace) else self.subspace,
            "sampler": "a function" if callable(self.sampler) else self.sampler,
        }

    # ---- boosters ----

    def _begin_if_due(self) -> None:
        if self._steps >= self.steps_per_booster:
            self._begin_booster()
            self._steps, self._must_reset = 0, True
            if self._optimizer is not None:  # already: other methods read its moments in the forward pass
                self.before_step(self._optimizer)

    @torch.no_grad()
    def _begin_booster(self, is_first: bool = False) -> None:
        """Freeze the present factors, and start fresh ones in the layers that are chosen.

        Where A and B are 0 both gradients are 0 as well: such a layer takes no part, in any optimizer. Of the first
        booster, chosen layers keep their factors.
        """
        chosen = set(self._choose())
        for pair in self._pairs:
            takes_part, has_A, has_B = _block(pair.name) in chosen, bool(pair.A.any()), bool(pair.B.any())
            if is_first and takes_part and (has_A or has_B):
                continue
            if (has_A and has_B) if is_first else (has_A or has_B):
                add_booster(pair)
            pair.A.zero_()
            pair.B.zero_()
            if takes_part:
                self._start(pair)

    def _choose(self) -> Collection[str]:
        names = _layers(self._pairs)
        if callable(self.sampler):
            chosen = set(self.sampler(list(names), self._generator))
            if not chosen or not chosen <= set(names):
                raise ValueError(
                    f"the sampler returned {sorted(chosen)}, but it must choose one or more of the layers {names}."
                )
            return chosen
        if self.layers is None:
            return names
        return [names[index] for index in torch.randperm(len(names), generator=self._generator)[: self.layers]]

    def _start(self, pair: LoRAPair) -> None:
        """Draw the factors of a pair, which are 0, on the CPU: all ranks and devices get the same."""
        if callable(self.subspace):
            A = self.subspace(pair, self._generator)
            if not isinstance(A, Tensor) or A.shape != pair.shape_A or not bool(A.isfinite().all()):
                raise ValueError(
                    f"{pair.name}: subspace must return finite numbers of the shape {tuple(pair.shape_A)}, that of A."
                )
            pair.A.copy_(A)
        elif pair.adapter_name in pair.layer.lora_embedding_A:  # PEFT draws B of an embedding
            pair.B.copy_(torch.empty(pair.shape_B).normal_(generator=self._generator))
        elif self._start_by == "gaussian":
            rank = pair.layer.r[pair.adapter_name]
            pair.A.copy_(torch.empty(pair.shape_A).normal_(std=1 / rank, generator=self._generator))
        else:
            bound = 1 / math.sqrt(pair.shape_A[1:].numel())
            pair.A.copy_(torch.empty(pair.shape_A).uniform_(-bound, bound, generator=self._generator))


def reset_state(optimizer: torch.optim.Optimizer, pairs: Iterable[LoRAPair]) -> None:
    """Reset an optimizer's state of the factors of pairs, step counts included, to that before their first step."""
    optimizer = unwrap_optimizer(optimizer)
    if isinstance(optimizer, LoRAProAdamW):
        optimizer.reset_pair_state()
        return
    for pair in pairs:
        for factor in (pair.A, pair.B):
            optimizer.state.pop(factor, None)


def _layers(pairs: Iterable[LoRAPair]) -> list[str]:
    return list(dict.fromkeys(_block(pair.name) for pair in pairs))


def _block(name: str) -> str:
    """The name of the outermost numbered block around a layer, or its own."""
    numbered = re.match(r"(.*?\.\d+)\.", name)
    return numbered[1] if numbered else name


def _start_of(model: nn.Module, adapter: str) -> str:
    """The `init_lora_weights` of an adapter; a `ValueError` if they change the base or depend on it."""
    configs: Any = (part.peft_config for part in model.modules() if active_adapters(part))
    start = next((str(config[adapter].init_lora_weights) for config in configs if adapter in config), "True")
    if start not in _STARTS:
        raise ValueError(
            f"init_lora_weights={start!r} starts the factors from the base weight, but each booster starts from B = 0. "
            'Set init_lora_weights=True or "gaussian".'
        )
    return start


def _require_boostable(model: nn.Module, pairs: list[LoRAPair], rank: int | None) -> None:
    if is_compiled(model):
        raise ValueError(f"XGBLoRA changes the forward pass of a compiled model: {_COMPILED}")
    holders = holders_of_factors(model)
    for pair in pairs:
        layer, name = pair.layer, pair.adapter_name
        boosters, own_rank = boosters_of(layer), layer.r[name]
        if rank not in (None, own_rank):
            raise ValueError(
                f"{pair.name}: the rank of its adapter is {own_rank}, but that of a booster {rank}. Set r={rank} in "
                f"LoraConfig, without rank_pattern, or BoostingCallback(rank={own_rank})."
            )
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None:
            reason = f"its variant {type(variant).__name__} computes more than the weight plus s B A. Use plain LoRA"
        elif getattr(layer, "lora_bias", {}).get(name):
            reason = "its adapter has a bias, which is no product of factors. Set lora_bias=False"
        elif type(layer).__name__ == "MultiheadAttention":
            reason = "PEFT merges its factors into the weight in each pass. Leave it out of target_modules"
        elif len(holders[address(pair.A)]) > 1 or pair.tied_parameters:
            reason = "it shares its factors with another layer. Leave one of both out of target_modules"
        elif name != pairs[0].adapter_name:
            reason = f"the adapters {pairs[0].adapter_name!r} and {name!r} are trained at once. Activate one"
        elif boosters is not None and boosters.pair.adapter_name != name:
            reason = f"it has boosters of the adapter {boosters.pair.adapter_name!r}. Save that, and load it anew"
        elif boosters is not None and (later := sorted(adapters_of(layer) - boosters.beside)):
            reason = f"the adapter {later[0]!r}, such as TRL's reference, has no part of its boosters. Save "
            reason += "the model before, and train the adapter that PeftModel.from_pretrained loads"
        else:
            continue
        raise ValueError(f"{pair.name} cannot be boosted: {reason}.")


def _fits(pair: LoRAPair, A: Tensor, B: Tensor) -> bool:
    return A.shape[1:] == pair.shape_A[1:] and (B.shape[0], *B.shape[2:]) == (pair.shape_B[0], *pair.shape_B[2:])


def _common_seed(device: torch.device) -> int:
    """The seed of torch's own generator on the first rank."""
    seed = torch.tensor(torch.initial_seed() % 2**63, device=device)
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(seed, src=0)
    return int(seed)


def _check_count(name: str, value: int, meaning: str) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number {meaning}, 1 or more.")
