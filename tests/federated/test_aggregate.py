"""Aggregated adapters, loaded by stock PEFT and merged, equal dense sums of the clients' merged weights."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from lora_layers import DEFAULTS, ROWS, Net, Row
from lorapro_hf import aggregate_adapters
from lorapro_hf.federated.aggregate import Rule, aggregate, config_of_result, open_adapters
from lorapro_hf.utils.extras import MissingExtraError

KINDS = {row.name: row for row in ROWS}
NAMES = (
    "linear",
    "linear with a bias on lora_B",
    "Conv1D of GPT-2",
    "embedding",
    "Conv2d",
    "Conv2d of kernel 1",
    "MultiheadAttention",
    "experts (in, out)",
    "experts (out, in)",
    "two expert parameters of one module",
)
WEIGHTS = (3.0, 1.0, 2.0)
SHARES = torch.tensor(WEIGHTS).double() / sum(WEIGHTS)


def base_of(row: Row) -> nn.Module:
    torch.manual_seed(0)
    return row.model().to(row.dtype)


def client(row: Row, folder: Path, number: int, **settings: Any) -> Path:
    model = base_of(row)
    torch.manual_seed(100 + number)
    adapted = get_peft_model(model, LoraConfig(**{**DEFAULTS, **row.settings, **settings})).to(row.dtype)
    adapted.save_pretrained(folder / str(number))
    return folder / str(number)


def change(row: Row, state: dict[str, torch.Tensor], config: LoraConfig) -> torch.Tensor:
    """What merging an adapter adds to the parameters of the base, all in one vector."""
    config = copy.deepcopy(config)
    adapted = get_peft_model(base_of(row), config).to(row.dtype)
    assert not set_peft_model_state_dict(adapted, state).unexpected_keys
    merged = adapted.merge_and_unload().state_dict()
    return torch.cat([(merged[key] - value).flatten() for key, value in base_of(row).state_dict().items()])


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def saved_change(row: Row, folder: Path) -> torch.Tensor:
    config = LoraConfig.from_pretrained(str(folder))
    return change(row, load_file(folder / "adapter_model.safetensors"), config)


@pytest.mark.parametrize("name", [name for name in NAMES if name in KINDS])
def test_exact_is_the_sum_of_the_changes(name: str, tmp_path: Path):
    row = KINDS[name]
    folders = [
        client(row, tmp_path, number, r=2 + number, lora_alpha=5 - number, use_rslora=number == 1)
        for number in range(3)
    ]
    wanted = sum(share * saved_change(row, folder) for share, folder in zip(SHARES, folders, strict=True))
    adapters = open_adapters(folders)
    state, rows = aggregate(adapters, WEIGHTS, Rule("exact"))
    torch.testing.assert_close(change(row, state, config_of_result(adapters, rows)), wanted)
    assert all(each.cosine == pytest.approx(1) and each.rank == 9 and each.mean_cosine is None for each in rows)
    state, rows = aggregate(adapters, WEIGHTS, Rule("exact", rank=4))
    found = change(row, state, config_of_result(adapters, rows))
    assert {each.rank for each in rows} == {4}
    if row.pairs == 1 and "bias" not in name:
        assert cosine(found, wanted) == pytest.approx(rows[0].cosine) and rows[0].cosine < 1
        assert float(found.norm() / wanted.norm()) == pytest.approx(rows[0].length)


@pytest.mark.parametrize("objective", ["cosine", "ridge"])
@pytest.mark.parametrize("name", [name for name in NAMES if name in KINDS])
def test_fair_comes_closer_than_the_mean(name: str, objective: str, tmp_path: Path):
    row = KINDS[name]
    folders = [client(row, tmp_path, number, lora_alpha=5 - number, use_rslora=number == 1) for number in range(3)]
    wanted = sum(share * saved_change(row, folder) for share, folder in zip(SHARES, folders, strict=True))
    adapters = open_adapters(folders)
    state, rows = aggregate(adapters, WEIGHTS, Rule("fair", 1e-3, objective))
    mean, _ = aggregate(adapters, WEIGHTS, Rule("mean"))
    assert list(state) == list(adapters[0].tensors)
    found, plain = (change(row, each, config_of_result(adapters, rows)) for each in (state, mean))
    if row.pairs == 1 and "bias" not in name:
        assert cosine(found, wanted) == pytest.approx(rows[0].cosine)
        assert cosine(plain, wanted) == pytest.approx(rows[0].mean_cosine)
        assert float(found.norm() / wanted.norm()) == pytest.approx(rows[0].length)
    assert all(each.cosine > each.mean_cosine for each in rows)
    if objective == "ridge":
        assert (found - wanted).norm() < (plain - wanted).norm()


def test_groups_of_a_convolution(tmp_path: Path):
    row = KINDS["Conv2d with groups"]
    folders = [client(row, tmp_path, number, r=4 + 2 * number) for number in range(2)]
    adapters = open_adapters(folders)

    def output(state: dict[str, torch.Tensor], config: LoraConfig) -> torch.Tensor:
        adapted = get_peft_model(base_of(row), copy.deepcopy(config)).to(row.dtype)
        set_peft_model_state_dict(adapted, state)
        return torch.atanh(row.output(adapted).detach())

    base = torch.atanh(row.output(base_of(row)).detach())
    wanted = sum(0.5 * (output(dict(each.tensors), each.config) - base) for each in adapters)
    state, rows = aggregate(adapters, None, Rule("exact"))
    torch.testing.assert_close(output(state, config_of_result(adapters, rows)) - base, wanted, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"convolution of 2 groups: rank=3 must be a multiple"):
        aggregate(adapters, None, Rule("exact", rank=3))
    same = open_adapters([client(row, tmp_path, number) for number in (5, 6)])
    (found,) = aggregate(same, None, Rule("fair"))[1]
    assert found.rank == 4 and found.cosine > found.mean_cosine


class Head(nn.Module):
    """A body and a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.wide = nn.Linear(6, 5), nn.Linear(5, 7)
        self.head = nn.Sequential(nn.Linear(7, 2), nn.BatchNorm1d(2))


