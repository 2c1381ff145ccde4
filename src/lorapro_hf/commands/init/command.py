"""Which options does `lorapro init` take, and what does it ask?"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from lorapro_hf.commands.init.columns import TASKS
from lorapro_hf.options import UsageError

INIT = """\
Write a recipe for your model and your data file: YAML with comments, which `lorapro train` runs. The columns of the
data are found by their names. In a terminal, the command asks for a model and a data file that you do not give.
"""
INIT_EXAMPLES = """\
examples:
  lorapro init
  lorapro init --model HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl
  lorapro init --model ./llama --data faq.csv --columns Question Answer --output faq.yaml
  lorapro init --model google-t5/t5-base --data news.jsonl --task seq2seq --columns article summary

exit codes: 0 done, 1 failed, 2 bad arguments, 130 stopped by Ctrl-C
"""


def add_init(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro init`."""
    parser.add_argument("--model", metavar="NAME", help="base model: a name on the Hub, or a folder")
    parser.add_argument("--data", metavar="FILE", help="CSV, JSON, JSON lines, Parquet or text file to train on")
    parser.add_argument(
        "--task",
        choices=TASKS,
        help="sft: a language model on answers or text; dpo: on preferences; seq2seq: an encoder-decoder such as T5 "
        "(default: dpo for data with chosen and rejected, otherwise sft)",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME",
        help="columns to train on, if their names are unusual: prompt and completion or one of texts (sft), chosen, "
        "rejected and perhaps prompt (dpo), text to read and text to write (seq2seq)",
    )
    parser.add_argument("--output", default="recipe.yaml", metavar="FILE", help="recipe to write")
    parser.add_argument("--output_dir", metavar="FOLDER", help="folder of the training (default: runs/ and the recipe)")
    parser.add_argument("--overwrite", action="store_true", help="replace a recipe that exists")
    parser.set_defaults(run=init)


def init(arguments: argparse.Namespace) -> int:
    """Write the recipe, and print the next commands."""
    output = Path(arguments.output)
    if output.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--output {output} must end with .yaml.")
    if output.exists() and not arguments.overwrite:
        raise UsageError(f"{output} exists: give another --output, or --overwrite to replace it.")
    model = arguments.model or _asked("Base model (a name on the Hub, or a folder)", "--model")
    file = arguments.data or _asked("Data file (.jsonl, .csv, .parquet, .txt)", "--data")
    text, found = _written(arguments, model, file, output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror}.") from error
    name = shlex.quote(str(output))
    print(f"{found}\n{output} is written. Next:")
    print(f"  lorapro train --dry_run {name}    see three examples, memory and time; writes nothing")
    print(f"  lorapro train {name}")
    return 0


def _asked(question: str, option: str) -> str:
    if not sys.stdin.isatty():
        raise UsageError(f"name it by {option} ({question[0].lower()}{question[1:]}); only a terminal is asked.")
    try:
        answer = input(f"{question}: ").strip()
    except EOFError:
        answer = ""
    if not answer:
        raise UsageError(f"there is no answer; give {option}.")
    return answer


def _written(arguments: argparse.Namespace, model: str, file: str, output: Path) -> tuple[str, str]:
    """Return the text of the recipe, and a line on the data."""
    from lorapro_hf.commands.init.columns import SFT, column_settings, task_of
    from lorapro_hf.commands.init.recipe import model_settings, recipe_text, template_settings
    from lorapro_hf.recipes.files import read_file

    model_of = model_settings(model)
    rows = read_file(file, "--data")
    names = rows.column_names
    task = arguments.task or task_of(names)
    columns = column_settings(task, arguments.columns, names, file)
    if len(rows) < 2:
        raise UsageError(f"{file} has {len(rows)} row; a training and its evaluation need two or more.")
    if task == SFT:
        columns |= template_settings(model_of, columns, names)
    about = f"{len(rows):,} rows with {'the columns' if len(names) > 1 else 'the column'} {', '.join(names)}"
    folder = arguments.output_dir or str(Path("runs", output.stem))
    text = recipe_text(task, str(output), model_of, {"train_file": file, **columns}, about, folder)
    return text, f"{file}: {about}; task {task}."
