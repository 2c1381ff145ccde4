"""`lorapro train`: which script runs with which words, alone or under accelerate, and with which exit code it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hub_server import Hub, card_problems
from lorapro_hf.cli import main
from lorapro_hf.commands import train
from lorapro_hf.recipes.parser import read_recipe
from script_helpers import CONFIGS, INPUTS, SCRIPTS, TINY, check_adapter, factors, results, script
from signals import listen

STUB = """import json, os, signal, sys
json.dump(sys.argv[1:], open("words.json", "w"))
open("command", "w").write(os.environ["LORAPRO_TRAIN_COMMAND"])
signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells let background jobs ignore it
if "--killed" in sys.argv:
    os.kill(os.getpid(), int(sys.argv[-1]))
if "--wait" in sys.argv:
    print("ready", os.getpid(), flush=True)
    signal.pause()
sys.exit(int(sys.argv[-1]) if "--fail" in sys.argv else 0)
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run_stub.py").write_text(STUB)
    Path("mine.yaml").write_text("script: run_stub.py\nlora_r: 4\n")


def words() -> list[str]:
    found: list[str] = json.loads(Path("words.json").read_text())
    return found


@pytest.mark.parametrize("name", ["mine.yaml", "mine"])
def test_the_script_gets_the_recipe_and_the_overrides(name: str) -> None:
    assert main(["train", name, "--learning_rate", "1e-5", "--do_eval"]) == 0
    assert words() == ["mine.yaml", "--learning_rate", "1e-5", "--do_eval"]
    assert Path("command").read_text() == f"lorapro train {name} --learning_rate 1e-5 --do_eval"


def test_a_script_runs_without_a_recipe() -> None:
    assert main(["train", "run_stub.py", "--lora_r", "4", "--help"]) == 0
    assert words() == ["--lora_r", "4", "--help"]


def test_the_settings_are_printed_without_a_launch() -> None:
    assert main(["train", "--num_processes", "2", "--print_config", "mine.yaml", "--lora_r", "8"]) == 0
    assert words() == ["mine.yaml", "--lora_r", "8", "--print_config"]


