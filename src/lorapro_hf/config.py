"""Which LoRA-Pro is meant: the settings that optimizer, callback and trainer share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

MODES = ("full", "efficient")
X_MODES = ("sylvester", "zero", "symmetric")
UPDATES = ("linear",)


def check_choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    """Raise a `ValueError` that lists the valid values if `value` is not one of them."""
    if value not in valid:
        listed = ", ".join(repr(choice) for choice in valid)
        raise ValueError(f"{name}={value!r} is unknown; valid values are {listed}.")


@dataclass(frozen=True)
class LoRAProConfig:
    """Settings of LoRA-Pro.

    Args:
        mode: `"full"` keeps the Adam moments of the equivalent gradient, of the size of the adapted weights, and uses
            learning rates of full fine-tuning (2e-5 for a 7B model). `"efficient"` keeps moments of the size of the
            factors and uses learning rates of LoRA.
        x_mode: Which of the equivalent factor gradients to take: `"sylvester"` (closest to LoRA's own gradients, the
            paper's choice), `"zero"` or `"symmetric"` (both factors contribute alike).
        update: How a step is spent on the two factors: `"linear"` moves both at once along their gradients.
        rtol: Directions of a factor whose squared singular value is at most `rtol` times the largest one count as
            absent. `None` picks a value from the dtype, see `project_lora_gradients`.

    Raises:
        ValueError: for an unknown `mode`, `x_mode` or `update`, or an `rtol` outside `[0, 1)`.
    """

    mode: str = "full"
    x_mode: str = "sylvester"
    update: str = "linear"
    rtol: float | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("x_mode", self.x_mode, X_MODES)
        check_choice("update", self.update, UPDATES)
        if self.rtol is not None and not (isinstance(self.rtol, int | float) and 0.0 <= self.rtol < 1.0):
            raise ValueError(
                f"rtol={self.rtol!r} must be a number in [0, 1), or None for a value chosen from the dtype."
            )

    @classmethod
    def of(cls, settings: LoRAProConfig | Mapping[str, Any] | None) -> LoRAProConfig:
        """`settings` as a `LoRAProConfig`: as it is, from a dictionary, or the default for `None`.

        Raises:
            TypeError: if it is anything else.
            ValueError: as in `from_dict`.
        """
        if settings is None or isinstance(settings, Mapping):
            return cls.from_dict(settings or {})
        if not isinstance(settings, cls):
            raise TypeError(
                f"the settings of LoRA-Pro must be a LoRAProConfig or a dictionary of its settings such as "
                f'{{"mode": "efficient"}}, got {settings!r}.'
            )
        return settings

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dictionary of plain values, ready for JSON or YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> LoRAProConfig:
        """The inverse of `to_dict`; missing entries take their defaults.

        Raises:
            ValueError: for an entry that is no setting of LoRA-Pro.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"{unknown} are no LoRA-Pro settings; the settings are {known}.")
        return cls(**settings)
