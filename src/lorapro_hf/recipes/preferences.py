"""How do rows become pairs of a better and a worse answer?"""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset
from transformers.hf_argparser import HfArg

from lorapro_hf.recipes.cells import require_columns
from lorapro_hf.recipes.data import DataArguments
from lorapro_hf.recipes.language import with_turns


@dataclass
class PreferenceArguments(DataArguments):
    """The data set of preferences."""

    prompt_column: str | None = HfArg(default=None, help="Column with the prompt, if not `prompt`.")
    chosen_column: str = HfArg(default="chosen", help="Column with the better answer.")
    rejected_column: str = HfArg(default="rejected", help="Column with the worse answer.")


def preferences(rows: Dataset, split: str, data: PreferenceArguments) -> Dataset:
    """Return the columns by TRL's names, without blank rows.

    Raises:
        UsageError: if a column is missing, or as in `with_turns`.
    """
    names = {data.chosen_column: "chosen", data.rejected_column: "rejected"}
    prompt = data.prompt_column or "prompt"
    if data.prompt_column is not None or prompt in rows.column_names:
        names[prompt] = "prompt"
    require_columns(rows, names, " Name them by --prompt_column, --chosen_column and --rejected_column.")
    rows = with_turns(rows.select_columns([*names]), names, f"the {split} set", data.map_kwargs)
    return rows.rename_columns({old: new for old, new in names.items() if old != new})
