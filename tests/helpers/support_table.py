"""Writes docs/support.md from the cases that the tests run: `make support-table`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorapro_hf.utils.private_names import REPLACED, tested
from support_cases import GROUPS, OTHER_FIELDS
from support_rows import COLUMNS, Case

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "support.md"
HEADINGS = {
    "Settings of LoraConfig": "Settings of `LoraConfig`",
    "init_lora_weights": "Initializations: `init_lora_weights`",
}

HEAD = """# What is supported

<!-- `make support-table` writes this page from support_cases.py; tests/factors/test_support.py tries every cell. -->

A row is a kind of layer, a setting of the adapter or a way of training; a column is a mode of LoRA-Pro, or \
`LoRAProCallback` in front of another optimizer. Each cell has a test:

- **works**: the first step is that of a dense float64 formula, the following ones lower the loss, and the saved \
adapter gives the same output when PEFT loads it.
- **works + AdamW**: the same, and what else the setting trains gets plain AdamW (with the callback, the step of your \
optimizer).
- **refused**: an exception before the first step names the layer or setting and what to do.

Several processes (DDP, FSDP2, DeepSpeed) are in [distributed.md](distributed.md), dtypes in \
[precision.md](precision.md).
"""


def cell(case: Case, column: str) -> str:
    if column in case.refused:
        return "refused"
    return "works + AdamW" if case.ordinary else "works"


def remark(case: Case) -> str:
    parts = [f"AdamW trains {case.ordinary[0]}."] if case.ordinary else []
    return " ".join([*parts, *([case.note] if case.note else [])])


def table(cases: list[Case]) -> list[str]:
    """A table whose cells point to the remarks below it."""
    remarks = list(dict.fromkeys(filter(None, map(remark, cases))))
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for case in cases:
        mark = f" <sup>{remarks.index(remark(case)) + 1}</sup>" if remark(case) else ""
        marked = [cell(case, column) for column in COLUMNS]
        lines.append(f"| {case.name}{mark} | {' | '.join(marked)} |")
    return [*lines, "", *(f"{number}. {text}" for number, text in enumerate(remarks, 1))]


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
        "The test suite passes with each of these sets of versions, on the CPU. What `make test-newest` installs is up "
        "to the day: the newest that the ranges of pyproject.toml allow, here as they were tried last.",
        "",
        f"| | {' | '.join(columns)} |",
        "|---|---|---|---|",
        *rows,
    ]


def replaced() -> list[str]:
    """The methods of other libraries that are wrapped or overridden."""
    rows = [f"| `{m.name}` of `{m.owner}` | {m.reason} | {tested(m.package)} |" for m in REPLACED]
    return [
        "LoRA-Pro wraps or overrides these methods, which their libraries do not document as a place to do so. A "
        "release without one of them is refused with an error that names it.",
        "",
        "| method | what LoRA-Pro adds | tested with |",
        "|---|---|---|",
        *rows,
    ]


def page() -> str:
    parts = [HEAD]
    for group, cases in GROUPS.items():
        parts += [f"## {HEADINGS.get(group, group)}", "", *table(cases), ""]
    parts += ["## Fields of `LoraConfig` without a row", ""]
    parts += [f"- `{name}` {reason}." for name, reason in OTHER_FIELDS.items()]
    parts += ["", "## Versions", "", *versions(), ""]
    parts += ["## Replaced methods of other libraries", "", *replaced(), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PATH.write_text(page(), encoding="utf-8")
    print(f"wrote {PATH.relative_to(ROOT)}")
