"""Which update rule serves which mode?"""

from __future__ import annotations

from lorapro_hf.config import MOMENTS_DTYPES, LoRAProConfig
from lorapro_hf.optim.rules.base import UpdateRule
from lorapro_hf.optim.rules.efficient import Efficient
from lorapro_hf.optim.rules.factored import Factored
from lorapro_hf.optim.rules.full import Full, Full8Bit
from lorapro_hf.optim.rules.rite import Rite
from lorapro_hf.optim.rules.spectral import Spectral

RULES: dict[str, type[UpdateRule]] = {rule.name: rule for rule in (Full, Full8Bit, Factored, Spectral, Rite, Efficient)}
"""The rule of each mode, in the order of `lorapro_hf.config.MODES`."""
OF_ANY_OPTIMIZER = next(name for name, rule in RULES.items() if rule.projects_gradients)
"""The mode whose gradients any optimizer can step along."""


def rule_of(config: LoRAProConfig) -> UpdateRule:
    """The rule that settings select; a `ValueError` if one of them has no meaning for this rule."""
    return RULES[config.mode](config)


def all_settings(master_factors: bool) -> list[LoRAProConfig]:
    """Every mode with every dtype of its moments, in the order of the modes."""
    return [
        LoRAProConfig(mode=mode, moments_dtype=dtype, master_factors=master_factors)
        for mode, rule in RULES.items()
        for dtype in MOMENTS_DTYPES
        if dtype in rule.moments_dtypes
    ]
