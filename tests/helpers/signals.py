"""Signals as a process in the foreground of a terminal has them."""

from __future__ import annotations

import signal


def listen() -> None:
    """Let a process that a test starts hear every signal: `nohup` and shells have background jobs ignore some."""
    for name in ("SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP"):
        signal.signal(signal.Signals[name], signal.SIG_DFL)
