"""How does the server of a Flower federation aggregate adapters?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig

from lorapro_hf.federated.adapters import Adapter, require_lora
from lorapro_hf.federated.aggregate import Agreement, Rule, aggregate


class LoRAFairStrategy(FedAvg):
    """A Flower strategy whose server aggregates LoRA adapters by LoRA-FAIR (arXiv 2411.14961).

    ```python
    from flwr.app import ArrayRecord, Context
    from flwr.serverapp import Grid, ServerApp
    from lorapro_hf.federated import LoRAFairStrategy

    app = ServerApp()


    @app.main()
    def main(grid: Grid, context: Context) -> None:
        initial = ArrayRecord(get_peft_model_state_dict(model))
        result = LoRAFairStrategy(fraction_evaluate=0.0).start(grid, initial, num_rounds=5)
        set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
    ```

    Clients load the arrays that they receive into their adapter, train, and return `get_peft_model_state_dict(model)`
    with their number of examples as `num-examples`, as for `FedAvg`. Flower sends no bfloat16: let them return
    float32. The metrics of a round also hold `fair-cosine` and `mean-cosine`: the means over the layers of the cosine
    between the aggregated change of the weight and the mean of the clients' changes, and the same for plain averaging.

    Args:
        lam: as for `aggregate_adapters`.
        objective: as for `aggregate_adapters`.
        config: PEFT's settings of the adapters, needed for `target_parameters`.
        **settings: the arguments of `FedAvg`, by name.

    Raises:
        ValueError: a setting is out of range; in a round, the adapters cannot be aggregated, see `aggregate_adapters`.
            The message names the node.
    """

    def __init__(
        self, lam: float = 0.01, objective: str = "cosine", config: LoraConfig | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.rule, self.config = Rule("fair", lam, objective), config and require_lora(config, "config")
        self.rule.require_valid()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the adapters of a round; replies with errors are left out, as by `FedAvg`."""
        replies, state = list(replies), None
        rows: list[Agreement] = []
        valid = [reply for reply in replies if not reply.has_error()]
        records = [(*each.content.array_records.values(), *each.content.metric_records.values()) for each in valid]
        if valid and all(len(each) == 2 and self.weighted_by_key in each[1] for each in records):
            names = [f"the reply of node {each.metadata.src_node_id} in round {server_round}" for each in valid]
            adapters = [
                Adapter(name, arrays.to_torch_state_dict(), self.config)
                for name, (arrays, _) in zip(names, records, strict=True)
            ]
            state, rows = aggregate(adapters, [metrics[self.weighted_by_key] for _, metrics in records], self.rule)
        average, metrics = super().aggregate_train(server_round, replies)  # logs, and refuses replies of another form
        if average is None or state is None:
            return None, metrics
        metrics = MetricRecord() if metrics is None else metrics
        for name, values in (("fair", [row.cosine for row in rows]), ("mean", [row.mean_cosine for row in rows])):
            known = [value for value in values if value is not None and value == value]
            if known:
                metrics[f"{name}-cosine"] = sum(known) / len(known)
        return ArrayRecord(state), metrics