HEAD = Row("head", Head, {"modules_to_save": ["head"], "target_modules": ["body", "wide"]}, dtype=torch.bfloat16)


def test_other_tensors_are_averaged_and_patterns_kept(tmp_path: Path):
    patterns = {"rank_pattern": {"wide": 2}, "alpha_pattern": {"body": 8}, "use_rslora": True}
    folders = [client(HEAD, tmp_path, number, **patterns) for number in range(2)]
    own = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    own[1]["base_model.model.head.1.num_batches_tracked"] += 4
    save_file(own[1], folders[1] / "adapter_model.safetensors")
    adapters = open_adapters(folders)
    state, rows = aggregate(adapters, (1, 3), Rule())
    name = "base_model.model.head.0.weight"
    expected = (own[0][name].double() + 3 * own[1][name].double()) / 4
    torch.testing.assert_close(state[name], expected.bfloat16(), rtol=0, atol=0)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16, torch.int64}
    assert state["base_model.model.head.1.num_batches_tracked"] == 3
    config = config_of_result(adapters, rows)
    assert (config.rank_pattern, config.alpha_pattern, config.r) == ({"wide": 2}, {"body": 8}, 3)
    state, rows = aggregate(adapters, (1, 3), Rule("exact"))
    config = config_of_result(adapters, rows)
    adapted = get_peft_model(Head(), config)
    set_peft_model_state_dict(adapted, state)
    assert (adapted.base_model.model.body.r["default"], adapted.base_model.model.wide.r["default"]) == (6, 4)
    for module, scaling in (("body", 8 / 3**0.5), ("wide", 5 / 2**0.5)):
        assert getattr(adapted.base_model.model, module).scaling["default"] == pytest.approx(scaling)