@pytest.mark.parametrize(
    ("end", "code"), [(["--fail", "1"], 1), (["--fail", "2"], 2), (["--killed", "2"], 130), (["--killed", "9"], 137)]
)
def test_exit_code_is_that_of_the_training(end: list[str], code: int) -> None:
    assert main(["train", "mine.yaml", *end]) == code


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "name a recipe or a script; --list shows those that come with the package"),
        (["smolm2-135m.yaml"], "smolm2-135m.yaml: there is no such file, and nothing of that name in the package"),
        (["smolm2-135m"], "did you mean smollm2-135m.yaml"),
        (["run_gleu.py"], "did you mean run_glue.py"),
        (["qqqqqq"], "see lorapro train --list"),
        (["nothing.yaml"], "nothing.yaml names no script; add a line such as `script: run_sft.py`"),
        (["lost.yaml"], "run_lost.py: there is no such file"),
        (
            ["mine.yaml", "--num_processes", "2"],
            "--num_processes is for the launcher, not for the script: put it before",
        ),
        (["--accelerate_config", "zero9", "mine.yaml"], "neither a file nor one of ddp, fsdp2, zero1, zero2, zero3"),
    ],
)
def test_what_cannot_be_run_is_refused(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("nothing.yaml").write_text("lora_r: 4\n")
    Path("lost.yaml").write_text("script: run_lost.py\n")
    assert main(["train", *command]) == 2
    assert message in capsys.readouterr().err
    assert not Path("words.json").exists()


def test_recipes_are_found_by_name_in_the_package() -> None:
    recipe = CONFIGS / "paper" / "t5-base-sst2.yaml"
    for name in ("paper/t5-base-sst2", "configs/paper/t5-base-sst2.yaml"):
        assert train._resolve(name) == (SCRIPTS / "run_seq2seq.py", [str(recipe)])
    assert train._resolve("scripts/run_sft.py") == (SCRIPTS / "run_sft.py", [])


def test_a_recipe_extends_one_of_the_package_unless_there_is_one_beside_it() -> None:
    shipped = read_recipe(CONFIGS / "smollm2-135m.yaml")
    Path("own.yaml").write_text("extends: smollm2-135m.yaml\nlora_r: 99\n")
    assert read_recipe(Path("own.yaml")) == {**shipped, "lora_r": 99}
    Path("smollm2-135m.yaml").write_text("lora_alpha: 7\n")
    assert read_recipe(Path("own.yaml")) == {"lora_alpha": 7, "lora_r": 99}


def test_list_has_every_recipe_and_script_with_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    names = {name for name, _description in lines}
    assert {"smollm2-135m.yaml", "paper/llama-2-7b-metamathqa.yaml", "run_sft.py"} <= names
    assert {path.name for path in SCRIPTS.glob("run_*.py")} <= names
    assert not [name for name in names if name.startswith(("accelerate", "smoke")) or "/_" in name]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], []),
        (["--num_processes", "4"], [str(CONFIGS / "accelerate" / "ddp.yaml"), "4"]),
        (["--accelerate_config", "zero2"], [str(CONFIGS / "accelerate" / "zero2.yaml")]),
        (["--accelerate_config", "own.yaml"], ["own.yaml"]),
    ],
)
def test_several_processes_go_through_accelerate(
    options: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own.yaml").write_text("num_processes: 1\n")
    run: list[list[str]] = []
    monkeypatch.setattr(train, "supervise", lambda command, environment: run.append(command) or 0)
    assert main(["train", *options, "mine.yaml"]) == 0
    (command,) = run
    assert command[0] == sys.executable and command[-2:] == ["run_stub.py", "mine.yaml"]
    assert ("accelerate.commands.launch" in command) == bool(options)
    assert [word for word in command if word in expected] == expected
    # a configuration of the user's decides about precision and port itself
    assert ("--mixed_precision" in command) == any("configs" in word for word in expected)


# Signals to the one process that was started


def started(*options: str) -> tuple[subprocess.Popen[str], list[int]]:
    """`lorapro train` on the script that waits, and the process of each script, once all of them do."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lorapro_hf.cli", "train", *options, "mine.yaml", "--wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(Path.cwd()),
        preexec_fn=listen,
    )
    assert process.stdout is not None
    scripts = []
    for _ in range(int(options[-1]) if options else 1):
        word, number = process.stdout.readline().split()
        assert word == "ready"
        scripts.append(int(number))
    return process, scripts


def ended(process: subprocess.Popen[str]) -> int:
    """The exit code, once nobody is left who could write."""
    try:
        process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGHUP", "SIGINT"))]
)
def test_the_command_becomes_the_training(name: str) -> None:
    process, scripts = started()
    assert scripts == [process.pid]
    process.send_signal(signal.Signals[name])
    assert ended(process) == -signal.Signals[name]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_no_process_of_a_launched_training_is_left(name: str, processes: str) -> None:
    Path("own.yaml").write_text("distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 1\n")
    config = "own.yaml" if processes == "1" else "ddp"
    process, scripts = started("--accelerate_config", config, "--num_processes", processes)
    assert process.pid not in scripts
    process.send_signal(signal.Signals[name])
    assert ended(process) == 128 + signal.Signals[name]


def environment(folder: Path) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **own}


@pytest.mark.slow
def test_a_bad_setting_ends_with_exit_code_2() -> None:
    recipe = ["run_clm.py", "--model_name_or_path", "x", "--output_dir", "out", "--use_cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "lorapro_hf.cli", "train", *recipe],
        env=environment(Path.cwd()),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("run_clm.py: error: there is nothing to do")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_what_one_does(inputs: Path) -> None:
    Path("build").symlink_to(inputs / "build")
    model = ["--model_name_or_path", f"{INPUTS}/models/llama", "--train_file", f"{INPUTS}/data/text.txt"]
    settings = [*model, *TINY, "--block_size", "16", "--do_train", "--do_eval", "--lora_pro_mode", "full"]
    launched = ["--num_processes", "2", "--accelerate_config", "ddp", "run_clm.py", *settings]
    # as many examples a step, in the same order
    per_process = ["--per_device_train_batch_size", "1", "--output_dir", "two"]
    subprocess.run(
        [sys.executable, "-m", "lorapro_hf.cli", "train", *launched, *per_process],
        env=environment(Path.cwd()),
        check=True,
        timeout=280,
    )
    script("run_clm.py").main([*settings, "--output_dir", "one"])
    check_adapter(Path("two"), "run_clm.py")
    one, two = factors(Path("one")), factors(Path("two"))
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert (values - two[name]).norm() <= 1e-3 * values.norm(), name
    assert results(Path("two"))["eval_loss"] == pytest.approx(results(Path("one"))["eval_loss"], rel=1e-4)


@pytest.mark.slow
def test_a_training_ends_on_the_hub(inputs: Path, tmp_path: Path) -> None:
    Path("build").symlink_to(inputs / "build")
    model = ["--model_name_or_path", f"{INPUTS}/models/llama", "--train_file", f"{INPUTS}/data/messages.jsonl"]
    hub_flags = ["--push_to_hub", "--hub_model_id", "writer/chat", "--hub_private_repo", "true", "--output_dir", "chat"]
    words = ["train", "run_sft.py", *model, *TINY, "--max_length", "64", "--do_train", *hub_flags]
    with Hub() as hub:
        subprocess.run(
            [sys.executable, "-m", "lorapro_hf.cli", *words],
            env=hub.environment(str(tmp_path / "home")),
            check=True,
            timeout=200,
        )
        repository = hub.repositories["writer/chat"]
        assert repository.private
        wanted = {"adapter_model.safetensors", "adapter_config.json", "lorapro_config.json", "README.md"}
        assert wanted | {"tokenizer.json"} <= set(repository.files)
        card = repository.files["README.md"].decode()
    assert card_problems(card) == []
    assert {"- lora-pro", "- trl", "- sft"} <= set(card.splitlines())
