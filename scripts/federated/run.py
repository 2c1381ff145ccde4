"""Run the federation of this folder on one machine: a SuperLink and four SuperNodes of Flower, in one command.

    make federated
    make federated ARGS="--rounds 5 --steps 16"

The terminal shows Flower's own lines about each round. `--in_memory` calls the same server and clients in this process,
one after another. It loads the model once, where each SuperNode loads it anew in every round. The table of losses goes
to stdout, and `losses.png` into the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import tomllib

HERE = Path(__file__).resolve().parent
PORT = 39391  # of the SuperLink; the next ones are of the SuperNodes
NODES = 4


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the settings of the app, with the defaults of its `pyproject.toml`, and `in_memory`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    app = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    for name, value in app["config"].items():
        parser.add_argument(f"--{name.replace('-', '_')}", type=type(value), default=value, help=f"default: {value!r}")
    parser.add_argument("--in_memory", action="store_true", help="without processes of Flower")
    arguments = parser.parse_args(argv)
    arguments.output = str(Path(arguments.output).resolve())
    arguments.settings = {name: getattr(arguments, name.replace("-", "_")) for name in app["config"]}
    return arguments


def run_in_memory(settings: dict[str, Any]) -> None:
    """Call the server with a grid that calls the clients."""
    import federation
    from flwr.app import Context, Message, RecordDict
    from flwr.serverapp import Grid
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def context(node: int, config: dict[str, Any]) -> Context:
        return Context(1, node, config, RecordDict(), settings)

    class MemoryGrid(Grid):
        """The clients of this process; a run needs no other calls."""

        run = property(lambda self: None)
        set_run = create_message = push_messages = pull_messages = None

        def get_node_ids(self) -> list[int]:
            return list(range(1, len(federation.SIZES) + 1))

        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
            return [
                federation.client(message, context(node, {"partition-id": node - 1}))
                for message in messages
                for node in [message.metadata.dst_node_id]
            ]

    federation.server(MemoryGrid(), context(0, {}))


@contextmanager
def program(name: str, *words: str, log: Path | None, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program of Flower, beside this interpreter, until the block ends; the terminal is its default log."""
    with nullcontext() if log is None else log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / name), *words], stdout=output, stderr=subprocess.STDOUT, env=env
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_for_port(process: subprocess.Popen[bytes]) -> None:
    """Return once the SuperLink listens."""
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", PORT)).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    sys.exit("The SuperLink has ended: see superlink.log in the output folder.")


def run_with_processes(settings: dict[str, Any], output: Path) -> None:
    """Start a SuperLink and the SuperNodes, submit the app, and wait for the losses."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            sys.exit(f"Port {PORT} is taken, perhaps by a SuperLink of an earlier run: stop it first.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the programs below end, too
    home = output / "flower"
    home.mkdir(exist_ok=True)
    address = f"127.0.0.1:{PORT}"
    connection = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    (home / "config.toml").write_text(connection, encoding="utf-8")
    bin_folder = str(Path(sys.executable).parent)
    env = {**os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}
    env["PATH"] = f"{bin_folder}{os.pathsep}{env['PATH']}"
    # the clients train at the same time: with all cores each, they would wait for one another
    of_node = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // NODES)), **env}
    with ExitStack() as stack:
        link = ["--insecure", "--disable-runtime-dependency-installation", "--port", str(PORT)]
        processes = [stack.enter_context(program("flower-superlink", *link, log=output / "superlink.log", env=env))]
        wait_for_port(processes[0])
        for number in range(NODES):
            node = ["--insecure", "--superlink", address, "--port", str(PORT + 1 + number)]
            node += ["--node-config", f"partition-id={number}"]
            log = output / f"supernode{number}.log"
            processes.append(stack.enter_context(program("flower-supernode", *node, log=log, env=of_node)))
        values = " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
        words = ["run", str(HERE), "here", "--run-config", values, "--stream"]  # which lasts as long as the run
        submitted = stack.enter_context(program("flwr", *words, log=None, env=env))
        while submitted.poll() is None:
            ended = [process for process in processes if process.poll() is not None]
            if ended:
                sys.exit(f"{ended[0].args[0]} has ended: see the logs in {output}.")
            time.sleep(1)
    if not (output / "losses.json").exists():
        sys.exit(f"The run ended without losses: see the logs in {output}.")


def report(output: Path) -> None:
    """Print a table of the losses by round, and draw them."""
    from lorapro_hf.commands.common.plots import as_png, new_figure

    found = json.loads((output / "losses.json").read_text(encoding="utf-8"))
    print(f"{'round':>5}  " + "  ".join(f"{name:>16}" for name in found))
    for number, losses in enumerate(zip(*(each["held-out loss"] for each in found.values()), strict=True)):
        print(f"{number:5}  " + "  ".join(f"{loss:16.4f}" for loss in losses))
    figure = new_figure(5.0, 3.2)
    axes = figure.subplots()
    for name, each in found.items():
        axes.plot(each["held-out loss"], marker="o", label=name)
    axes.set(xlabel="round", ylabel="held-out loss", title="Four clients with problems of different kinds")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    (output / "losses.png").write_bytes(as_png(figure, 150))
    print(f"Losses, picture and adapters: {output}")


def main(argv: list[str] | None = None) -> None:
    """Run the federation and report."""
    arguments = parse(argv)
    output = Path(arguments.output)
    if (output / "losses.json").exists():
        sys.exit(f"{output} has losses of an earlier run: name another --output.")
    output.mkdir(parents=True, exist_ok=True)
    if arguments.in_memory:
        run_in_memory(arguments.settings)
    else:
        run_with_processes(arguments.settings, output)
    report(output)


if __name__ == "__main__":
    main()