def test_state_dicts_with_names_of_adapters():
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(get_peft_model(Net(nn.Linear(6, 5)), LoraConfig(**DEFAULTS), adapter_name="mine_A"))
    whole = [{key: value for key, value in model.state_dict().items() if "lora_" in key} for model in models]
    saved = [get_peft_model_state_dict(model, adapter_name="mine_A") for model in models]
    found, plain = aggregate_adapters(whole), aggregate_adapters(saved)
    assert sorted(key.replace(".mine_A", "") for key in found) == sorted(plain) and set(found) == set(whole[0])
    assert all(torch.equal(found[key], plain[key.replace(".mine_A", "")]) for key in found)
    same = aggregate_adapters([saved[0], saved[0]], weights=[1, 5])
    assert all((same[key] - saved[0][key]).norm() <= 1e-7 * saved[0][key].norm() for key in same)
    mean = aggregate_adapters(saved, method="mean")
    B = next(key for key in mean if "lora_B" in key)
    assert torch.equal(mean[B], ((saved[0][B].double() + saved[1][B].double()) / 2).float())


def test_a_layer_without_a_maximum_keeps_the_mean_and_is_named(caplog: pytest.LogCaptureFixture):
    clients = [{"body.lora_A.weight": torch.eye(2, 3), "body.lora_B.weight": torch.ones(4, 2)} for _ in range(2)]
    clients[1] = {"body.lora_A.weight": torch.ones(2, 3), "body.lora_B.weight": -torch.ones(4, 2)}
    assert not aggregate_adapters(clients)["body.lora_B.weight"].any()
    assert "body keeps the mean of B" in caplog.text and 'objective "ridge"' in caplog.text
    assert aggregate_adapters(clients, objective="ridge")["body.lora_B.weight"].any()


# Bad input


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clients")
    return [client(HEAD, folder, number) for number in range(2)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "median"}, "method='median' is unknown: choose one of fair, mean, exact"),
        ({"objective": "l1"}, "choose one of cosine, ridge"),
        ({"lam": -1.0}, "lam=-1.0 must be 0 or a positive"),
        ({"rank": 3}, 'rank is for the method "exact"'),
        ({"rank": 0, "method": "exact"}, "rank=0 must be at least 1"),
        ({"weights": [1.0]}, "1 weights do not fit 2 adapters"),
        ({"weights": [1.0, -1.0]}, "must be 0 or positive"),
        ({"weights": [0, 0]}, "not all 0"),
        ({"weights": [1, float("nan")]}, "must be 0 or positive"),
        ({"config": LoraConfig()}, "folders have settings of their own"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], said: str, pair: list[Path]):
    with pytest.raises(ValueError, match=said):
        aggregate_adapters(pair, **settings)


def test_the_ratio_of_weights_counts_alone(pair: list[Path]):
    expected = aggregate_adapters(pair, [1, 1], "mean")
    for weight in (1e308, 5e-324):
        found = aggregate_adapters(pair, [weight, weight], "mean")
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("adapters", "said"), [([], "with at least one"), ("runs/a", "must be a list"), ([{}, "runs/a"], "give either")]
)
def test_bad_lists(adapters: Any, said: str):
    with pytest.raises(ValueError, match=said):
        aggregate_adapters(adapters)


def edited(folder: Path, to: Path, remove: str = "", fill: str = "", settings: dict[str, Any] | None = None) -> Path:
    to.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**config, **(settings or {})}))
    tensors = load_file(folder / "adapter_model.safetensors")
    if fill:
        tensors[fill][0] = float("nan")
    save_file({key: value for key, value in tensors.items() if key != remove}, to / "adapter_model.safetensors")
    return to


A = "base_model.model.body.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"remove": A.replace("_A", "_B")}, r"0 has .*lora_B.weight, and .*other has not: .*same target_modules"),
        ({"fill": A}, r"other: .*body.lora_A.weight holds NaN or Inf"),
        ({"settings": {"base_model_name_or_path": "b"}}, r"base_model_name_or_path=None, and .*'b'.*same model"),
        ({"settings": {"r": 4}}, r"other: .*lora_A.weight has rank 3, but adapter_config.json says 4"),
        ({"settings": {"init_lora_weights": "pissa"}}, "path_initial_model_for_weight_conversion"),
        ({"settings": {"peft_type": "LOHA"}}, "adapter of the kind LOHA: only LoRA"),
        ({"settings": {"lora_alpha": float("inf")}}, r"body has the scalings \[1.66.*inf\]: set lora_alpha"),
    ],
)
def test_an_adapter_that_does_not_fit(change: dict[str, Any], said: str, pair: list[Path], tmp_path: Path):
    with pytest.raises(ValueError, match=said):
        aggregate_adapters([pair[0], edited(pair[1], tmp_path / "other", **change)])


