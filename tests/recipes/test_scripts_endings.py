"""What a script says when a training begins, ends or cannot go on: in one line, with the way on."""

from __future__ import annotations

import importlib
import logging
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

import lorapro_hf
from lorapro_hf import LoRAProTrainer
from lorapro_hf.checkpoints import manifest
from lorapro_hf.checkpoints.resume import checkpoints_in, find_flaw
from lorapro_hf.cli import build_parser
from lorapro_hf.hub import describe
from lorapro_hf.recipes.endings import one_line_errors, way_on
from lorapro_hf.recipes.parser import RecipeParser
from lorapro_hf.utils.extras import MissingExtraError
from script_helpers import CONFIGS, INPUTS, SCRIPTS, TINY, Lines, factors, script

SETTINGS = [
    *("--model_name_or_path", f"{INPUTS}/models/llama", "--train_file", f"{INPUTS}/data/text.txt"),
    *(*TINY, "--block_size", "16", "--do_train", "--lora_pro_mode", "full"),
    *("--max_steps", "3", "--save_strategy", "steps", "--save_steps", "1"),
]


@contextmanager
def logged() -> Iterator[list[str]]:
    package, handler = logging.getLogger("lorapro_hf"), Lines()
    package.addHandler(handler)
    yield handler.lines
    package.removeHandler(handler)


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with inputs and a training of three steps, each with a checkpoint; and what was said."""
    folder = tmp_path_factory.mktemp("endings")
    (folder / "build").symlink_to(inputs / "build")
    with pytest.MonkeyPatch.context() as patch, logged() as lines:
        patch.chdir(folder)
        script("run_clm.py").main([*SETTINGS, "--output_dir", "out"])
    return folder, lines


@pytest.fixture
def folder(finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with the same inputs and the training, which is the current one."""
    (tmp_path / "build").symlink_to(finished[0] / "build")
    shutil.copytree(finished[0] / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_clm.py"])
    return tmp_path


def ending(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[Any, str]:
    """Exit code and last line of a training that does not come to its end."""
    with pytest.raises(SystemExit) as end:
        script("run_clm.py").main([*SETTINGS, "--output_dir", "out", *options])
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return end.value.code, errors.splitlines()[-1]


# What is said of a training


def test_a_training_says_what_it_trains_how_and_where_the_adapter_lies(finished: tuple[Path, list[str]]) -> None:
    folder, lines = finished
    values = sum(factor.numel() for factor in factors(folder / "out").values())
    assert lines[0].startswith(f"{values:,} of ") and lines[0].endswith("%)")
    assert lines[1].startswith("LoRA-Pro: 14 pairs, mode=full")
    assert lines[-2] == "The adapter and its model card, README.md, lie in out"
    assert lines[-1].startswith("Next: ") and len(lines) == 4
    for command in lines[-1].removeprefix("Next: ").split(", or "):
        assert build_parser().parse_args(command.split()[1:]).command in ("chat", "evaluate", "merge")


@pytest.mark.parametrize(("level", "rank", "said"), [("warning", "0", 0), ("passive", "1", 0), ("passive", "0", 1)])
def test_a_level_that_is_asked_for_and_other_processes_keep_silent(
    level: str, rank: str, said: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lorapro_hf import LoRAProTrainingArguments
    from lorapro_hf.recipes.flow import start

    arguments = LoRAProTrainingArguments(str(tmp_path), do_train=True, log_level=level, report_to="none", use_cpu=True)
    monkeypatch.setattr(LoRAProTrainingArguments, "should_log", rank == "0")
    with logged() as lines:
        start(arguments, RecipeParser((), "run.py"))
        logging.getLogger("lorapro_hf.trainer.trainer").info("LoRA-Pro: 14 pairs")
    assert len(lines) == said


# Checkpoints that nobody can go on from


def test_an_unfinished_checkpoint_is_refused_before_anything_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "out" / "checkpoint-3" / "trainer_state.json").unlink()
    code, line = ending(capsys, "--resume_from_checkpoint", "out/checkpoint-3", "--model_name_or_path", "nowhere")
    assert code == 2
    assert line.startswith("run_clm.py: error: cannot resume from out/checkpoint-3: trainer_state.json is missing")
    assert "Set resume_from_checkpoint to out/checkpoint-2, the newest complete checkpoint" in line


def test_true_passes_over_an_unfinished_checkpoint(folder: Path) -> None:
    (folder / "out" / "checkpoint-3" / "trainer_state.json").unlink()
    before = factors(folder / "out")
    with logged() as lines:
        script("run_clm.py").main([*SETTINGS, "--output_dir", "out", "--resume_from_checkpoint", "true"])
    (said,) = (line for line in lines if "passed over" in line)
    assert said.startswith("out/checkpoint-3 is passed over: trainer_state.json is missing")
    assert said.endswith("The training goes on from out/checkpoint-2.")
    for name, values in before.items():
        assert values.equal(factors(folder / "out")[name]), name
    assert find_flaw(folder / "out" / "checkpoint-3") is None


def test_without_a_complete_checkpoint_it_is_said_before_anything_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in folder.glob("out/checkpoint-*/optimizer.pt"):
        file.unlink()
    code, line = ending(capsys, "--resume_from_checkpoint", "true", "--model_name_or_path", "nowhere")
    assert code == 2 and "cannot resume from out: none of its checkpoints is complete" in line


@pytest.mark.parametrize("options", [["--lora_r", "3"], ["--lora_pro_mode", "efficient"]], ids=" ".join)
def test_a_checkpoint_of_another_training_is_refused_in_one_line(
    options: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = ending(capsys, "--resume_from_checkpoint", "true", *options)
    assert code == 2 and line.startswith("run_clm.py: error: cannot resume from out/checkpoint-3/")


# Settings that a method refuses


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--flat_lora_sigma", "0.1", "--mgpo_rho", "0.1"], "the method 'flat_lora' cannot be combined with mgpo: "),
        (["--beamlora_every", "50"], "beamlora_every=50 leaves BeamLoRA no time to replace a slot in 3 st"),
        (["--booster_steps", "2", "--lora_r", "2"], "the rank of its adapter is 2, but that of a booster 1"),
    ],
)
def test_a_setting_that_a_method_refuses_is_one_line(
    options: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("out")
    code, line = ending(capsys, *options)
    assert code == 2 and line.startswith("run_clm.py: error: ") and said in line


def test_a_value_error_that_is_no_refusal_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="never"), one_line_errors():
        raise ValueError("never")
    with pytest.raises(ValueError, match="empty"), one_line_errors():
        describe._ranks([])  # min of nothing


# Ctrl-C


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LoRAProTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(LoRAProTrainer, "training_step", training_step)


def test_ctrl_c_says_how_to_go_on_and_so_it_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = folder / "whole"
    (folder / "out").rename(whole)
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        code, line = ending(capsys)
    said = "To go on from out/checkpoint-2, give the same command with --resume_from_checkpoint true."
    assert (code, line) == (130, f"run_clm.py: stopped by Ctrl-C. {said}")
    script("run_clm.py").main([*SETTINGS, "--output_dir", "out", "--resume_from_checkpoint", "true"])
    for name, values in factors(whole).items():
        assert values.equal(factors(folder / "out")[name]), name


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_saves_a_checkpoint_and_twice_stops_at_once(
    presses: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, step = folder / "whole", LoRAProTrainer.training_step
    (folder / "out").rename(whole)

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        for _ in range(presses if self.state.global_step == 1 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    command = "lorapro train mine.yaml --resume_from_checkpoint x"
    monkeypatch.setenv("LORAPRO_TRAIN_COMMAND", command)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(LoRAProTrainer, "training_step", training_step)
        code, line = ending(capsys, "--save_strategy", "no")
    assert code == 130
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    if presses == 2:
        assert "out has no complete checkpoint" in line
        return
    resume = "--resume_from_checkpoint true"
    said = f"To go on from out/checkpoint-2: lorapro train mine.yaml {resume}"
    assert line == f"run_clm.py: stopped by Ctrl-C. {said}"
    script("run_clm.py").main([*SETTINGS, "--output_dir", "out", *resume.split()])
    for name, values in factors(whole).items():
        assert values.equal(factors(folder / "out")[name]), name


def test_ctrl_c_before_the_first_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("out")
    interrupt_at(1, monkeypatch)
    code, line = ending(capsys)
    said = "out has no complete checkpoint: give the same command to start anew."
    assert (code, line) == (130, f"run_clm.py: stopped by Ctrl-C. {said}")


def test_the_way_on_reads_no_whole_files_and_names_the_option_to_leave_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said_of(output: Path, asked: str | None) -> str:
        return way_on(TrainingArguments(str(output), resume_from_checkpoint=asked, report_to="none", use_cpu=True))

    monkeypatch.setattr(manifest, "_as_saved", lambda file: pytest.fail(f"{file} is read"))
    assert said_of(folder / "out", None).endswith("--resume_from_checkpoint true.")
    said = "has no complete checkpoint: give the same command without --resume_from_checkpoint to start anew."
    assert said_of(tmp_path / "absent", "true").endswith(said)


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("1", 0)])
def test_ctrl_c_before_the_training_is_said_by_one_process(
    rank: str, said: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capsys.readouterr().err.count("Nothing has been trained yet") == said


@pytest.mark.parametrize(
    ("rank", "said"), [("0", "run.py: stopped by Ctrl-C. Nothing has been trained yet"), ("1", "")]
)
def test_ctrl_c_while_libraries_are_imported_is_one_line(rank: str, said: str, tmp_path: Path) -> None:
    library = "import os, signal\nsignal.signal(2, signal.default_int_handler)\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "library.py").write_text(library + "signal.pause()")
    (tmp_path / "run.py").write_text("import lorapro_hf.recipes.quiet\nimport library")
    environment = {**os.environ, "RANK": rank}
    command = [sys.executable, "run.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


# A full disk


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size")
@pytest.mark.parametrize("room", [100_000, pytest.param(4_000, marks=pytest.mark.slow)], ids=["optimizer", "adapter"])
def test_a_full_disk_leaves_no_checkpoint_that_looks_whole(
    room: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    before, whole = resource.getrlimit(resource.RLIMIT_FSIZE), LoRAProTrainer._save_checkpoint

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        whole(*args, **kwargs)

    monkeypatch.setattr(LoRAProTrainer, "_save_checkpoint", save_checkpoint)
    shutil.rmtree("out/checkpoint-3")
    try:
        code, line = ending(capsys, "--resume_from_checkpoint", "true")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1 and line.startswith("run_clm.py: error: the disk with out is full (")
    half, complete, *_ = checkpoints_in(folder / "out")
    assert (half.name, complete.name) == ("checkpoint-3", "checkpoint-2")
    assert find_flaw(half) is not None and find_flaw(complete) is None
    way = "To go on from out/checkpoint-2, give the same command with --resume_from_checkpoint true."
    assert line.endswith(way)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "data.arrow"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
    ids=lambda error: str(error)[:20],
)
def test_a_full_disk_is_one_line_wherever_it_happens(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert end.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="never"), one_line_errors():
        raise RuntimeError("never")


# A package that is not there


def test_scripts_without_trl_name_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "lorapro_hf.trainer.trl", raising=False)
    for name in lorapro_hf.__all__:
        if lorapro_hf._HOMES[name] == "trainer.trl":
            monkeypatch.delitem(vars(lorapro_hf), name, raising=False)
    with pytest.raises(MissingExtraError, match=r"need the package trl; install it with `pip install -e '.*\[trl\]'`"):
        importlib.import_module("lorapro_hf").LoRAProSFTTrainer  # noqa: B018
    for name in ("run_sft.py", "run_dpo.py"):
        monkeypatch.setattr(sys, "argv", [name])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        assert end.value.code == 2
        line = capsys.readouterr().err
        assert (
            line.startswith(f"{name}: error: LoRA-Pro's trainers for TRL need the package trl")
            and line.count("\n") == 1
        )


@pytest.mark.parametrize(("name", "package"), [("image_classification", "PIL"), ("speech_recognition", "soundfile")])
def test_scripts_without_a_reader_of_files_name_the_command_that_installs_it(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = f"run_{name}.py"
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / program), run_name="__main__")
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"{program}: error: {program} needs {package}") and line.count("\n") == 1
    assert re.search(r"`pip install -e '.*\[scripts\]'`", line)


