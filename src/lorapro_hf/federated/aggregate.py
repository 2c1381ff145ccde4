"""How do the adapters of several clients become one (LoRA-FAIR, plain averaging, the exact sum)?"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor

from lorapro_hf.federated.adapters import (
    Adapter,
    Layer,
    bias_module,
    changed_base,
    find_layers,
    read_adapter,
    require_lora,
)
from lorapro_hf.functional.aggregation import OBJECTIVES, fair_shift, inner_product, truncated_product

METHODS = ("fair", "mean", "exact")

_NO_MAXIMUM = (
    "%s keeps the mean of B: at λ=%g the cosine grows as B shrinks to 0, so that no B is best. Choose the objective "
    '"ridge".'
)

logger = logging.getLogger(__name__)


class Rule(NamedTuple):
    """How adapters are aggregated; the arguments are those of `aggregate_adapters`."""

    method: str = "fair"
    lam: float = 0.01
    objective: str = "cosine"
    rank: int | None = None

    def require_valid(self) -> None:
        """Raise a `ValueError` if a setting is out of range, or has no meaning for the method."""
        for name, allowed in (("method", METHODS), ("objective", OBJECTIVES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")
        if not 0 <= self.lam < math.inf:
            raise ValueError(f"lam={self.lam!r} must be 0 or a positive number, such as 0.01.")
        if self.rank is not None and self.method != "exact":
            raise ValueError(f'rank is for the method "exact"; {self.method!r} keeps the rank of the adapters.')
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank!r} must be at least 1.")


class Agreement(NamedTuple):
    """How close is the product of a layer's aggregated factors to the mean of the clients' products?

    Args:
        layer: name of the module in the base model.
        rank: of the result.
        mean_cosine: cosine of the mean product and the product of the mean factors; `None` where ranks differ.
        cosine: the same for the result.
        length: norm of the result's product, beside that of the mean product.
    """

    layer: str
    rank: int
    mean_cosine: float | None
    cosine: float
    length: float


def aggregate_adapters(
    adapters: Sequence[Mapping[str, Tensor] | str | Path],
    weights: Sequence[float] | None = None,
    method: str = "fair",
    lam: float = 0.01,
    objective: str = "cosine",
    *,
    rank: int | None = None,
    config: LoraConfig | None = None,
) -> dict[str, Tensor]:
    """Aggregate the LoRA adapters of several clients to one, as the server of a federated training does.

    Clients change the weight by `Δ = Σ p s B A`, with the share p and the scaling s of each. The mean factors give
    another product.

    - `"mean"` averages A and B (FedIT).
    - `"fair"` averages A, and corrects the mean B so that the product comes closest to Δ (LoRA-FAIR, arXiv
      2411.14961). The optimum is computed; the paper climbs to it by SGD.
    - `"exact"` stacks the factors: the product is Δ, and the rank is the sum of the ranks.

    The result has the scaling of the first adapter, layer by layer; B and `lora_bias` of the others are converted to
    it. For `"exact"`, load the result with `lora_alpha` that gives this scaling at the new rank. All other tensors,
    such as those of `modules_to_save` and DoRA's magnitudes, are averaged. Sums are in float64, no matrix has the size
    of a weight, and the result has the dtypes and devices of the first adapter.

    Args:
        adapters: state dicts, such as `get_peft_model_state_dict` returns, or folders of saved adapters.
        weights: the share of each adapter, such as its number of examples; by default equal. They need not add up to 1.
        method: `"fair"`, `"mean"` or `"exact"`.
        lam: λ of `"fair"`, from 0 on: how strongly B is held at the mean.
        objective: of `"fair"`: `"cosine"` (the paper's similarity, here with `λ ‖ΔB‖²`), which leaves the length of the
            product to B, or `"ridge"`, least squares with λ relative to the mean eigenvalue of `A Aᵀ`. See
            `fair_shift`.
        rank: of `"exact"`: keep this many of the largest directions of each layer.
        config: PEFT's settings of the adapters in state dicts. They are needed for `target_parameters`; without them,
            all adapters count as equally scaled.

    Returns:
        A state dict with the keys of the first adapter.

    Raises:
        ValueError: an argument is out of range, an adapter cannot be read, the adapters do not fit together, a value
            is NaN or Inf, ranks differ with another method than `"exact"`, or the method would be wrong for a kind of
            layer (DoRA with `"fair"` and `"exact"`). The message names the adapter and the tensor.
        TypeError: an adapter is neither a state dict nor a folder.
    """
    opened = open_adapters(adapters, config)
    return aggregate(opened, weights, Rule(method, lam, objective, rank))[0]


def open_adapters(
    adapters: Sequence[Mapping[str, Tensor] | str | Path], config: LoraConfig | None = None
) -> list[Adapter]:
    """The adapters in folders or state dicts; an error if there are none, both kinds or others."""
    if isinstance(adapters, str | Path | Mapping) or not adapters:
        raise ValueError("adapters must be a list of state dicts or folders, with at least one of them.")
    for place, each in enumerate(adapters):
        if not isinstance(each, str | Path | Mapping):
            raise TypeError(
                f"adapters[{place}] is a {type(each).__name__}: give get_peft_model_state_dict(model), or the folder "
                "of a saved adapter."
            )
    are_folders = {isinstance(each, str | Path) for each in adapters}
    if len(are_folders) > 1 or (are_folders == {True} and config is not None):
        raise ValueError("folders have settings of their own: give either folders, or state dicts and config.")
    if config is not None:
        require_lora(config, "config")
    return [
        read_adapter(each) if isinstance(each, str | Path) else Adapter(f"adapters[{place}]", each, config)
        for place, each in enumerate(adapters)
    ]


def aggregate(
    adapters: Sequence[Adapter], weights: Sequence[float] | None, rule: Rule
) -> tuple[dict[str, Tensor], list[Agreement]]:
    """The state dict of `aggregate_adapters`, and how close each layer comes."""
    rule.require_valid()
    shares = _shares(weights, len(adapters))
    first, layers = adapters[0], find_layers(adapters, rule.method)
    if rule.method == "exact":
        _require_stackable(adapters, layers, rule)
    found: dict[str, Tensor] = {}
    rows = []
    for layer in layers:
        factors, row = _aggregated(adapters, shares, layer, rule)
        found |= factors
        rows.append(row)
    for key in first.tensors.keys() - found.keys():
        module, kind = bias_module(key), first.tensors[key]
        weights_of_sum = shares if module is None else _scales(adapters, shares, module)
        mean = _sum(
            p * each.tensors[key].detach().cpu().double() for p, each in zip(weights_of_sum, adapters, strict=True)
        )
        found[key] = (mean if kind.is_floating_point() else mean.round()).to(kind)
    for key, tensor in found.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{key} of the result does not fit into {tensor.dtype}. Save the adapters in float32.")
    return {key: found[key] for key in first.tensors}, rows


def _aggregated(
    adapters: Sequence[Adapter], shares: Sequence[float], layer: Layer, rule: Rule
) -> tuple[dict[str, Tensor], Agreement]:
    scales = _scales(adapters, shares, layer.module)
    all_B, all_A = zip(*(layer.matrices(adapter) for adapter in adapters), strict=True)
    weighted_B = [scale * B for scale, B in zip(scales, all_B, strict=True)]
    target = torch.cat(weighted_B, -1), torch.cat(all_A, -2)
    mean = None
    if len({A.shape for A in all_A}) == 1:
        mean = _sum(weighted_B), _sum(share * A for share, A in zip(shares, all_A, strict=True))
    packed_ranks = 1 if layer.is_experts else layer.batch  # PEFT's rank is that of all groups of a convolution
    B, A = target if mean is None or rule.method == "exact" else mean
    if rule.rank is not None:
        B, A = truncated_product(B, A, min(rule.rank // packed_ranks, *B.shape[-2:], A.shape[-1]))
    if rule.method == "fair":
        change, exists = fair_shift(B, A, *target, rule.lam, rule.objective)
        B = B + change
        if not exists.all():
            logger.warning(_NO_MAXIMUM, layer.module, rule.lam)
    mean_cosine = None if mean is None else _agreement(mean, target)[0]
    row = Agreement(layer.module, A.shape[-2] * packed_ranks, mean_cosine, *_agreement((B, A), target))
    return layer.factors(B, A, adapters[0]), row


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def _agreement(product: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The cosine of two products, all experts together, and the ratio of their norms; NaN where one is 0."""
    inner, own, wanted = (
        float(inner_product(*x, *y).sum()) for x, y in ((product, target), (product, product), (target, target))
    )
    if own <= 0 or wanted <= 0:
        return math.nan, math.nan
    return max(-1.0, min(1.0, inner / math.sqrt(own * wanted))), math.sqrt(own / wanted)


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    values = [1.0] * count if weights is None else [float(each) for each in weights]
    if len(values) != count:
        raise ValueError(f"{len(values)} weights do not fit {count} adapters: give one for each.")
    if not all(0 <= each < math.inf for each in values) or not any(values):
        raise ValueError(f"weights={values} must be 0 or positive numbers, and not all 0.")
    parts = [each / max(values) for each in values]  # whose sum is finite
    return [part / sum(parts) for part in parts]


def _scales(adapters: Sequence[Adapter], shares: Sequence[float], module: str) -> list[float]:
    """The factor of each adapter's B, in the scaling of the first."""
    scalings = [adapter.rank_and_scaling(module)[1] for adapter in adapters]
    if not all(map(math.isfinite, scalings)) or scalings[0] == 0:
        raise ValueError(f"{module} has the scalings {scalings}: set lora_alpha to finite values other than 0.")
    return [share * scaling / scalings[0] for share, scaling in zip(shares, scalings, strict=True)]


def _require_stackable(adapters: Sequence[Adapter], layers: Sequence[Layer], rule: Rule) -> None:
    init = changed_base(adapters[0])
    if init is not None:
        raise ValueError(
            f"init_lora_weights={init!r} subtracts factors of the adapter's rank from the base, and the exact sum has "
            "another rank. Convert the adapters on saving, by path_initial_model_for_weight_conversion."
        )
    for layer in layers:
        if rule.rank is not None and not layer.is_experts and rule.rank % layer.batch:
            raise ValueError(
                f"{layer.module} is a convolution of {layer.batch} groups: rank={rule.rank} must be a multiple."
            )


def config_of_result(adapters: Sequence[Adapter], rows: Sequence[Agreement]) -> LoraConfig:
    """The settings with which PEFT loads a result: those of the first adapter, at the result's ranks."""
    first = adapters[0]
    if first.config is None:
        raise ValueError(f"the settings of {first.name} are not known: give folders, or config.")
    config = deepcopy(first.config)
    config.inference_mode = True
    settings: dict[str, tuple[int, float]] = {}
    for row in rows:
        _, scaling, wrapped = first.rank_and_scaling(row.layer)
        alpha = scaling * (math.sqrt(row.rank) if config.use_rslora else row.rank)
        for name in [f"{row.layer}.{parameter}" for parameter in wrapped] or [row.layer]:
            settings[f"^{re.escape(name)}"] = row.rank, int(alpha) if alpha == int(alpha) else alpha
    if {row.layer: row.rank for row in rows} != {row.layer: first.rank_and_scaling(row.layer)[0] for row in rows}:
        config.r, config.lora_alpha = Counter(settings.values()).most_common(1)[0][0]
        config.rank_pattern = {name: rank for name, (rank, _) in settings.items() if rank != config.r}
        config.alpha_pattern = {name: alpha for name, (_, alpha) in settings.items() if alpha != config.lora_alpha}
    return config
