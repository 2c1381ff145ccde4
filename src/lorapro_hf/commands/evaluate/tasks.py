"""Which problems is a model given, and how are its answers marked?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets.exceptions import DatasetsError
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from lorapro_hf.commands.evaluate.data import local_rows
from lorapro_hf.options import UsageError

OWN_TASKS = Path(__file__).parent / "task_files"
_UNSAFE = (
    "the task {} runs programs that the model writes on this machine, with your rights. If you accept that, add "
    "--confirm_run_unsafe_code; a container or a virtual machine keeps them apart."
)


def load_tasks(arguments: argparse.Namespace) -> dict[str, Any]:
    """The tasks of a name as `lm_eval.evaluator.evaluate` takes them, with the settings of the command line.

    Raises:
        UsageError: no such task, data or example, or a setting that the task does not take.
    """
    name = arguments.task
    rows = local_rows(arguments.task, arguments.dataset, arguments.fewshot_dataset)
    manager = _manager(name, _metadata(arguments))
    _require_leave(arguments, getattr(manager.task_index.get(name), "cfg", None) or {})
    spec: Any = name
    if rows is not None:  # an item of a group may replace settings of a task
        spec = {"group": "local", "task": [{"task": name, "custom_dataset": lambda **_: rows}]}
    try:
        loaded = dict(manager.load(spec))
    except (OSError, ImportError, ValueError, KeyError, DatasetsError) as error:
        raise UsageError(f"cannot load the task {name}: {str(error)[:800]}\n{_remedy(name)}") from error
    if rows is not None:
        loaded |= {"groups": {}, "group_map": {}}
    for task in loaded["tasks"].values():
        _require_leave(arguments, {"unsafe_code": getattr(task, "UNSAFE_CODE", False)})
        _configure(task, arguments)
    if rows is not None:
        _require_examples(loaded["tasks"][name].config.num_fewshot, len(rows["train"]), arguments)
    return loaded


def _metadata(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of the generated word problems."""
    if arguments.task != "word_problems":
        if arguments.seed is not None:
            raise UsageError("--seed goes with the task word_problems, whose problems are generated.")
        return {}
    given = {"seed": arguments.seed, "size": arguments.limit}
    return {key: value for key, value in given.items() if value is not None}


def _manager(name: str, metadata: dict[str, Any]) -> TaskManager:
    """lm-eval's index of tasks: of the folders with a file of that name, else of all, which takes a minute.

    Raises:
        UsageError: no task, group or tag is called `name`.
    """
    is_file = Path(name).is_file()
    shipped = Path(lm_eval.tasks.__file__).parent
    files = () if is_file or "/" in name else shipped.rglob(f"{name}.yaml")
    near = [OWN_TASKS, *sorted({file.parent for file in files})]
    manager = TaskManager(include_path=near, include_defaults=False, metadata=metadata)
    if is_file or name in manager.all_subtasks:
        return manager
    manager = TaskManager(include_path=OWN_TASKS, metadata=metadata)
    if name not in manager.all_tasks:
        raise UsageError(f"there is no task {name}; `lm-eval ls tasks` lists those of lm-eval. {_remedy(name)}")
    return manager


def _require_leave(arguments: argparse.Namespace, config: dict[str, Any]) -> None:
    if config.get("unsafe_code") and not arguments.confirm_run_unsafe_code:
        raise UsageError(_UNSAFE.format(arguments.task))


def _configure(task: Any, arguments: argparse.Namespace) -> None:
    """Set number and seed of the examples and the length of answers as `lm_eval run` does."""
    usual = task.get_config("num_fewshot")
    if usual == 0 and arguments.num_fewshot:
        raise UsageError(f"the task {task.task_name} has a prompt without examples: leave --num_fewshot out.")
    asked = usual if arguments.num_fewshot is None else arguments.num_fewshot
    task.set_config(key="num_fewshot", value=asked or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    if arguments.max_new_tokens is not None and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value={"max_gen_toks": arguments.max_new_tokens}, update=True)


def _require_examples(wanted: int, have: int, arguments: argparse.Namespace) -> None:
    if wanted and arguments.fewshot_dataset is None:
        raise UsageError(
            f"the task {arguments.task} puts {wanted} solved examples before each problem: name a file with some by "
            "--fewshot_dataset, or do without by --num_fewshot 0."
        )
    if wanted > have:
        raise UsageError(f"{arguments.fewshot_dataset} has {have} examples, fewer than {wanted}; lower --num_fewshot.")


def _remedy(name: str) -> str:
    if name.startswith("humaneval"):
        return (
            "HumanEval is marked by the metric code_eval, which is downloaded from the Hub, also where --dataset names "
            "the problems. Without a network, evaluate it once on a machine with one, and copy its HF_HOME."
        )
    return "Without a network there are word_problems, and gsm8k with a file as --dataset."