# Other libraries


def test_lines_of_other_libraries_that_tell_nothing_are_dropped(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the module replaces
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        runpy.run_path(str(Path(lorapro_hf.__file__).parent / "recipes" / "quiet.py"))
        warnings.warn("Could not find a config file in x - will assume", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert [str(each.message) for each in told] == ["something else"]
    kernels, engine = logging.getLogger("bitsandbytes.backends.cpu.ops"), logging.getLogger("DeepSpeed")
    kernels.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no")
    kernels.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    assert not engine.filter(engine.makeRecord("DeepSpeed", 30, "f", 1, "Setting accelerator to CPU. If", (), None))


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("run_*.py")), ids=lambda path: path.name)
def test_scripts_drop_them_before_they_import_a_library(path: Path) -> None:
    imports = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
    assert imports[1].startswith("import lorapro_hf.recipes.quiet")


def test_a_user_of_the_library_is_told_everything() -> None:
    package = Path(lorapro_hf.__file__).parent
    users = [path for path in package.rglob("*.py") if "recipes.quiet" in path.read_text(encoding="utf-8")]
    assert users == [package / "cli.py"]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_first_screen_of_a_recipe_is_our_own(folder: Path) -> None:
    recipe = [str(CONFIGS / "smoke" / "smollm2-135m.yaml"), "--use_cpu", "--output_dir", "sft"]
    done = subprocess.run(
        [sys.executable, "-m", "lorapro_hf.cli", "train", *recipe], capture_output=True, text=True, check=True
    )
    assert "LoRA-Pro: 14 pairs" in done.stderr
    for noise in ("real_accelerator", "gemm_4bit", "Warning"):
        assert noise not in done.stderr + done.stdout
