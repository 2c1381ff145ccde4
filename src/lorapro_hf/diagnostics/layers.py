"""Which layers are measured, and in which turns?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from lorapro_hf.factors.pairs import LoRAPair, address, unwrapped_name
from lorapro_hf.factors.recording import buffer_bytes, has_active_dropout, padding_row

_MERGED = "PEFT merges the factors into its weight for each pass"


class NotMeasured(NamedTuple):
    """A layer that is not measured."""

    name: str
    reason: str


def sees_another_gradient(pair: LoRAPair) -> bool:
    """Whether the factors' gradients do not follow from the weight's gradient.

    With active dropout A sees another input than the weight, with DoRA B another output gradient, and PEFT leaves an
    embedding's padding row out of the gradient of A, but not of B.
    """
    has_dora = pair.layer.use_dora.get(pair.adapter_name, False)
    is_embedding = pair.adapter_name in pair.layer.lora_embedding_A
    return has_dora or has_active_dropout(pair) or (is_embedding and padding_row(pair) is not None)


def choose(
    pairs: Sequence[LoRAPair],
    layers: Sequence[str] | None,
    max_bytes: int,
    holders: Mapping[int, Sequence[LoRAPair]],
) -> tuple[list[list[LoRAPair]], list[NotMeasured]]:
    """Choose the pairs to measure, in turns whose buffers fit into `max_bytes`, and list the layers left out.

    `layers` are names, last parts of names, or patterns with `*`; `holders` is that of `holders_of_factors`.

    Raises:
        ValueError: a name matches no layer, or no layer can be measured.
    """
    _require_known(layers, pairs)
    left_out: list[NotMeasured] = []
    chosen: list[LoRAPair] = []
    attention = tuple(f"{unwrapped_name(pair.name)}." for pair in pairs if _is_attention(pair))
    for pair in pairs:
        name = unwrapped_name(pair.name)
        if layers is not None and not any(_matches(name, pattern) for pattern in layers):
            continue
        reason = _MERGED if name.startswith(attention) else _reason_against(pair, holders)
        if reason is None and (needed := buffer_bytes(pair)) > max_bytes:
            reason = (
                f"its gradient takes {needed:,} bytes, more than max_bytes={max_bytes:,} (--lora_pro_gap_max_bytes)"
            )
        if reason is None:
            chosen.append(pair)
        else:
            left_out.append(NotMeasured(name, reason))
    if not chosen:
        raise ValueError(
            f"no layer is left whose gradient can be measured; {left_out[0].name}: {left_out[0].reason}. Choose other "
            "layers (--lora_pro_gap_layers), or raise max_bytes."
        )
    return _in_turns(chosen, max_bytes), left_out


def _reason_against(pair: LoRAPair, holders: Mapping[int, Sequence[LoRAPair]]) -> str | None:
    """Why the gap of a pair cannot be measured, or `None` if it can."""
    layer = pair.layer
    if pair.layout != "matrix" or type(layer).__name__ == "ParamWrapper":
        return "it packs several weights or adapts a bare parameter"
    if pair.tied_parameters or len(holders.get(address(pair.A), ())) > 1:
        return "its factors are shared with another layer"
    if _is_attention(pair):
        return _MERGED
    if type(getattr(layer, "lora_variant", {}).get(pair.adapter_name)).__name__.startswith("ALora"):
        return "its adapter acts on some of the tokens only"
    if pair.adapter_name not in layer.lora_embedding_A and not isinstance(layer.lora_A[pair.adapter_name], nn.Linear):
        return "it is a convolution"
    return None


def _in_turns(pairs: Sequence[LoRAPair], max_bytes: int) -> list[list[LoRAPair]]:
    """As few turns as fit, each a fair sample: every so many layers of a kind, over the depth of the model."""
    by_kind = sorted(range(len(pairs)), key=lambda index: _kind(pairs[index]))  # stable: by depth within a kind
    for count in range(1, len(pairs) + 1):
        turns = [[pairs[index] for index in sorted(by_kind[turn::count])] for turn in range(count)]
        if all(sum(map(buffer_bytes, turn)) <= max_bytes for turn in turns):
            break
    return turns


def _require_known(layers: Sequence[str] | None, pairs: Sequence[LoRAPair]) -> None:
    for pattern in layers or ():
        if not any(_matches(unwrapped_name(pair.name), pattern) for pair in pairs):
            known = ", ".join(dict.fromkeys(_kind(pair) for pair in pairs))
            raise ValueError(
                f"layers (--lora_pro_gap_layers): {pattern!r} matches no adapted layer. Give names, patterns such as "
                f"'*.layers.0.*', or last parts of names, which are here: {known}."
            )


def _is_attention(pair: LoRAPair) -> bool:
    return type(pair.layer).__name__ == "MultiheadAttention"


def _kind(pair: LoRAPair) -> str:
    return unwrapped_name(pair.name).rpartition(".")[2]


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)
