"""Which settings do optimizer, callback and trainer share?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from lorapro_hf.utils.text_files import shortened, shown

if TYPE_CHECKING:
    from typing_extensions import Self

MODES = ("full", "full_8bit", "factored", "spectral", "rite", "efficient")
X_MODES = ("sylvester", "zero", "symmetric")
UPDATES = ("linear", "sequential")
MOMENTS_DTYPES = ("float32", "bfloat16")
BACKENDS = ("auto", "torch", "triton")
# Where the settings leave it open: the mode, and in modes without a value of their own the update and the trust region.
MODE = "spectral"
UPDATE = "linear"
TRUST_REGION: float | None = 0.04  # None is no limit
# Other keywords of the optimizer: a mistyped one gets the nearest name as a hint.
_BESIDE_SETTINGS = ("lr", "betas", "eps", "weight_decay", "decay_parameters", "check_memory", "saved_collectively")


def check_choice(name: str, value: object, valid: Sequence[object]) -> None:
    """Raise a `ValueError` that lists the valid values if `value` is not one of them."""
    if value not in valid:
        listed = ", ".join(repr(choice) for choice in valid)
        close = get_close_matches(shortened(str(value)).lower(), [each for each in valid if isinstance(each, str)], n=1)
        nearest = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}={shown(value)} is unknown; valid values are {listed}.{nearest}")


def _setting(default: Any, help: str, choices: tuple[str, ...] = (), *, mode: str | None = None) -> Any:
    """A field of `LoRAProConfig`; the command line takes default, help and choices from here.

    `mode` is the only mode in which the setting has a meaning.
    """
    metadata = {"help": help, **({"choices": list(choices)} if choices else {}), **({"mode": mode} if mode else {})}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class LoRAProConfig:
    """Settings of LoRA-Pro.

    Args:
        mode: Decides memory and learning rate. `"spectral"`, the default, steps along the orthogonalised momentum of
            the equivalent gradient and keeps half of AdamW's state. `"rite"` is LoRA-RITE, whose step does not divide
            by the scaling, and `"efficient"` is AdamW on the two factors, with longer steps of A while B is small.
            These three use learning rates of LoRA. `"full"`, the paper's, keeps Adam's moments of the equivalent
            gradient, of the size of the adapted weights, in float32, `"full_8bit"` the same in 8 bits an element, and
            `"factored"` in the memory of the factors. For these start at the learning rate of full fine-tuning (2e-5
            for a 7B model); with a trust region the best may be as high as that of LoRA.
        x_mode: Which of the equivalent factor gradients to take: `"sylvester"` (closest to LoRA's own gradients, the
            paper's choice), `"zero"` or `"symmetric"` (both factors contribute alike). A sequential update has this
            freedom in mode `"efficient"` only, and that mode only with `efficient_projected`.
        update: How a step is spent on the two factors. `"linear"`, the paper's, moves both at once along their
            gradients. `"sequential"` moves B first and then A against the new B, so that the weight moves as meant and
            not only to first order; in `"efficient"` the change that AdamW asks of A then acts through the new B.
            `None` is `"linear"`.
        rtol: Directions of a factor whose squared singular value is at most `rtol` times the largest one count as
            absent. `None` picks a value from the dtype, see `project_lora_gradients`.
        trust_region: The largest step of an adapted weight: its largest singular value, or rather a bound of it that is
            at most 1.2 times as large for r = 8, may be this fraction of `‖W0‖_F (1/√m + 1/√n)`, about the largest of a
            random weight of the size of the frozen one. Longer steps are shortened, so that a high learning rate does
            not destroy what the model has learned. It acts before weight decay, on each pair by itself, and the frozen
            weight is read once, at the first step. `None` is 0.04, in modes `"rite"` and `"efficient"` no limit; 0 is
            no limit, the paper's step.
        moments_dtype: `"bfloat16"` halves the memory of mode `"full"`, its only user. The second moment is then rounded
            stochastically: rounding to the nearest would freeze it.
        backend: The kernels that update moments of the size of the weight (modes `"full"` and `"full_8bit"`). `"auto"`
            is Triton on CUDA where it is installed, C++ on CPUs where a compiler can build it, else torch.
        shard_states: Whether the ranks of a distributed run divide the pairs: each rank steps its own pairs and keeps
            their moments only. `False` repeats the work and the moments on every rank. `None` divides them wherever a
            checkpoint can collect the state: under `LoRAProTrainer`, FSDP2 and DeepSpeed. Elsewhere set it to `True`
            and call `state_dict()` on all ranks. All processes must train the same model.
        master_factors: Whether factors in bfloat16 or float16 are stepped in float32 copies, and the parameters are
            the rounded copies: 4 bytes of state for each element of a factor. Without copies a step that changes an
            element by less than half a unit in its last place is lost. Wider factors get no copies.
        spectral_iterations: How often mode `"spectral"` takes the polar factor of its momentum and projects it on what
            the factors can follow: 1, or 3 to 5 for a direction whose singular values are closer to one.
        efficient_projected: Whether AdamW sees the projected gradients in mode `"efficient"`, as in the paper; `None`
            is `False`. It starts more slowly than plain LoRA and ends behind it: the projected gradients of A shrink as
            B grows, and the second moment remembers the largest.
        rite_clip: In mode `"rite"`, the largest norm of all pairs' gradients without the magnitude of the other factor;
            0 is no limit. It takes the place of `max_grad_norm`, which would make steps depend on how B A is split.
        rite_skip: In mode `"rite"`, such a gradient counts as zero if its root mean square is larger; 0 is no limit.
        rite_escape: Whether mode `"rite"` adds to its second moments as much as changes of their bases have lost.

    Raises:
        ValueError: for an unknown choice or a number out of range. Settings that have no meaning in a mode are refused
            where an optimizer, arguments or a callback is made of them.
    """

    mode: str = _setting(
        MODE,
        "The mode: 'spectral' (orthogonalised steps), 'rite' (LoRA-RITE) and 'efficient' (AdamW with longer steps of A "
        "while B is small) need memory of the size of the factors and use learning rates of LoRA. 'full' (the paper's) "
        "and 'full_8bit' keep Adam's moments of the adapted weights and need memory of their size, 'factored' memory "
        "of the size of the factors; learning rates of these three are those of full fine-tuning.",
        MODES,
    )
    x_mode: str = _setting(
        "sylvester",
        "Which of the equivalent factor gradients to take; 'sylvester' is the paper's. Without effect on a sequential "
        "update, except in mode 'efficient', which knows it with efficient_projected only.",
        X_MODES,
    )
    update: str | None = _setting(
        None,
        "How a step is spent on the two factors: 'linear' (the paper) moves both at once, 'sequential' B first and A "
        f"against the new B. By default {UPDATE!r}, and 'linear' in modes 'efficient' and 'rite'.",
        UPDATES,
    )
    rtol: float | None = _setting(
        None,
        "Directions of a factor whose squared singular value is at most this fraction of the largest one count as "
        "absent. By default chosen from the dtype.",
    )
    trust_region: float | None = _setting(
        None,
        "The largest step of an adapted weight, as a fraction of the size of the frozen weight, in spectral norm: "
        "longer steps are shortened. 0 for no limit, as in the paper"
        + (f". By default {TRUST_REGION:g}, and no limit in modes 'efficient' and 'rite'." if TRUST_REGION else "."),
    )
    moments_dtype: str = _setting("float32", "'bfloat16' halves the optimizer state of mode 'full'.", MOMENTS_DTYPES)
    backend: str = _setting(
        "auto",
        "The kernels that update moments of the size of the weights; 'auto' is Triton on CUDA where it is installed, "
        "C++ on CPUs where a compiler can build it, else torch.",
        BACKENDS,
    )
    shard_states: bool | None = _setting(
        None,
        "Whether the ranks of a distributed run divide moments and steps among themselves (the default) or each "
        "repeats all of them (false).",
    )
    master_factors: bool = _setting(
        False,
        "Step factors in bfloat16 or float16 in float32 copies, so that small steps are not rounded away; 4 bytes for "
        "each element of a factor.",
    )
    spectral_iterations: int = _setting(
        1,
        "How often mode 'spectral' repeats its orthogonalisation and the projection on what the factors can follow.",
        mode="spectral",
    )
    efficient_projected: bool | None = _setting(
        None,
        "Mode 'efficient': give AdamW the projected gradients, as in the paper (default: false), which starts and ends "
        "behind plain LoRA.",
        mode="efficient",
    )
    rite_clip: float = _setting(
        1.0,
        "Mode 'rite': the largest norm that the gradients without the magnitude of the other factor have, all pairs "
        "together; 0 for no limit. It takes the place of max_grad_norm.",
        mode="rite",
    )
    rite_skip: float = _setting(
        1.0,
        "Mode 'rite': a gradient without the magnitude of the other factor whose root mean square is larger counts as "
        "zero; 0 for no limit.",
        mode="rite",
    )
    rite_escape: bool = _setting(
        False,
        "Mode 'rite': add to the second moments as much as changes of their bases have lost, the paper's escape.",
        mode="rite",
    )

    def __new__(cls, *_: Any, **settings: Any) -> Self:
        """Refuse an unknown keyword with the nearest name, which a dataclass does not tell."""
        _require_known(settings, [setting.name for setting in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for setting in fields(self):
            if "choices" in setting.metadata and getattr(self, setting.name) is not setting.default:
                check_choice(setting.name, getattr(self, setting.name), setting.metadata["choices"])
        for switch in ("shard_states", "efficient_projected"):
            check_choice(switch, getattr(self, switch), (None, True, False))
        check_choice("rite_escape", self.rite_escape, (True, False))
        for name in ("rite_clip", "rite_skip"):
            limit = getattr(self, name)
            if isinstance(limit, bool) or not (isinstance(limit, int | float) and 0.0 <= limit < float("inf")):
                raise ValueError(f"{name}={shown(limit)} must be a number from 0 on; 0 is no limit.")
        check_choice("master_factors", self.master_factors, (True, False))
        if self.rtol is not None and not (isinstance(self.rtol, int | float) and 0.0 <= self.rtol < 1.0):
            raise ValueError(
                f"rtol={shown(self.rtol)} must be a number in [0, 1), or None for a value chosen from the dtype."
            )
        if self.trust_region is not None:
            self._check_trust_region()
        if isinstance(self.spectral_iterations, bool) or not (
            isinstance(self.spectral_iterations, int) and self.spectral_iterations >= 1
        ):
            raise ValueError(f"spectral_iterations={shown(self.spectral_iterations)} must be a whole number from 1 on.")

    def _check_trust_region(self) -> None:
        limit = self.trust_region
        if isinstance(limit, bool) or not (isinstance(limit, int | float) and 0.0 <= limit < 1.0):
            raise ValueError(
                f"trust_region={shown(limit)} must be a fraction below 1 such as 0.04, 0 for no limit, or None for the "
                "default: from 1 on, a single step could replace the frozen weight."
            )

    @classmethod
    def of(cls, settings: LoRAProConfig | Mapping[str, Any] | None = None, /, **keywords: Any) -> LoRAProConfig:
        """`settings` as a `LoRAProConfig`: as it is, from a dictionary or from keywords, or the default for `None`.

        Raises:
            TypeError: if it is anything else.
            ValueError: as in `from_dict`, and for `settings` and keywords together.
        """
        if keywords:
            _require_known(keywords, [setting.name for setting in fields(cls)], _BESIDE_SETTINGS)
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
        _require_known(settings, [setting.name for setting in fields(cls)])
        return cls(**settings)


def _require_known(names: Iterable[str], known: Sequence[str], beside: Sequence[str] = ()) -> None:
    """Raise a `ValueError` for an unknown name; the message suggests the nearest name, also among those in `beside`."""
    unknown = sorted(set(names) - set(known), key=str)
    if unknown:
        name = shortened(str(unknown[0]))
        if "clip" in name or "grad_norm" in name:
            raise ValueError(
                f"{shown(unknown)} are no LoRA-Pro settings. max_grad_norm of the trainer's arguments clips gradients, "
                "or clip_grad_norm_ in a loop, before the projection; in mode 'rite' rite_clip limits them instead."
            )
        bare = name.removeprefix("lora_pro_").removeprefix("lorapro_")  # as trainers name their arguments
        close = get_close_matches(bare, (*known, *beside), n=1)
        nearest = f" (did you mean {close[0]!r}?)" if close and close[0] not in unknown else ""
        raise ValueError(f"{shown(unknown)} are no LoRA-Pro settings{nearest}; the settings are {list(known)}.")
