"""Writes docs/support.md from the cases that the tests run: `make support-table`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorapro_hf.utils.private_names import tested
from support_cases import GROUPS
from support_rows import COLUMNS, Case

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "support.md"
HEADINGS = {
    "Settings of LoraConfig": "Settings of `LoraConfig`",
    "init_lora_weights": "Initializations: `init_lora_weights`",
}

HEAD = """# What is supported

<!-- `make support-table` writes this page from support_cases.py; tests/factors/test_support.py tries every cell. -->

The tests try each layer, setting and way of training below in each mode and with `LoRAProCallback`:

- **works**: the first step equals that of a dense float64 formula, the next steps lower the loss, and PEFT loads the \
saved adapter with the same output. AdamW trains the other parameters of the setting.
- **refused**: an exception before the first step names the layer or setting and the remedy.
"""

# The methods of other libraries that are wrapped or overridden: library, owner, name and what LoRA-Pro adds.
REPLACED = (
    ("deepspeed", "ZeRO optimizer", "step", "copies the raw gradients before ZeRO frees or scales them"),
    ("deepspeed", "DeepSpeedEngine", "save_checkpoint", "writes the moments before `latest` is updated"),
    ("deepspeed", "DeepSpeedEngine", "load_checkpoint", "checks the moments first and loads them last"),
    ("transformers", "Trainer", "_save", "writes settings and card, and checks the saved adapter"),
    ("transformers", "Trainer", "_save_checkpoint", "writes the manifest when all files are complete"),
    ("transformers", "Trainer", "_save_rng_state", "waits for the files of all ranks"),
    ("transformers", "Trainer", "_save_optimizer_and_scheduler", "collects the state that ranks share"),
    ("transformers", "Trainer", "_load_optimizer_and_scheduler", "loads no state of other ranks"),
    ("transformers", "Trainer", "_load_from_checkpoint", "loads all adapters into their parameters"),
    ("transformers", "Trainer", "_load_best_model", "loads all adapters into their parameters"),
    ("transformers", "Trainer", "_maybe_log_save_evaluate", "checks skipped steps on all ranks"),
    ("transformers", "Trainer", "_push_from_checkpoint", "pushes settings, card and manifest"),
    ("transformers", "Trainer", "_finish_current_push", "reports pushes that failed in the background"),
)


def result(case: Case) -> str:
    """`works`, `refused`, or where each of them holds."""
    refused = [column for column in COLUMNS if column in case.refused]
    if len(refused) in (0, len(COLUMNS)):
        return "refused" if refused else "works"
    return f"works, refused with {', '.join(refused)}"


def remark(case: Case) -> str:
    parts = [f"AdamW trains {case.ordinary[0]}."] if case.ordinary else []
    return " ".join([*parts, *([case.note] if case.note else [])])


def listing(cases: list[Case]) -> list[str]:
    """The cases that simply work in one line, and a table of the others with their remarks."""
    plain = [case.name for case in cases if result(case) == "works" and not remark(case)]
    rows: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        if case.name not in plain:
            rows.setdefault((result(case), remark(case)), []).append(case.name)
    lines = [f"Works: {'; '.join(plain)}.", ""] if plain else []
    if rows:
        lines += ["| | | |", "|---|---|---|"]
    return lines + [f"| {'; '.join(names)} | {found} | {said} |" for (found, said), names in rows.items()]


def pins(path: Path) -> dict[str, str]:
    lines = (line.partition("#")[0].partition(";")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def versions() -> list[str]:
    oldest, pinned, newest = (
        pins(ROOT / "requirements" / name) for name in ("oldest.txt", "constraints.txt", "newest.txt")
    )
    columns = ("`make test-oldest`", "`make test`", "`make test-newest`")
    rows = [f"| {name} | {oldest[name]} | {pinned[name]} | {newest[name]} |" for name in oldest]
    return [
        "The tests pass with each of these sets of versions on the CPU. `make test-newest` installs the newest "
        "versions that pyproject.toml allows; the table shows those of the last run.",
        "",
        f"| | {' | '.join(columns)} |",
        "|---|---|---|---|",
        *rows,
    ]


def replaced() -> list[str]:
    """The methods of other libraries that are wrapped or overridden."""
    owners: dict[str, list[str]] = {}
    for _, owner, name, _ in REPLACED:
        owners.setdefault(owner, []).append(f"`{name}`")
    releases = " and ".join(dict.fromkeys(tested(library) for library, *_ in REPLACED))
    return [
        "LoRA-Pro wraps or overrides these methods, which their libraries do not document as an extension point. A "
        f"release without one of them is refused by name. Tested releases: {releases}. "
        "[The list](../tests/helpers/support_table.py) says what each of them adds.",
        "",
        *(f"- `{owner}`: {', '.join(names)}" for owner, names in owners.items()),
    ]


def page() -> str:
    parts = [HEAD]
    for group, cases in GROUPS.items():
        parts += [f"## {HEADINGS.get(group, group)}", "", *listing(cases), ""]
    parts += ["## Versions", "", *versions(), ""]
    parts += ["## Replaced methods of other libraries", "", *replaced(), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PATH.write_text(page(), encoding="utf-8")
    print(f"wrote {PATH.relative_to(ROOT)}")
