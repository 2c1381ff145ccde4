"""The Flower strategy aggregates replies as `aggregate_adapters` does, and runs whole rounds on a grid in memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from lorapro_hf import aggregate_adapters

if importlib.util.find_spec("flwr") is None:
    pytest.skip("Flower is not installed: `make test-flower` installs it", allow_module_level=True)

from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from lorapro_hf.federated import LoRAFairStrategy

A, B = "body.lora_A.weight", "body.lora_B.weight"


@pytest.fixture(autouse=True)
def _as_in_a_server_app() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def adapter(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {A: (3, 6), B: (5, 3), "head.weight": (2, 5)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def asked(node: int) -> Message:
    return Message(RecordDict(), dst_node_id=node, message_type="train")


def reply(node: int, state: dict[str, torch.Tensor], examples: float = 1, **metrics: float) -> Message:
    metric = MetricRecord({"num-examples": examples, **metrics})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metric}), reply_to=asked(node))


def test_replies_are_aggregated_as_state_dicts_are():
    states, weights = [adapter(seed) for seed in range(3)], [10, 30, 60]
    replies = [reply(k, *each, loss=float(k)) for k, each in enumerate(zip(states, weights, strict=True), 1)]
    failed = Message(Error(code=0, reason="out of memory"), reply_to=asked(9))
    for settings in ({}, {"lam": 1.0, "objective": "ridge"}):
        arrays, metrics = LoRAFairStrategy(**settings).aggregate_train(1, iter([*replies, failed]))
        found, expected = arrays.to_torch_state_dict(), aggregate_adapters(states, weights, **settings)
        assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in found)
        assert metrics["loss"] == pytest.approx(0.1 * 1 + 0.3 * 2 + 0.6 * 3)
        assert metrics["fair-cosine"] > metrics["mean-cosine"] and "num-examples" not in metrics
    averaged = FedAvg().aggregate_train(1, replies)[0].to_torch_state_dict()
    for key in (A, "head.weight"):
        torch.testing.assert_close(found[key], averaged[key])
    assert (found[B] - averaged[B]).norm() > 0.01 * averaged[B].norm()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (
            lambda: reply(7, {**adapter(1), B: torch.full((5, 3), torch.nan)}),
            r"reply of node 7 in round 2: body.lora_B",
        ),
        (lambda: reply(7, {**adapter(1), A: torch.ones(2, 6), B: torch.ones(5, 2)}), r"and 2 in the reply of node 7"),
    ],
)
def test_a_broken_reply_is_named(broken: Any, said: str):
    usual = reply(6, adapter(0))
    with pytest.raises(ValueError, match=said):
        LoRAFairStrategy().aggregate_train(2, [usual, broken()])


def test_bad_settings_and_weights():
    with pytest.raises(ValueError, match="lam=-1"):
        LoRAFairStrategy(lam=-1)
    with pytest.raises(ValueError, match=r"weights=\[0.0\] must be .* not all 0"):
        LoRAFairStrategy().aggregate_train(3, [reply(1, adapter(0), 0.0)])
    without = Message(RecordDict({"arrays": ArrayRecord(adapter(0)), "m": MetricRecord()}), reply_to=asked(1))
    with pytest.raises(InconsistentMessageReplies, match="num-examples"):
        LoRAFairStrategy().aggregate_train(1, [without])
    assert LoRAFairStrategy().aggregate_train(1, []) == (None, None)


class MemoryGrid(Grid):
    """Nodes in this process, each a function from a message to its reply."""

    def __init__(self, nodes: dict[int, Any]) -> None:
        self.nodes = nodes

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return [self.nodes[message.metadata.dst_node_id](message) for message in messages]

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Any: ...

    def push_messages(self, messages: Iterable[Message]) -> Any: ...

    def pull_messages(self, message_ids: Iterable[str]) -> Any: ...


def test_rounds_on_a_grid_in_memory():
    goals = {node: torch.randn(5, 6, generator=torch.Generator().manual_seed(node)) for node in (1, 2, 3)}
    received: dict[int, list[dict[str, torch.Tensor]]] = {node: [] for node in goals}

    def train(node: int, message: Message) -> Message:
        state = message.content["arrays"].to_torch_state_dict()
        received[node].append(state)
        state = {key: tensor.clone().requires_grad_() for key, tensor in state.items()}
        loss = (state[B] @ state[A] - goals[node]).square().sum()
        loss.backward()
        moved = {k: (t.detach() - 0.02 * t.grad if t.grad is not None else t.detach()) for k, t in state.items()}
        content = RecordDict(
            {"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": node, "loss": loss.item()})}
        )
        return Message(content, reply_to=message)

    grid = MemoryGrid({node: lambda message, node=node: train(node, message) for node in goals})
    strategy = LoRAFairStrategy(fraction_evaluate=0.0)
    start = adapter(0)
    result = strategy.start(grid, ArrayRecord(start), num_rounds=3)
    losses = [result.train_metrics_clientapp[number]["loss"] for number in (1, 2, 3)]
    assert losses[2] < losses[1] < losses[0]
    for states in zip(*received.values(), strict=True):  # all clients start a round from the same adapter
        assert all(torch.equal(states[0][key], state[key]) for state in states for key in state)
    assert all(torch.equal(received[1][0][key], start[key]) for key in start)
    assert not torch.equal(result.arrays.to_torch_state_dict()[B], received[1][2][B])
