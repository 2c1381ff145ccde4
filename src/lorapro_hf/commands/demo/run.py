"""What happens in a demo run, one part after the other?"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import cached_property
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from lorapro_hf.commands.common.console import INTERRUPTED, prepare_output, progress_bars
from lorapro_hf.commands.common.scoring import final_answer_scores
from lorapro_hf.commands.compare.plan import PlannedRun
from lorapro_hf.commands.compare.store import FAILED, RunRecord
from lorapro_hf.commands.compare.sweep import outcome
from lorapro_hf.commands.demo import closeness, curves
from lorapro_hf.commands.demo.language import LanguageModel
from lorapro_hf.commands.demo.report import DemoFigures, ModelFigures, results_table, write
from lorapro_hf.commands.demo.settings import CLOSENESS, CLOSENESS_STEPS, CURVES, MODEL, MODEL_RANK, PARTS, DemoSettings

_LINES = 4  # about each training if there are no bars
ADAPTER = "lora_pro"
NEXT = """\
What to try next:
  lorapro train --list                 recipes for models and data of your own
  lorapro compare small --devices 2    more methods and tasks, each at its tuned rate
  lorapro inspect MODEL --lora_r 16    what LoRA-Pro would train, and at which cost"""


class _Demo:
    """The parts of one run; each adds to `figures`, also if Ctrl-C ends it."""

    def __init__(self, settings: DemoSettings, console: Console) -> None:
        self.settings, self.console, self.figures = settings, console, DemoFigures()
        # its processes pretrain their model while this one runs the first part
        self.trainings = curves.Trainings(curves.compared(settings)) if CURVES in settings.parts else None

    @cached_property
    def language(self) -> LanguageModel:
        """The language model, loaded when it is needed first."""
        return LanguageModel(self.settings, self.console)

    def closeness(self) -> None:
        """Compare directions with gradients after a few steps."""
        language = self.language
        with progress_bars(self.console) as progress:
            language.train(CLOSENESS_STEPS, self._bar(progress, "A few steps with LoRA-Pro", CLOSENESS_STEPS))
        with self.console.status("Comparing with the full gradients"):
            self.figures.closeness = closeness.measure(language.model, language.batches())
        self.say(closeness.sentence(self.figures.closeness, MODEL_RANK))

    def curves(self) -> None:
        """Train the methods of the comparison under all seeds."""
        trainings, records = self.trainings, list[RunRecord]()
        assert trainings is not None
        self.say("The small model of the puzzles is pretrained once, which takes a minute, and kept.")

        def report(run: PlannedRun, record: RunRecord | None) -> None:
            if record is None:
                progress.advance(bars[run.method.name])
                return
            if record.status == FAILED:
                raise RuntimeError(f"{run.title}: {record.error}\n{record.traceback}")
            records.append(record)
            self.figures.methods = curves.figures(trainings.settings, records)
            progress.update(bars[run.method.name], note=f"seed {run.seed}: {outcome(record)}")
            self._log(f"{run.title}: {outcome(record)}")

        steps = self.settings.seeds * self.settings.steps
        with progress_bars(self.console) as progress:
            methods = trainings.settings.methods
            bars = {each.name: progress.add_task(each.title, total=steps, note="") for each in methods}
            trainings.train(report)

    def model(self) -> None:
        """Fine-tune the language model, and let stock PEFT answer with its adapter."""
        language, folder, steps = self.language, self.settings.output_dir / ADAPTER, self.settings.model_steps
        language.start_anew()  # after the steps for the closeness
        with self.console.status("The held-out problems before the training"):
            before = language.score()
        figures = self.figures.model = ModelFigures(str(folder), before)
        with progress_bars(self.console) as progress:
            on_step = self._bar(progress, f"Training {curves.default_title()}", steps, figures.losses)
            language.train(steps, on_step, folder)
        with self.console.status("The held-out problems after it, answered by stock PEFT in a fresh process"):
            loss, answers = language.evaluator.loss(language.model), language.ask(folder)
        expected = [problem.answer for problem in language.held_out]
        figures.after = {"loss": loss, **final_answer_scores(answers, expected)}
        figures.answers = [
            {
                "prompt": problem.prompt,
                "answer": answer,
                "expected": problem.answer,
                "right": final_answer_scores([answer], [problem.answer])["exact_match"] == 1.0,
            }
            for problem, answer in zip(language.held_out, answers, strict=True)
        ]
        self.say(figures.sentence())

    def say(self, text: str) -> None:
        """Print text as it is."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _log(self, line: str) -> None:
        """Print a line about the progress if the output is a file: bars would appear there at the end only."""
        if not self.console.is_terminal:
            self.say(line)

    def _bar(self, progress: Any, title: str, steps: int, losses: list[float] | None = None) -> Callable[[float], None]:
        """Add a progress bar for a training; gives the function that advances it by a step and keeps the loss."""
        task, kept = progress.add_task(title, total=steps, note=""), [] if losses is None else losses

        def on_step(loss: float) -> None:
            kept.append(loss)
            progress.update(task, advance=1, note=f"loss {loss:.3f}")
            if len(kept) % max(1, steps // _LINES) == 0:
                self._log(f"{title}: step {len(kept)} of {steps}, loss {loss:.3f}")

        return on_step


def run_demo(settings: DemoSettings, console: Console | None = None, as_json: bool = False) -> int:
    """Run the parts, and write pictures, figures and the adapter.

    Args:
        settings: The settings.
        console: Where to print; by default stdout, or stderr with `as_json`.
        as_json: Print the file with the results at the end.

    Returns:
        The exit code: 0, or 130 if Ctrl-C ended it early; what is done is kept.

    Raises:
        UsageError: the model, dataset or output folder cannot be used.
        RuntimeError: a training has failed, or the adapter does not load.
        KeyboardInterrupt: before there is anything to keep.
    """
    started = time.perf_counter()
    console = console or Console(stderr=as_json)
    transformers_logging.disable_progress_bar()  # they would break ours
    prepare_output(settings.output_dir)
    demo = _Demo(settings, console)
    figures, pictures = demo.figures, list[str]()
    parts = {CLOSENESS: demo.closeness, CURVES: demo.curves, MODEL: demo.model}
    with closing(demo.trainings) if demo.trainings else nullcontext():
        for place, name in enumerate((part for part in PARTS if part in settings.parts), start=1):
            console.rule(f"Part {place} of {len(settings.parts)}: {name}")
            begun = time.perf_counter()
            try:
                parts[name]()
            except KeyboardInterrupt:
                figures.stopped = True
            figures.times_s[name] = time.perf_counter() - begun
            if figures:
                pictures = write(figures, settings)
            if figures.stopped:
                break
    if not figures:
        raise KeyboardInterrupt
    _finish(demo, pictures, time.perf_counter() - started)
    if as_json:
        print((settings.output_dir / "results.json").read_text(encoding="utf-8"), end="")
    return INTERRUPTED if figures.stopped else 0


def _finish(demo: _Demo, pictures: list[str], total: float) -> None:
    figures, settings = demo.figures, demo.settings
    demo.console.rule("Results")
    if figures.closeness:
        demo.say(closeness.sentence(figures.closeness, MODEL_RANK))
    if figures.methods:
        demo.console.print(results_table(figures.methods, settings))
    if figures.stopped:
        demo.say("Stopped by Ctrl-C. What is done is kept; the same command starts anew.")
    kept = [*pictures, str(settings.output_dir / "results.json")]
    kept += [] if figures.model is None else [figures.model.adapter]
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in figures.times_s.items())
    demo.say(f"\nKept: {', '.join(kept)}\nTime: {total:.0f} s ({times})\n\n{NEXT}")