def test_other_shapes_and_ranks(pair: list[Path], tmp_path: Path):
    wider = Row("wider", lambda: Net(nn.Linear(6, 5)))
    one, two = client(wider, tmp_path, 1), client(Row("", lambda: Net(nn.Linear(7, 5))), tmp_path, 2)
    with pytest.raises(ValueError, match=r"lora_A.weight is \(3, 6\) .*\(3, 7\) .*different base models"):
        aggregate_adapters([one, two], method="exact")
    with pytest.raises(ValueError, match=r"body has rank 3 in .* and 2 in .*The method \"exact\" takes"):
        aggregate_adapters([one, client(wider, tmp_path, 3, r=2)])


def test_a_folder_that_holds_no_adapter(pair: list[Path], tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere is no folder: name the folder of a saved adapter"):
        aggregate_adapters([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        aggregate_adapters([tmp_path])
    (tmp_path / "adapter_config.json").write_text((pair[0] / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors; pickled weights are not read"):
        aggregate_adapters([tmp_path])
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="cannot read the adapter in"):
        aggregate_adapters([tmp_path])


def test_layers_for_which_a_method_would_be_wrong(tmp_path: Path):
    dora = [client(KINDS["linear with DoRA"], tmp_path, number) for number in range(2)]
    for method in ("fair", "exact"):
        with pytest.raises(ValueError, match=r"lora_magnitude_vector.* is DoRA's"):
            aggregate_adapters(dora, method=method)
    assert any("magnitude" in key for key in aggregate_adapters(dora, method="mean"))
    pissa = client(KINDS["linear"], tmp_path, 3)
    settings = {"init_lora_weights": "pissa"}
    with pytest.raises(ValueError, match="the exact sum has another rank"):
        aggregate_adapters([edited(pissa, tmp_path / "p", settings=settings)], method="exact")
    if "use_bdlora" in LoraConfig.__dataclass_fields__:
        blocks = {"target_modules_bd_a": ["body"], "nblocks": 2}
        with pytest.raises(ValueError, match="'fair' has no meaning"):
            aggregate_adapters([edited(pissa, tmp_path / "b", settings={"use_bdlora": blocks})])
    experts = {"model.experts.lora_A.weight": torch.ones(6, 4), "model.experts.lora_B.weight": torch.ones(3, 6)}
    with pytest.raises(ValueError, match="may hold the factors of several experts"):
        aggregate_adapters([experts])
    with pytest.raises(ValueError, match="belongs to a variant of LoRA"):
        aggregate_adapters([{"model.x.lora_diag": torch.ones(3)}])
    with pytest.raises(ValueError, match="has no LoRA factors"):
        aggregate_adapters([{"model.weight": torch.ones(3)}])


def test_without_flower_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.delitem(sys.modules, "lorapro_hf.federated.strategy", raising=False)
    with pytest.raises(MissingExtraError, match=r"needs Flower.*\[flower\]"):
        from lorapro_hf.federated import LoRAFairStrategy  # noqa: F401


def test_adapters_of_other_kinds_are_named():
    plain, dora = ({f"layer.lora_{key}": torch.ones(2, 2) for key in ("A.weight", "B.weight")} for _ in range(2))
    dora["layer.lora_magnitude_vector.weight"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"adapters\[1\] is a DoRA adapter .* adapters\[0\] is not: set use_dora"):
        aggregate_adapters([plain, dora], method="mean")
    with pytest.raises(TypeError, match=r"adapters\[1\] is a Linear: give get_peft_model_state_dict\(model\), or the"):
        aggregate_adapters([plain, torch.nn.Linear(2, 2)])
