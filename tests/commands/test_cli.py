"""The command line as a whole: help, exit codes, errors and JSON are the same for all commands, and documented."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from docs_pages import DOCS, ROOT, loaded
from lorapro_hf import __version__, cli
from lorapro_hf.options import UsageError
from lorapro_hf.utils import extras
from lorapro_hf.utils.extras import install_command

COMMANDS = {
    "aggregate",
    "chat",
    "init",
    "plot",
    "demo",
    "train",
    "evaluate",
    "inspect",
    "merge",
    "ranks",
    "compare",
    "bench",
}
PARSER = cli.build_parser()
option_tables = loaded(DOCS / "option_tables.py")
PAGE = DOCS / "command_line.md"
SUBPARSERS = option_tables.subparsers(PARSER)
ALL_COMMANDS = option_tables.all_commands()


def exit_code(*words: str) -> int:
    """What the command ends with, whether argparse stops it or not."""
    try:
        return cli.main(words)
    except SystemExit as stop:
        return int(stop.code or 0)


# Help


def test_commands():
    assert set(SUBPARSERS) == COMMANDS


@pytest.mark.parametrize("command", ["", *sorted(COMMANDS)])
def test_help_is_worth_reading(command: str, capsys: pytest.CaptureFixture[str]):
    assert exit_code(*command.split(), "--help") == 0
    text = capsys.readouterr().out
    parser = SUBPARSERS.get(command, PARSER)
    assert parser.description is not None and len(parser.description) > 80
    assert f"  lorapro {command}" in text
    assert "(default: None)" not in text and "(default: False)" not in text and "==SUPPRESS==" not in text
    if command != "train":  # its code is that of the script
        assert "exit codes:" in text


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_examples_of_the_help_are_valid(command: str):
    lines = re.findall(r"^  lorapro (.*?)(?:\s+#.*)?$", SUBPARSERS[command].epilog or "", re.MULTILINE)
    assert lines
    for line in lines:
        if line != "train run_sft.py --help":
            arguments = PARSER.parse_args(line.split())
            assert arguments.command == command and callable(arguments.run)


@pytest.mark.parametrize("name", sorted(ALL_COMMANDS))
def test_every_option_says_what_it_does(name: str):
    for action in ALL_COMMANDS[name]._actions:
        assert action.help, f"{name}: {action.dest}"
        assert action.help == argparse.SUPPRESS or not action.help.endswith("."), f"{name}: {action.dest}"


def test_version(capsys: pytest.CaptureFixture[str]):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"lorapro_hf {__version__}\n"


def test_the_package_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "lorapro_hf.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"lorapro_hf {__version__}\n"


def test_help_needs_no_library():
    heavy = ["torch", "transformers", "peft", "rich", "matplotlib", "datasets"]
    code = (
        f"import sys, lorapro_hf.cli as c; c.build_parser(); print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("compare", "--list"), 0, "smoke.yaml "),
        (("compare", "smok"), 2, "did you mean smoke.yaml"),
        (("compare", "nosuch"), 2, "see lorapro compare --list"),
        (("compare", "configs/compare/smokes.yaml"), 2, "did you mean smoke.yaml"),
        (("compare", "qqqqqq"), 2, "see lorapro compare --list"),
    ],
)
def test_a_name_is_looked_up_before_torch_is_imported(words: tuple[str, ...], code: int, said: str, tmp_path: Path):
    program = f"import sys, lorapro_hf.cli as c; code = c.main({words!r}); print(code, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True, cwd=tmp_path
    )
    assert said in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{code} False"


@pytest.mark.parametrize("name", ["smoke", "smoke.yaml", "configs/compare/smoke.yaml"])
def test_a_comparison_is_found_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lorapro_hf.commands.compare import command

    class Found(Exception): ...

    def read(path: Path, *_: Any) -> None:
        raise Found(path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lorapro_hf.commands.compare.settings.read_settings", read)
    with pytest.raises(Found) as found:
        cli.main(["compare", name])
    assert found.value.args == (command.folder_of("configs") / "compare" / "smoke.yaml",)
    Path("mine.txt").touch()
    with pytest.raises(Found, match=r"mine\.txt"):  # what lies there wins, whatever its name
        cli.main(["compare", "mine.txt"])


# Exit codes and errors


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("chess",),
        ("demo", "--steps", "0"),
        ("evaluate",),
        ("inspect",),
        ("inspect", "x", "--ranks", "-1"),
        ("--no",),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    assert exit_code(*words) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.match(r"lorapro( \w+)?: error: ", printed.err.splitlines()[-1])


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    parser = argparse.ArgumentParser(prog="lorapro")
    parser.set_defaults(run=run, command="demo", way_on="Do it again.")
    monkeypatch.setattr(cli, "build_parser", lambda: parser)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("no such model.\nName another one."), 2, "lorapro demo: error: no such model. Name another one.\n"),
        (
            OSError(28, "No space left on device", "a.json"),
            1,
            "lorapro demo: error: [Errno 28] No space left on device: 'a.json'\n",
        ),
        (RuntimeError("PytorchStreamWriter failed: x"), 1, "lorapro demo: error: PytorchStreamWriter failed: x\n"),
        (extras.MissingExtraError("no trl."), 2, "lorapro demo: error: no trl.\n"),
        (KeyboardInterrupt(), 130, "\nStopped by Ctrl-C. Do it again.\n"),
    ],
    ids=["usage", "disk", "disk, torch", "package", "Ctrl-C"],
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
):
    raising(monkeypatch, error)
    assert cli.main([]) == code
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == said


def test_ctrl_c_is_said_by_one_of_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    raising(monkeypatch, KeyboardInterrupt())
    monkeypatch.setenv("RANK", "1")
    assert cli.main([]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["demo", "compare"])
def test_long_commands_say_how_to_go_on(command: str):
    assert "same command again" in PARSER.parse_args([command]).way_on


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    raising(monkeypatch, AssertionError("never"))
    with pytest.raises(AssertionError, match="never"):
        cli.main([])


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_a_folder_that_cannot_be_written(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    assert exit_code(command, "--output_dir", str(tmp_path / "file" / "out")) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"lorapro {command}: error: Cannot write to --output_dir") and printed.count("\n") == 1


@pytest.mark.parametrize("command", ["demo", "bench", "compare"])
def test_a_missing_package_names_the_extra(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert exit_code(command) == 2
    assert re.search(
        r"needs rich and (matplotlib|psutil).*pip install -e '.*\[(demo|bench)\]'", capsys.readouterr().err
    )


def test_the_command_that_installs_an_extra_is_for_this_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    clone = ROOT
    monkeypatch.chdir(tmp_path)
    assert install_command("demo") == f"pip install -e '{clone}[demo]'"
    monkeypatch.chdir(clone)
    assert install_command("demo") == "pip install -e '.[demo]'"


@pytest.mark.parametrize(
    ("noted", "origin"),
    [
        (None, ""),
        ({"url": "file:///a/lorapro_hf.whl", "archive_info": {}}, " @ file:///a/lorapro_hf.whl"),
        (
            {"url": "https://a.org/b.git", "vcs_info": {"vcs": "git", "commit_id": "1f", "requested_revision": "v1"}},
            " @ git+https://a.org/b.git@v1",
        ),
        (
            {"url": "https://a.org/b.git", "vcs_info": {"vcs": "git", "commit_id": "1f"}},
            " @ git+https://a.org/b.git",
        ),
    ],
    ids=["index", "wheel", "tag", "branch"],
)
def test_an_installed_package_gets_its_extra_from_where_it_came(
    noted: dict[str, Any] | None, origin: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    folder = tmp_path / "lorapro_hf-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: lorapro_hf\nVersion: 0.1.0\n")
    if noted is not None:
        (folder / "direct_url.json").write_text(json.dumps(noted))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(extras, "_CLONE", tmp_path / "site-packages")
    assert install_command("demo") == f"pip install 'lorapro_hf[demo]{origin}'"


def test_no_message_has_an_install_command_of_its_own():
    package = Path(extras.__file__)
    sources = {path: path.read_text(encoding="utf-8") for path in package.parent.rglob("*.py") if path != package}
    assert [path for path, text in sources.items() if re.search(r"[Ii]nstall.{0,4}lorapro_hf\[", text)] == []


def test_a_reader_that_has_seen_enough():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "lorapro_hf.cli", "train", "--list"],
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=300,
        check=False,
    )
    os.close(write)
    assert done.returncode == 1 and done.stderr == b""


# The page


def test_the_page_has_every_command_with_its_options():
    text = PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^## lorapro (\w+)$", text, re.MULTILINE)
    marked = re.findall(r"^<!-- options of lorapro (\w+) -->$", text, re.MULTILINE)
    assert headings == marked and set(headings) == COMMANDS
    built = option_tables.on_page_markdown(text)
    assert "<!-- options of" not in built
    assert "| `--ranks N` | 1 | processes that would share the pairs out |" in built
    assert "| `MODEL` |  | folder, or name on the Hub" in built


# JSON


def test_json_of_a_bench_is_all_of_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from lorapro_hf.commands.bench import run

    monkeypatch.setattr(run, "measure_all", lambda bench, progress: None)
    assert exit_code("bench", "--json", "--output_dir", str(tmp_path)) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "results.json").read_text())
    assert "Total time" in printed.err
