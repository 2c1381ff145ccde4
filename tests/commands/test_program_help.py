"""Every program of the repository answers `--help`, and a word it does not know, and does nothing else."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorapro_hf.commands.common import optimizers
from lorapro_hf.commands.compare import methods

ROOT = Path(__file__).parents[2]
PATTERNS = ("scripts/*.py", "benchmarks/*.py", "docs/pictures/*.py", "tests/helpers/*_table*.py")
PROGRAMS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in PATTERNS
    for path in ROOT.glob(pattern)
    if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")
)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(optimizers, "BUILDERS", optimizers.BUILDERS)
    monkeypatch.setattr(methods, "METHODS", methods.METHODS)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("--no_such_option", 2)])
def test_a_program_says_how_it_is_called_and_writes_nothing(
    program: str, word: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if program.startswith("scripts/run_"):
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, word])
    monkeypatch.syspath_prepend(str((ROOT / program).parent))
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: pytest.fail(f"{program} {word} writes a file"))
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert caught.value.code == code
    assert not list(tmp_path.iterdir())


def test_the_programs_are_found() -> None:
    assert {"scripts/make_smoke_inputs.py", "docs/pictures/gradient_gap.py", "tests/helpers/support_table.py"} <= set(
        PROGRAMS
    )
