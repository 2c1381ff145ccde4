"""`lorapro plot`: what is drawn and printed of a file of measurements."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from lorapro_hf.commands.plot import add_plot
from lorapro_hf.diagnostics.plot import plot_gap
from lorapro_hf.diagnostics.records import FILE, LayerGap, append
from lorapro_hf.diagnostics.runs import read_run, read_runs, short_names
from lorapro_hf.options import UsageError


def gap(layer: str, **figures: Any) -> LayerGap:
    values = {"grad_norm": 1.0, "residual": 1e-6, "lora_gap": 0.99, "lora_scaled_gap": 0.9, "lora_cosine": 0.3}
    values |= {"lora_pro_gap": 0.5, "lora_pro_cosine": 0.8, **figures}
    return LayerGap(layer, "default", **values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    names = [f"base_model.model.layers.{i}.{kind}_proj" for i in (0, 2, 10) for kind in "qv"]
    for step in (1, 3):
        gaps = [gap(name, lora_pro_gap=0.1 * i + 0.01 * step, step_error=1e-6) for i, name in enumerate(names)]
        append(folder / FILE, step, "AdamW", gaps)
    append(folder / FILE, 5, "AdamW", [gap(names[0])])
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that would have been saved."""
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    return figures


def written(folder: Path, steps: dict[int, list[LayerGap]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for step, gaps in steps.items():
        append(folder / FILE, step, "AdamW", gaps)
    return folder


def plot(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_plot(parser)
    arguments = parser.parse_args(words)
    return arguments.run(arguments)


def test_run_is_read(folder: Path):
    run = read_run(folder)
    table = run.by_layer("lora_pro_gap")
    assert list(table.columns) == [1, 3, 5]
    assert short_names(list(table.index)) == ["0.q_proj", "0.v_proj", "2.q_proj", "2.v_proj", "10.q_proj", "10.v_proj"]
    assert run.quartiles("lora_pro_gap").loc[3].to_dict() == pytest.approx({"q1": 0.155, "median": 0.28, "q3": 0.405})
    assert list(run.quartiles("step_error").index) == [1, 3]
    assert read_run(folder / FILE).table.equals(run.table)


def test_picture_and_json(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert plot(str(folder), "--json") == 0
    (summary,) = json.loads(capsys.readouterr().out)
    assert summary["run"] == "mine" and summary["optimizer"] == "AdamW"
    assert summary["figures"]["lora_scaled_gap"] == {
        "steps": [1, 3, 5],
        "q1": [0.9] * 3,
        "median": [0.9] * 3,
        "q3": [0.9] * 3,
    }
    assert summary["figures"]["step_length"]["steps"] == []
    assert imread(folder / "lora_pro_gap.png").std() > 0.1


@pytest.mark.slow
def test_several_runs_side_by_side(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, two = tmp_path / "one.png", tmp_path / "deeper" / "two.png"
    assert plot(str(folder), "--output", str(one)) == 0
    assert plot(str(folder), str(folder), "--output", str(two)) == 0
    assert capsys.readouterr().out.splitlines() == [f"Picture: {one}", f"Picture: {two}"]
    assert imread(two).shape[1] > 1.5 * imread(one).shape[1]


def test_heat_map_holds_the_figures(folder: Path, tmp_path: Path, drawn: list[Any]):
    plot_gap(tmp_path / "any.png", [read_run(folder)])
    maps = [axes.images[0] for axes in drawn[0].axes if axes.images]
    table = maps[1].get_array()
    assert table.shape == (6, 3)
    assert table[1, 0] == pytest.approx(0.11) and table[5, 1] == pytest.approx(0.53)
    assert table.mask[1:, 2].all() and not table.mask[0, 2]  # not measured: no color
    assert maps[0].get_clim() == maps[1].get_clim()


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (None, [], "has no lora_pro_gap.jsonl. Train with --lora_pro_log_gap"),
        ("", [], "holds no measurement yet"),
        ('{"step": 1}\nnonsense\n', [], "holds no measurement yet"),
        ("", ["--output", "gap.pdf"], "holds no measurement yet"),
        ('{"step": 1, "layer": "old", "lora_gap": 1.0}\n', [], "has measurements without 'optimizer'"),
        ('{"step": 1, "layer": "a", "optimizer": "b", "adapter": "c"}\n', [], "holds nothing that can be drawn"),
    ],
)
def test_refuses(tmp_path: Path, content: str | None, words: list[str], message: str):
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(UsageError, match=message):
        plot(str(tmp_path), *words)


def test_refuses_a_missing_folder():
    with pytest.raises(UsageError, match="there is no folder nowhere; name the output_dir of a training"):
        plot("nowhere")


def test_refuses_other_formats(folder: Path):
    with pytest.raises(UsageError, match=r"the picture is a PNG"):
        plot(str(folder), "--output", "gap.pdf")


def test_draws_what_is_there_of_a_file_without_some_figure(folder: Path, drawn: list[Any]):
    records = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    for record in records:
        del record["lora_scaled_gap"]
    (folder / FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    assert plot(str(folder)) == 0


def test_layers_that_take_turns_make_no_saw(tmp_path: Path):
    """Each step has the median over all layers' latest values, once there are some of each."""
    turns = [[gap("a", lora_pro_gap=0.2)], [gap("b", lora_pro_gap=0.6)]]
    run = read_run(written(tmp_path, {step: turns[step % 2] for step in range(6)}))
    assert run.quartiles("lora_pro_gap")["median"].to_dict() == dict.fromkeys(range(1, 6), pytest.approx(0.4))


def test_panels_share_steps_and_those_with_figures_share_limits(tmp_path: Path, drawn: list[Any]):
    one = written(tmp_path / "one", {step: [gap("a", step_error=0.02)] for step in (1, 101)})
    two = written(tmp_path / "two", {step: [gap("a")] for step in (1, 11)})
    assert plot(str(one), str(two), "--output", str(tmp_path / "any.png")) == 0
    errors = drawn[0].axes[2:4]
    assert [text.get_text() for text in errors[1].texts] == ["has no meaning with this optimizer"]
    assert errors[0].get_ylim()[0] > 1e-3 and errors[0].get_ylim()[1] < 1
    assert len({axes.get_xlim() for axes in drawn[0].axes[:4]}) == 1
    assert drawn[0].legends and not any(axes.get_legend() for axes in drawn[0].axes)


def test_errors_that_are_roundings_are_left_out(tmp_path: Path, drawn: list[Any]):
    written(tmp_path, {step: [gap("a", step_error=error)] for step, error in ((1, 0.0), (2, 0.02), (3, 0.01))})
    plot_gap(tmp_path / "any.png", [read_run(tmp_path)])
    (line,) = drawn[0].axes[1].lines
    assert list(line.get_xdata()) == [2, 3]


def test_ticks_of_a_single_step_are_whole(tmp_path: Path, drawn: list[Any]):
    plot_gap(tmp_path / "any.png", [read_run(written(tmp_path, {7: [gap("a", step_error=0.1)]}))])
    for axes in drawn[0].axes[:2]:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [7]


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    folders = [written(tmp_path / name / "out", {1: [gap("a")]}) for name in ("first", "second")]
    assert [run.name for run in read_runs(folders)] == ["first/out", "second/out"]


def test_a_checkpoint_leads_to_its_training(folder: Path):
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir()
    with pytest.raises(UsageError, match=f"Did you mean its parent, {folder}"):
        plot(str(checkpoint))
