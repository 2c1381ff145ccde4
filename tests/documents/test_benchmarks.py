"""The script behind the tables of docs/factored.md, run for a few steps."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "second_moments.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("second_moments", SCRIPT)
    module = sys.modules["second_moments"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["second_moments"]


def rows(text, head):
    """The cells of the table whose first line starts with `head`, by the name of the row."""
    lines = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return {name: cells for name, *cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


@pytest.mark.slow
def test_quick_run_gives_both_tables(script, tmp_path, capsys):
    output = tmp_path / "tables.md"
    script.main(["--quick", "--output", str(output)])
    text = output.read_text(encoding="utf-8")
    assert capsys.readouterr().out == text and f"torch {torch.__version__}" in text

    estimates = rows(text, "| estimate of V")
    assert len(estimates) == 8
    cosines = [float(cell.split(" / ")[0].strip("*")) for cell in estimates["**row and column means, rank one**"]]
    assert len(cosines) == 4 and all(0 < cosine < 1 for cosine in cosines)
    for one, other in itertools.combinations(estimates.values(), 2):
        assert one != other

    losses = rows(text, "| | full fine-tuning")
    assert list(losses) == ["regression", "network", "regression, 4 tokens", "network, 4 tokens"]
    assert all(0 < float(loss) < 10 for row in losses.values() for loss in row)
    assert all(len(set(row)) == 5 for row in losses.values())  # four modes and full fine-tuning, all apart


def test_quick_run_writes_nothing_of_its_own(script, capsys, monkeypatch):
    monkeypatch.setattr(script, "report", lambda size: f"{size.seeds}\n")
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: pytest.fail("a file was written"))
    script.main(["--quick"])
    assert capsys.readouterr().out == "(0,)\n"


def test_weights_are_exact_where_all_entries_are_alike(script):
    V = torch.full((5, 7), 0.25, dtype=torch.float64)
    for weight in script.WEIGHTS.values():
        torch.testing.assert_close(weight(V), torch.full_like(V, 2.0), rtol=1e-5, atol=0)


def test_best_rank_three_is_exact_on_a_product(script):
    generator = torch.Generator().manual_seed(0)
    row, column = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.5 for size in (5, 7))
    V = torch.outer(row, column)
    torch.testing.assert_close(script.best_rank_three(V), V.rsqrt(), rtol=1e-5, atol=0)
