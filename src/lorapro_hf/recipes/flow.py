"""How does a script begin, and how does it train, evaluate and predict?"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import transformers
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, set_seed

from lorapro_hf.checkpoints.resume import checkpoints_in, find_flaw, newest_complete, require_complete
from lorapro_hf.hub.compose import RECIPE
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.dry_run import rehearse, write_nothing
from lorapro_hf.recipes.endings import one_line_errors, with_a_way_on
from lorapro_hf.recipes.parser import RecipeParser
from lorapro_hf.recipes.stopping import SaveAtCtrlC

logger = logging.getLogger(__name__)

as_program = one_line_errors()
"""Decorator for the `main` of a script."""


def start(arguments: TrainingArguments, parser: RecipeParser) -> None:
    """Check the checkpoint to resume from, and set up logging and the seed, before model and data are loaded.

    Raises:
        UsageError: if the arguments ask for nothing, or as in `checkpoint_to_resume`.
        ValueError: if the checkpoint is not complete.
    """
    if not (arguments.do_train or arguments.do_eval or arguments.do_predict):
        raise UsageError("there is nothing to do: set --do_train, --do_eval or --do_predict.")
    if parser.dry_run and not arguments.do_train:
        raise UsageError("--dry_run shows a training: set --do_train.")
    if arguments.do_train:
        _require_resumable(arguments)
    level = arguments.get_process_log_level()
    speaks = arguments.log_level == "passive" and arguments.should_log
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger("lorapro_hf").setLevel(logging.INFO if speaks else level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    set_seed(arguments.seed)
    if parser.dry_run:
        write_nothing(arguments)


def checkpoint_to_resume(arguments: TrainingArguments) -> str | Literal[True] | None:
    """Return the folder to resume from, `True` for the newest complete checkpoint, or `None` to start anew.

    Raises:
        UsageError: if there is no checkpoint, or the output folder has checkpoints that the arguments do not mention.
    """
    asked = arguments.resume_from_checkpoint
    asked = {"true": True, "false": None}.get(str(asked).lower(), asked)
    output = Path(arguments.output_dir)
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if asked is None and last is not None:
        raise UsageError(
            f"{output} holds checkpoints of an earlier training, the last {Path(last).name}. Go on with it by "
            "--resume_from_checkpoint true, or choose another --output_dir."
        )
    if asked is True and last is None:
        raise UsageError(
            f"--resume_from_checkpoint: {output} has no checkpoint. Leave it out to start anew, or name a folder."
        )
    if asked not in (None, True) and not Path(asked).is_dir():
        raise UsageError(f"--resume_from_checkpoint {asked}: there is no such folder.")
    return asked


def run(
    trainer: Trainer,
    parser: RecipeParser,
    test_dataset: Any = None,
    card: dict[str, Any] | None = None,
    finish_metrics: Callable[[dict[str, float]], dict[str, float]] = lambda metrics: metrics,
    lines_of: Callable[[Any], Iterable[str]] | None = None,
) -> dict[str, float]:
    """Train, evaluate and predict as the arguments ask, and return all metrics by name; a dry run has none.

    `output_dir` gets `recipe.yaml` with all settings, the adapter, its model card, `trainer_state.json`, and the
    metrics in `all_results.json` and in a file for each split.

    Args:
        trainer: A trainer with the datasets that it needs.
        parser: The parser that has read the settings.
        test_dataset: The rows for `--do_predict`.
        card: Keywords of `create_model_card` and `push_to_hub` (`dataset`, `tasks`, ...).
        finish_metrics: Adds metrics to those of a split, such as the perplexity.
        lines_of: Turns the output of `Trainer.predict` into the lines of `predictions.txt`.

    Raises:
        DiskFullError: if a file could not be written to its end.
    """
    if parser.dry_run:
        rehearse(trainer)
        return {}
    card, arguments = dict(card or {}), trainer.args
    metrics: dict[str, float] = {}
    if "finetuned_from" in card and Path(card["finetuned_from"]).exists():
        del card["finetuned_from"]  # the Hub would refuse a local path as the name of a model
    with with_a_way_on(arguments):
        if arguments.do_train:
            _log_parameters(trainer)
            if trainer.is_world_process_zero():
                Path(arguments.output_dir, RECIPE).write_text(parser.resolved, encoding="utf-8")
            stop = SaveAtCtrlC()
            with stop.listening(trainer):
                result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(arguments))
            trainer.save_model()
            metrics |= _saved(trainer, "train", {**result.metrics, "train_samples": len(trainer.train_dataset)})
            trainer.save_state()
            if stop.asked:  # after the last step
                raise KeyboardInterrupt
        if arguments.do_eval:
            metrics |= _saved(trainer, "eval", finish_metrics(trainer.evaluate()))
        if arguments.do_predict:
            output = trainer.predict(test_dataset, metric_key_prefix="predict")
            metrics |= _saved(trainer, "predict", finish_metrics(dict(output.metrics)))
            if lines_of is not None and trainer.is_world_process_zero():
                text = "".join(f"{line}\n" for line in lines_of(output))
                Path(arguments.output_dir, "predictions.txt").write_text(text, encoding="utf-8")
        if arguments.push_to_hub:
            trainer.push_to_hub(**card)
        elif arguments.do_train:
            trainer.create_model_card(**card)
    if arguments.do_train and trainer.is_world_process_zero():
        logger.info("The adapter and its model card, README.md, lie in %s", arguments.output_dir)
        _log_next(trainer)
    return metrics


def _require_resumable(arguments: TrainingArguments) -> None:
    """Refuse an incomplete checkpoint; the trainer, which knows the engine, checks it fully."""
    asked, output = checkpoint_to_resume(arguments), Path(arguments.output_dir)
    if asked is None or not getattr(arguments, "lora_pro", True):
        return
    if asked is True:
        newest_complete(output, checkpoints_in(output), partial(find_flaw, checksums=False))
    else:
        require_complete(Path(asked), checksums=False)


def _log_parameters(trainer: Trainer) -> None:
    if isinstance(trainer.model, PeftModel) and trainer.is_world_process_zero():
        trained, whole = trainer.model.get_nb_trainable_parameters()
        logger.info("%s of %s parameters are trained (%.2f%%)", f"{trained:,}", f"{whole:,}", 100 * trained / whole)


def _log_next(trainer: Trainer) -> None:
    """Name the commands for the adapter of a language model."""
    if isinstance(trainer.model, PeftModel) and trainer.model.active_peft_config.task_type == "CAUSAL_LM":
        adapter, merged = (shlex.quote(f"{trainer.args.output_dir}{end}") for end in ("", "-merged"))
        evaluation = f"lorapro evaluate TASK --adapter {adapter}"
        logger.info("Next: lorapro chat %s, or %s, or lorapro merge %s %s", adapter, evaluation, adapter, merged)


def _saved(trainer: Trainer, split: str, metrics: dict[str, float]) -> dict[str, float]:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    return metrics
