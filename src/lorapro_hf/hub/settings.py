"""How do the settings of a training travel with its adapter?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorapro_hf import __version__
from lorapro_hf.config import LoRAProConfig
from lorapro_hf.optim.lora_pro import LoRAProAdamW
from lorapro_hf.optim.rules import rule_of
from lorapro_hf.optim.rules.base import MEANING
from lorapro_hf.utils.text_files import parse_json, read_settings_text, shortened, shown, write_text

SETTINGS_FILE = "lorapro_config.json"
_VERSION = "lorapro_hf_version"
_OF_OPTIMIZER = ("learning_rate", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class Settings:
    """The settings of LoRA-Pro and, if known, the optimizer's `learning_rate`, `betas`, `eps` and `weight_decay`."""

    config: LoRAProConfig
    optimizer: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: LoRAProAdamW | LoRAProConfig | Mapping[str, Any] | None) -> Settings:
        """Return the settings of an optimizer, or LoRA-Pro's alone; `ValueError` if the mode cannot have them."""
        if not isinstance(given, LoRAProAdamW):
            config = LoRAProConfig.of(given)
            rule_of(config)
            return cls(config)
        stated = {**given.defaults, "learning_rate": given.defaults["lr"]}
        return cls(given.config, {name: _plain(stated[name]) for name in _OF_OPTIMIZER})

    def save(self, folder: Path) -> None:
        """Write `lorapro_config.json` into an existing folder, with the settings that the mode chose."""
        rule = rule_of(self.config)
        config = replace(self.config, **rule.in_force)
        content = {**config.to_dict(), **MEANING, **self.optimizer, _VERSION: __version__}
        write_text(folder / SETTINGS_FILE, json.dumps(content, indent=2) + "\n")


def load_lora_pro_config(
    folder_or_repo: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> LoRAProConfig:
    """Return LoRA-Pro's settings from the `lorapro_config.json` beside an adapter.

    Args:
        folder_or_repo: A local folder, or the name of a repository on the Hub.
        revision: Branch, tag or commit of the repository.
        token: Access token for the Hub; by default the one of `hf auth login`.

    Raises:
        FileNotFoundError: The folder holds no such file.
        ValueError: The file is damaged, or holds settings that this version does not know.
        huggingface_hub.errors.HfHubHTTPError: The Hub does not deliver the file.
    """
    file = Path(folder_or_repo, SETTINGS_FILE)
    if not Path(folder_or_repo).is_dir():
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(str(folder_or_repo), SETTINGS_FILE, revision=revision, token=token))
    elif not file.is_file():
        raise FileNotFoundError(
            f"{folder_or_repo} holds no {SETTINGS_FILE}: the adapter in it was not saved by LoRAProTrainer, "
            "save_adapter or push_adapter."
        )
    try:
        content = parse_json(read_settings_text(file))
        version = content.pop(_VERSION)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged, or not written by lorapro_hf ({shown(error)}). Save the adapter anew."
        ) from error
    if {name: content.pop(name, None) for name in MEANING} != MEANING and content.get("trust_region"):
        raise ValueError(
            f"{file}, written by lorapro_hf {shortened(str(version), 40)}, holds a trust_region that limited the "
            "product of the changes of both factors, a limit that is gone. Set it to 0 there for no limit, or remove "
            "it for the default."
        )
    try:
        config = LoRAProConfig.from_dict({k: v for k, v in content.items() if k not in _OF_OPTIMIZER})
        rule_of(config)  # refuses settings that have no meaning in the mode
    except ValueError as error:
        raise ValueError(
            f"{file}, written by lorapro_hf {shortened(str(version), 40)}, cannot be read by {__version__}: {error}"
        ) from error
    return config


def _plain(value: Any) -> Any:
    """Return plain numbers; capturable optimizers take tensors as learning rate."""
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else float(value)
