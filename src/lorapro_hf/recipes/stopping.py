"""How does Ctrl-C end a training with a checkpoint of its last step?"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments


class SaveAtCtrlC(TrainerCallback):
    """Callback that saves a checkpoint after the step in which Ctrl-C came, and then raises `KeyboardInterrupt`.

    A second Ctrl-C, or one before the first step, stops at once. So does any in a training of several processes, whose
    ranks may be in different steps.
    """

    def __init__(self) -> None:
        self.asked = False
        self._has_begun = False
        self._process = os.getpid()

    @contextmanager
    def listening(self, trainer: Trainer) -> Iterator[None]:
        """Handle Ctrl-C within the context; Python handles signals in the main thread only."""
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or trainer.args.world_size > 1 or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            yield
            return
        trainer.add_callback(self)
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            trainer.remove_callback(self)

    def _handle(self, _number: int, _frame: object) -> None:
        if os.getpid() != self._process:  # a worker that loads data goes on until the step has ended
            return
        if self.asked or not self._has_begun:
            raise KeyboardInterrupt
        self.asked = True
        print("\nCtrl-C: a checkpoint is saved after this step; again to stop at once.", file=sys.stderr)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """From now on there are steps to save."""
        self._has_begun = True

    def on_step_end(self, _args: TrainingArguments, _state: Any, control: TrainerControl, **_: Any) -> None:
        """Ask the trainer for a checkpoint."""
        if self.asked:
            control.should_save = True

    def on_save(self, *_: Any, **__: Any) -> None:
        """Stop, now that the checkpoint is complete."""
        if self.asked:
            print(file=sys.stderr)  # the progress bar has not ended its line
            raise KeyboardInterrupt
