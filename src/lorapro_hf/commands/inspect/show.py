"""How does a report look as text?"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lorapro_hf.checkpoints.adapters import PREFIX
from lorapro_hf.checkpoints.manifest import MANIFEST
from lorapro_hf.checkpoints.resume import newest_complete
from lorapro_hf.commands.inspect.report import Checkpoint, PairGroup, Report
from lorapro_hf.hub.describe import layer_kind
from lorapro_hf.optim.memory import readable_bytes

_LISTED = 4  # names of refused layers, if there are more


class Section(NamedTuple):
    """A table with a title and lines of text below. Columns whose name ends in `>` are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str] = ()


def show(report: Report, every_pair: bool = False) -> None:
    """Print a report; with `every_pair` it names each pair instead of grouping them by shape."""
    print("\n\n".join(map(plain, sections(report, every_pair))))


def sections(report: Report, every_pair: bool = False) -> list[Section]:
    """The tables of a report."""
    found = [_overview(report)]
    if report.checkpoint is not None:
        found.append(_checkpoint(report.checkpoint))
    if report.checkpoints:
        found.append(_checkpoints(report.checkpoints))
    if report.adapters:
        found.append(_adapters(report))
    if report.pairs:
        found.append(_pairs(report, every_pair))
    if report.ordinary:
        rows = [(each.name, f"{each.tensors}", f"{each.parameters:,}") for each in report.ordinary]
        found.append(Section("Other trained parameters, by plain AdamW", ("parameters", "tensors>", "elements>"), rows))
    if report.unsupported:
        found.append(_unsupported(report))
    if report.costs:
        found.append(_costs(report))
    return found


