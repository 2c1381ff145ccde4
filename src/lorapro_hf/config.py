"""Which LoRA-Pro is meant: the settings that optimizer, callback and trainer share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

from lorapro_hf.utils.text_files import shortened, shown

MODES = ("full", "full_8bit", "factored", "efficient")
X_MODES = ("sylvester", "zero", "symmetric")
UPDATES = ("linear", "sequential")
MOMENTS_DTYPES = ("float32", "bfloat16")
BACKENDS = ("auto", "torch", "compiled", "triton")
TRUST_REGION = 0.03  # of every mode that has one, where the settings leave it open
# What may stand beside the settings as keywords, for those who mistype it.
_BESIDE_SETTINGS = ("lr", "betas", "eps", "weight_decay", "decay_parameters", "check_memory", "saved_collectively")


def check_choice(name: str, value: object, valid: tuple[object, ...]) -> None:
    """Raise a `ValueError` that lists the valid values if `value` is not one of them."""
    if value not in valid:
        listed = ", ".join(repr(choice) for choice in valid)
        raise ValueError(f"{name}={shown(value)} is unknown; valid values are {listed}.")


@dataclass(frozen=True)
class LoRAProConfig:
    """Settings of LoRA-Pro.

    Args:
        mode: What Adam's moments are kept of, which decides memory and learning rate. `"full"`: of the equivalent
            gradient, of the size of the adapted weights, in float32. `"full_8bit"`: the same in 8 bits an element
            (needs bitsandbytes, or Triton on CUDA). `"factored"`: of the equivalent gradient, in as little memory as
            the factors take. For these three start at the learning rate of full fine-tuning (2e-5 for a 7B model)
            and go up: with a trust region the best may be as high as that of LoRA. `"efficient"`: of the two factors,
            with learning rates of LoRA.
        x_mode: Which of the equivalent factor gradients to take: `"sylvester"` (closest to LoRA's own gradients, the
            paper's choice), `"zero"` or `"symmetric"` (both factors contribute alike). Without effect on a sequential
            update of modes other than `"efficient"`, which has no such freedom.
        update: How a step is spent on the two factors: `"linear"`, the paper's, moves both at once along their
            gradients; `"sequential"` moves B first and then A against the new B, so that the weight moves as meant and
            not only to first order. In `"efficient"` it is the change that AdamW asks of A that then acts through
            the new B.
        rtol: Directions of a factor whose squared singular value is at most `rtol` times the largest one count as
            absent. `None` picks a value from the dtype, see `project_lora_gradients`.
        trust_region: How large the product of the changes of both factors may be, as a share of the change of `B A` to
            first order: what would exceed it is shortened, all of a linear step, the part of A of a sequential one.
            It acts while B is small, mostly for some 30 to 100 steps, as a warm-up that each weight has for itself,
            and makes learning rates usable that are too high otherwise; a larger limit acts for a shorter time.
            From 1 on the product may undo the change to first order, so that such limits are refused. `None` is 0.03,
            `0` no limit, which is the paper's step. Mode `"efficient"` has none: there AdamW decides how far the
            factors move.
        moments_dtype: `"bfloat16"` halves the memory of mode `"full"`, its only user. The second moment is then rounded
            stochastically: rounding to the nearest would freeze it.
        backend: What computes the update of moments of the size of the weight (modes `"full"` and `"full_8bit"`).
            `"auto"`: Triton for CUDA where it is installed, else torch. `"compiled"` is `torch.compile`, which needs a
            C++ compiler on the CPU.
        shard_states: Whether the ranks of a distributed run share the pairs out: each steps its own and keeps the
            moments of those alone. `False` repeats the work and the moments on every rank. `None` shares wherever the
            state can be collected for a checkpoint: under `LoRAProTrainer`, FSDP2 and DeepSpeed; elsewhere whoever
            saves has to call `state_dict()` on all ranks, so that it must be asked for. All processes must train the
            same model. Without effect on one process.
        master_factors: Whether factors in bfloat16 or float16 are stepped in float32 copies, of which the parameters
            are the roundings: 4 bytes of state for each element of a factor. Without them a step that changes an
            element by less than half a unit in its last place is lost. Wider factors need no copies and get none.

    Raises:
        ValueError: for an unknown choice, an `rtol` outside `[0, 1)`, or a `trust_region` outside `[0, 1)`. Settings
            that have no meaning in a mode are refused where an optimizer, arguments or a callback is made of them.
    """

    mode: str = "full"
    x_mode: str = "sylvester"
    update: str = "linear"
    rtol: float | None = None
    trust_region: float | None = None
    moments_dtype: str = "float32"
    backend: str = "auto"
    shard_states: bool | None = None
    master_factors: bool = False

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("x_mode", self.x_mode, X_MODES)
        check_choice("update", self.update, UPDATES)
        check_choice("moments_dtype", self.moments_dtype, MOMENTS_DTYPES)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("shard_states", self.shard_states, (None, True, False))
        check_choice("master_factors", self.master_factors, (True, False))
        if self.rtol is not None and not (isinstance(self.rtol, int | float) and 0.0 <= self.rtol < 1.0):
            raise ValueError(
                f"rtol={shown(self.rtol)} must be a number in [0, 1), or None for a value chosen from the dtype."
            )
        if self.trust_region is not None:
            self._check_trust_region()

    def _check_trust_region(self) -> None:
        limit = self.trust_region
        if isinstance(limit, bool) or not (isinstance(limit, int | float) and 0.0 <= limit < 1.0):
            raise ValueError(
                f"trust_region={shown(limit)} must be a share below 1 such as 0.1, 0 for no limit, or None for "
                f"{TRUST_REGION:g}: from 1 on, the product of both changes may undo the rest of the step."
            )

    @property
    def is_sequential(self) -> bool:
        """Whether a step moves B first and then A against the new B."""
        return self.update == "sequential"

    @classmethod
    def of(cls, settings: LoRAProConfig | Mapping[str, Any] | None = None, /, **keywords: Any) -> LoRAProConfig:
        """`settings` as a `LoRAProConfig`: as it is, from a dictionary or from keywords, or the default for `None`.

        Raises:
            TypeError: if it is anything else.
            ValueError: as in `from_dict`, and for `settings` and keywords together.
        """
        if keywords:
            _require_known(keywords, [field.name for field in fields(cls)], _BESIDE_SETTINGS)
            if settings is not None:
                raise ValueError(
                    f"config= and {', '.join(f'{name}=' for name in keywords)} both hold settings of LoRA-Pro. Put all "
                    "of them into config=, or drop it."
                )
            return cls(**keywords)
        if settings is None or isinstance(settings, Mapping):
            return cls.from_dict(settings or {})
        if not isinstance(settings, cls):
            raise TypeError(
                f"the settings of LoRA-Pro must be a LoRAProConfig or a dictionary of its settings such as "
                f'{{"mode": "efficient"}}, got {shown(settings)}.'
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
        _require_known(settings, [field.name for field in fields(cls)])
        return cls(**settings)


def _require_known(names: Iterable[str], known: Sequence[str], beside: Sequence[str] = ()) -> None:
    """Raise a `ValueError` for a name that is not known; it names the nearest, also of those beside the settings."""
    unknown = sorted(set(names) - set(known), key=str)
    if unknown:
        close = get_close_matches(shortened(str(unknown[0])), (*known, *beside), n=1)
        nearest = f" (did you mean {close[0]!r}?)" if close and close[0] not in unknown else ""
        raise ValueError(f"{shown(unknown)} are no LoRA-Pro settings{nearest}; the settings are {list(known)}.")
