"""What does a script do once it has a trainer?"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal

import datasets
import transformers
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, set_seed

from lorapro_hf.checkpoints.resume import checkpoints_in, find_flaw, newest_complete, require_complete
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.endings import one_line_errors, with_a_way_on

logger = logging.getLogger(__name__)


def as_program(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
    """Let the `main` of a script end with one line on stderr where it cannot go on, see `one_line_errors`."""

    @wraps(main)
    def program(argv: list[str] | None = None) -> None:
        with one_line_errors():
            main(argv)

    return program


def start(arguments: TrainingArguments) -> None:
    """Set up logging and the seed, before model and data are made; one process speaks for all.

    Raises:
        UsageError: nothing is asked for, no training, evaluation or prediction; or as `checkpoint_to_resume`.
        ValueError: the checkpoint to go on from is not complete.
    """
    if not (arguments.do_train or arguments.do_eval or arguments.do_predict):
        raise UsageError("there is nothing to do: set --do_train, --do_eval or --do_predict.")
    if arguments.do_train:
        _require_resumable(arguments)  # what is wrong with it is said before anything is loaded
    level = arguments.get_process_log_level()
    speaks = arguments.log_level == "passive" and arguments.should_log
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger("lorapro_hf").setLevel(logging.INFO if speaks else level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    set_seed(arguments.seed)


def _require_resumable(arguments: TrainingArguments) -> None:
    """Raise if there is nothing to go on from; the trainer, which knows the engine, looks closer."""
    asked, output = checkpoint_to_resume(arguments), Path(arguments.output_dir)
    if asked is None or not getattr(arguments, "lora_pro", True):
        return
    if asked is True:
        newest_complete(output, checkpoints_in(output), partial(find_flaw, checksums=False))
    else:
        require_complete(Path(asked), checksums=False)


def checkpoint_to_resume(arguments: TrainingArguments) -> str | Literal[True] | None:
    """What `--resume_from_checkpoint` means to a trainer: a folder, or `True` for the newest complete checkpoint.

    Raises:
        UsageError: there is none, or the folder holds checkpoints and nobody said whether to go on from them.
    """
    asked = arguments.resume_from_checkpoint
    asked = {"true": True, "false": None}.get(str(asked).lower(), asked)
    output = Path(arguments.output_dir)
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if asked is True:
        if last is None:
            raise UsageError(
                f"--resume_from_checkpoint: {output} has no checkpoint. Leave it out to start anew, or name a folder."
            )
        return True
    if asked is None and last is not None:
        raise UsageError(
            f"{output} holds checkpoints of an earlier training, the last {Path(last).name}. Go on with it by "
            "--resume_from_checkpoint true, or choose another --output_dir."
        )
    if asked is not None and not Path(asked).is_dir():
        raise UsageError(f"--resume_from_checkpoint {asked}: there is no such folder.")
    return None if asked is None else str(asked)


def run(
    trainer: Trainer,
    test_dataset: Any = None,
    card: dict[str, Any] | None = None,
    finish_metrics: Callable[[dict[str, float]], dict[str, float]] = lambda metrics: metrics,
    save_predictions: Callable[[Any], None] | None = None,
) -> dict[str, float]:
    """Train, evaluate and predict as the arguments ask, and leave everything in `output_dir`.

    There lie the adapter, `all_results.json` and one file of metrics a split, `trainer_state.json`, the model card and,
    after a prediction, what `save_predictions` wrote.

    Args:
        trainer: ready to train; its datasets may be `None` for what is not asked for.
        test_dataset: for `--do_predict`.
        card: keywords of `create_model_card` and `push_to_hub` (`dataset`, `tasks`, ...).
        finish_metrics: adds to the metrics of a split, such as the perplexity from the loss.
        save_predictions: is handed `Trainer.predict`'s output, on the main process only.

    Returns:
        All metrics, by their names in `all_results.json`.

    Raises:
        DiskFullError: a file could not be written to its end.
    """
    with with_a_way_on(trainer):
        return _carry_out(trainer, test_dataset, dict(card or {}), finish_metrics, save_predictions)


def _carry_out(
    trainer: Trainer,
    test_dataset: Any,
    card: dict[str, Any],
    finish_metrics: Callable[[dict[str, float]], dict[str, float]],
    save_predictions: Callable[[Any], None] | None,
) -> dict[str, float]:
    arguments = trainer.args
    if "finetuned_from" in card and Path(card["finetuned_from"]).exists():
        del card["finetuned_from"]  # a path of this machine, which the Hub would refuse as the name of a model
    found: dict[str, float] = {}
    if arguments.do_train:
        _say_what_is_trained(trainer)
        result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(arguments))
        trainer.save_model()
        found |= _keep(trainer, "train", {**result.metrics, "train_samples": len(trainer.train_dataset)})
        trainer.save_state()
    if arguments.do_eval:
        metrics = finish_metrics(trainer.evaluate())
        found |= _keep(trainer, "eval", metrics)
    if arguments.do_predict:
        output = trainer.predict(test_dataset, metric_key_prefix="predict")
        found |= _keep(trainer, "predict", finish_metrics(dict(output.metrics)))
        if save_predictions is not None and trainer.is_world_process_zero():
            save_predictions(output)
    if arguments.push_to_hub:
        trainer.push_to_hub(**card)
    elif arguments.do_train:
        trainer.create_model_card(**card)
    if arguments.do_train and trainer.is_world_process_zero():
        logger.info("The adapter and its model card, README.md, lie in %s", arguments.output_dir)
    return found


def _say_what_is_trained(trainer: Trainer) -> None:
    if isinstance(trainer.model, PeftModel) and trainer.is_world_process_zero():
        trained, whole = trainer.model.get_nb_trainable_parameters()
        logger.info("%s of %s parameters are trained (%.2f%%)", f"{trained:,}", f"{whole:,}", 100 * trained / whole)


def _keep(trainer: Trainer, split: str, metrics: dict[str, float]) -> dict[str, float]:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    return metrics