def plain(section: Section) -> str:
    """A section as text, its columns aligned."""
    names = [name.removesuffix(">") for name in section.columns]
    widths = [max(len(row[place]) for row in (names, *section.rows)) for place in range(len(names))]
    text = [section.title]
    for row in (names, *section.rows) if any(names) else section.rows:
        cells = (
            cell.rjust(width) if name.endswith(">") else cell.ljust(width)
            for cell, width, name in zip(row, widths, section.columns, strict=True)
        )
        text.append("  " + "  ".join(cells).rstrip())
    for line in section.lines:
        text += textwrap.wrap(line, 110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(text)


def _overview(report: Report) -> Section:
    rows = []
    if (base := report.base) is not None:
        weights = "" if base.bytes is None else f", {readable_bytes(base.bytes)}"
        rows.append(("base model", ", ".join(filter(None, (base.model_class, base.name)))))
        rows.append(("parameters", f"{base.parameters:,} in {base.dtype}{weights}"))
        if base.quantization is not None:
            rows.append(("quantized", base.quantization))
    if report.pairs:
        of_pairs = f"{report.pair_parameters:,} in {report.pair_count} pairs of factors"
        rows.append(("trained", f"{of_pairs}, {report.ordinary_parameters:,} other"))
    if report.settings is not None:
        said = ", ".join(f"{name}={value}" for name, value in report.settings.items() if value is not None)
        rows.append(("trained with", said))
    verdict = "yes" if report.is_trainable else "no, see below"
    if report.pairs and not report.unsupported and report.checkpoint is not None and report.checkpoint.usable_weights:
        verdict = "only its weights, for a new training"
    rows.append(("ready for LoRA-Pro", verdict))
    return Section(report.source, ("", ""), rows, report.notes)


def _checkpoint(found: Checkpoint) -> Section:
    complete = "complete" if found.has_manifest else f"complete, as far as can be told without {MANIFEST}"
    rows = [("files", found.flaw or complete)]
    if found.step is not None:
        rows.append(("step", _step(found) + ("" if found.epoch is None else f", epoch {found.epoch:g}")))
    if found.processes is not None:
        rows.append(("written by", f"{found.processes} process{'' if found.processes == 1 else 'es'}"))
    rows.append(("optimizer state", _state(found)))
    return Section(f"Checkpoint {found.folder}", ("", ""), rows)


def _checkpoints(found: Sequence[Checkpoint]) -> Section:
    """The checkpoints of an output folder, and the one that resuming takes."""
    rows = [(Path(each.folder).name, _step(each), _state(each), each.flaw or "complete") for each in found]
    line = f"resume_from_checkpoint=True {_taken({Path(each.folder): each.flaw for each in found})}."
    return Section("Checkpoints in it", ("name", "step>", "optimizer state", "files"), rows, [line])


def _taken(flaws: dict[Path, str | None]) -> str:
    """What `resume_from_checkpoint=True` does with checkpoints of these flaws, the newest first."""
    newest = next(iter(flaws))
    try:
        whole, _ = newest_complete(newest.parent, list(flaws), flaws.__getitem__)
    except ValueError:
        return "is refused, since none of them is complete: start again"
    if whole is None:
        return "starts the training anew, since no save was finished"
    if whole == newest:
        return f"goes on from {whole.name}, the newest"
    return f"passes over {newest.name} and goes on from {whole.name}, the newest complete one"


def _step(found: Checkpoint) -> str:
    if found.step is None:
        return "–"
    return f"{found.step} of {found.max_steps}" if found.max_steps else f"{found.step}"


def _state(found: Checkpoint) -> str:
    if not found.settings:
        starts_anew = found.optimizer == "none" and found.flaw is None
        return "none: moments and schedule start anew" if starts_anew else found.optimizer
    settings = found.settings
    parts = [found.optimizer]
    if "mode" in settings:
        parts.append(f"mode {settings['mode']}")
        parts += ["moments in bfloat16"] if settings["moments_dtype"] == "bfloat16" else []
        parts += ["master factors"] if settings["master_factors"] else []
    return ", ".join([*parts, f"{found.stepped_tensors} tensors", f"learning rate {settings['learning_rate']:.3g}"])


def _adapters(report: Report) -> Section:
    rows = []
    for each in report.adapters:
        state = [word for word, holds in (("active", each.active), ("merged", each.merged)) if holds]
        state.append("trainable" if each.trainable else "frozen")
        rank = "–" if each.rank is None else f"{each.rank}"
        alpha = "–" if each.alpha is None else f"{each.alpha:g}"
        kind = ", ".join([each.kind, *(option for option in each.options if "=" not in option)])
        targets = each.targets[0] if len(each.targets) == 1 else _layers(each.targets)  # one name may be a pattern
        rows.append((each.name, kind, f"{each.layers}", rank, alpha, ", ".join(state), targets))
    lines = [
        f"{each.name}: {', '.join(rest)}"
        for each in report.adapters
        if (rest := [option for option in each.options if "=" in option])
    ]
    columns = ("name", "kind", "layers>", "r>", "alpha>", "state", "targets")
    return Section("Adapters", columns, rows, lines)


def _pairs(report: Report, every_pair: bool) -> Section:
    if every_pair:
        rows = [(name.removeprefix(PREFIX), *_sizes(group)) for group in report.pairs for name in group.pairs]
        return Section("Pairs of factors", ("layer", *_SIZES), rows)
    rows = [(f"{group.count}", *_sizes(group), _layers(group.pairs)) for group in report.pairs]
    return Section("Pairs of factors, by shape", ("pairs>", *_SIZES, "layers"), rows)


_SIZES = ("weight (m × n)>", "r>", "scaling>", "kind of layer", "factors")


def _sizes(group: PairGroup) -> tuple[str, ...]:
    many = f"{group.batch} × " if group.batch > 1 else ""
    return (f"{many}{group.m} × {group.n}", f"{group.r}", f"{group.scaling:g}", group.kind, group.dtype)


def _layers(names: Sequence[str]) -> str:
    """`q_proj, o_proj` for the names of their layers."""
    kinds, most = list(dict.fromkeys(layer_kind(name.split(" ")[0]) for name in names)), 2 * _LISTED
    return ", ".join(kinds[:most]) + (f" and {len(kinds) - most} more" if len(kinds) > most else "")


def _unsupported(report: Report) -> Section:
    lines = []
    for each in report.unsupported:
        count = len(each.layers)
        if count:
            some = ", ".join(each.layers[:_LISTED]) + (f" and {count - _LISTED} more" if count > _LISTED else "")
            lines.append(f"{count} × {each.kind}: {some}")
        lines.append(each.reason)
    return Section("What LoRA-Pro refuses", ("", ""), (), lines)


def _costs(report: Report) -> Section:
    rows = []
    for cost in report.costs:
        name = cost.mode + (", bf16 moments" if cost.moments_dtype != "float32" else "")
        total = "not known" if cost.total_bytes is None else readable_bytes(cost.total_bytes)
        fits = {True: "yes", False: "no", None: "not known"}[cost.fits]
        low, high = cost.learning_rates
        rates = f"{low:.0e} to {high:.0e}".replace("e-0", "e-")
        rows.append((name, readable_bytes(cost.state_bytes), readable_bytes(cost.scratch_bytes), total, fits, rates))
    each = f", on the busiest of {report.ranks} ranks" if report.ranks > 1 else ""
    free = ", ".join(
        f"{device}: {'not known' if room is None else readable_bytes(room)}" for device, room in report.memory.items()
    )
    counted = "gradients" if report.loaded else "weights, gradients"
    columns = ("mode", "state>", "step scratch>", "in all>", "fits here", "learning rate")
    lines = (
        f"In all: {counted}, state and scratch, without activations. Free memory here: {free}.",
        "Learning rates are a start: efficient takes those of plain LoRA, the others those of full fine-tuning, or "
        "higher ones with a trust region.",
    )
    return Section(f"Memory and learning rate by mode{each}", columns, rows, lines)
