"""How is the state of an optimizer of factor pairs saved and loaded, by itself or by an engine?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.optim.checkpoint import check_open_settings, check_state_dict
from lorapro_hf.optim.consolidation import (
    States,
    await_all,
    collect_states,
    own_state,
    read_own_state,
    shard_states,
    whole,
)
from lorapro_hf.optim.finite import FiniteChecks, of_states, require_finite
from lorapro_hf.optim.groups import check_hyperparameters
from lorapro_hf.optim.rules.base import MEANING


class SavedPairs(FiniteChecks):
    """The state of an optimizer, in whole on one rank, in parts on each, or with that of the pairs apart."""

    def _forget_run(self) -> None:
        super()._forget_run()
        self._consolidated: States | None = None

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Collect the state of all pairs on the rank `to`, where ranks share it; call it on all ranks before saving.

        Until the next step `state_dict()` on that rank is then whole and needs no other rank.

        Raises:
            RuntimeError: another rank does not call this within the limit of the process group.
            ValueError: a parameter or its state holds NaN or Inf.
        """
        ownership = self._current_ownership()
        if ownership.group is not None and ownership.access.in_place:
            await_all(ownership.attendance, saves=True)
            self._consolidated = collect_states(ownership, self.state, self.rule, to)
            self.require_finite_save()

    def state_dict(self) -> dict[str, Any]:
        """As in `torch.optim.Optimizer`: tensors by parameter, and the groups.

        Where ranks share the state, call this on all ranks: it collects the state on rank 0, unless
        `consolidate_state_dict` has done so; the other ranks get the state of their own pairs and the steps of all
        pairs. With DTensors each rank gets its rows of the moments of all pairs, as DTensors. Where every rank holds
        the whole state, it is complete everywhere without communication. Under an engine the state of the pairs is in
        `pair_state()` instead.

        Raises:
            RuntimeError: another rank does not call this within the limit of the process group.
            ValueError: a parameter or its state holds NaN or Inf.
        """
        self._settle_skipped()
        if self.has_engine:
            return self._state_dict_of_engine()
        ownership = self._current_ownership()
        saved = super().state_dict()
        if ownership.access.in_place and ownership.group is None:
            self.require_finite_save()
            return saved
        states = self._consolidated
        if states is None:
            await_all(ownership.attendance, self.saved_collectively)
            if ownership.access.in_place:
                states = collect_states(ownership, self.state, self.rule, 0)
            else:
                states = shard_states(ownership, self.state, self.rule)
            self.require_finite_save()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            if id(parameter) in self._of_pairs:
                saved["state"].pop(key, None)
                if parameter in states:
                    saved["state"][key] = states[parameter]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; moments of factors stay in float32 at least.

        Any number of ranks may have saved it. With DTensors call it on all ranks.

        Raises:
            ValueError: the checkpoint is of another mode, rank, model or optimizer, or holds NaN or Inf. Nothing has
                been changed then.
        """
        if self.has_engine:
            self._load_state_dict_of_engine(state_dict)
            return
        ownership = self._current_ownership()
        needed = ownership.owned if ownership.access.in_place else self.pairs  # all ranks gather DTensors
        check_state_dict(state_dict, self.param_groups, self.pairs, self.config, needed)
        for index, group in enumerate(state_dict["param_groups"]):
            check_hyperparameters({**self.defaults, **group}, f" in param group {index} of the checkpoint")
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        loaded = [parameter for group in self.param_groups for parameter in group["params"]]
        pair_of = {id(factor): pair for pair in self.pairs for factor in (pair.A, pair.B)}
        of_factors = {key for key, parameter in zip(saved, loaded, strict=True) if id(parameter) in pair_of}
        # torch loads the other parameters only: it would cast moments to the dtype of their factor. That rounds moments
        # of bf16 factors, and makes 8-bit codes four times as large.
        others = {key: value for key, value in state_dict["state"].items() if key not in of_factors}
        super().load_state_dict({**state_dict, "state": others})
        self._ownership, self._consolidated = None, None
        self._begin_loaded()
        own_pairs = set(map(id, self._current_ownership().owned))
        for key, parameter in zip(saved, loaded, strict=True):
            if key in of_factors:
                pair = pair_of[id(parameter)]
                state = {name: whole(value) for name, value in state_dict["state"].get(key, {}).items()}
                if state and id(pair) in own_pairs:  # an empty entry would outlive an exchange of parameters
                    self.state[parameter] = self._state_as_kept(pair, parameter, state)
            elif "step" in self.state.get(parameter, {}):
                self.state[parameter]["step"] = _as_step(self.state[parameter]["step"], parameter)

    def pair_state(self) -> dict[str, Tensor]:
        """The state of the pairs that this rank steps, by names that hold for any number of ranks."""
        return own_state(self._current_ownership(), self.state, self.rule)

    def load_pair_state(self, read: Callable[[str], Tensor | None]) -> None:
        """Load the state of this rank's pairs, as `pair_state` returned it on any number of ranks.

        Call it after the groups have been loaded, which hold the number of skipped steps.

        Args:
            read: returns the tensor of a name, `None` if no rank has saved it.

        Raises:
            ValueError: part of the state of a pair is missing or has another shape, or the state of a pair holds NaN
                or Inf on any rank. Nothing has been changed then.
        """
        ownership = self._current_ownership()
        states = read_own_state(ownership, read, self.rule)
        require_finite(of_states(ownership.owned, states), ownership.access.group)
        self._moments = {}
        self._begin_loaded()
        for pair in ownership.owned:  # a pair without saved state had not been stepped
            for parameter in (pair.A, pair.B):
                self.state.pop(parameter, None)
                if parameter in states:
                    self.state[parameter] = dict(states[parameter])

    def reset_pair_state(self) -> None:
        """Reset the state of all pairs, step counts and master copies included, to that before their first step."""
        for pair in self.pairs:
            for parameter in (pair.A, pair.B, *pair.tied_parameters):
                for value in self.state.get(parameter, {}).values():
                    value.zero_()
        for moments in self._moments.values():
            moments.uniform = True
        self._consolidated = None

    def _state_dict_of_engine(self) -> dict[str, Any]:
        """The groups and the state of the engine's tensors: factors with state need not be in any group."""
        factors: list[Tensor] = [factor for pair in self.pairs for factor in (pair.A, pair.B)]
        of_pairs = {factor: self.state.pop(factor) for factor in factors if factor in self.state}
        try:
            return super().state_dict()
        finally:
            self.state.update(of_pairs)

    def _load_state_dict_of_engine(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `_state_dict_of_engine`; the pairs are left without state."""
        keys = ("lora_pro_mode", "moments_dtype", "rite_escape", "param_shapes")
        saved, expected = (
            [[group.get(key) for key in keys] for group in groups]
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        if saved != expected:
            raise ValueError(
                "the optimizer's state in the checkpoint is of another optimizer, mode or model. Resume with the "
                "settings and the model it was written with, or load the weights alone: with DeepSpeed "
                "load_checkpoint(..., load_optimizer_states=False)."
            )
        check_open_settings(state_dict["param_groups"], self.rule)
        super().load_state_dict(state_dict)
        self._begin_loaded()
        for parameter, state in self.state.items():
            if "step" in state:
                state["step"] = _as_step(state["step"], parameter)

    def _begin_loaded(self) -> None:
        """Begin a training whose groups have been loaded, the number of skipped steps among them."""
        self._skipped, self._starts_finite = None, False
        for group in self.param_groups:
            group.update({**MEANING, **self.rule.in_force})
        self._begin_training()

    def _state_as_kept(self, pair: LoRAPair, parameter: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
        specs = [spec for spec in self.rule.specs(pair) if parameter is (pair.A if spec.side == "A" else pair.B)]
        kept = {
            spec.name: torch.as_tensor(state[spec.name]).to(parameter.device, spec.dtype, copy=True)
            for spec in specs
            if spec.name in state
        }
        if "step" in state:
            kept["step"] = _as_step(state["step"], parameter)
        return kept


def _as_step(value: Any, parameter: Tensor) -> Tensor:
    """A count of steps as a float32 tensor of its own on the device of a parameter."""
    return torch.as_tensor(value, dtype=torch.float32).to(parameter.device, copy=True)
