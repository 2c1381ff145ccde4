"""The size of the frozen weights beside the pairs, whole, quantised and sharded."""

import importlib.util

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_layers import ALL_ROWS, ROWS, tied_llama
from lorapro_hf import create_lorapro_optimizer, find_lora_pairs
from lorapro_hf.distributed.base_weights import bulk_edges
from optimizer_helpers import LINEAR, backward, small_model
from processes import run
from training import assert_close
from zero_helpers import engine_of, lorapro
from zero_helpers import run as run_zero

BY_NAME = {row.name: row for row in ALL_ROWS}
# The matrices that the pairs move: their number, m and n, and the name of the stored weight.
LAYOUTS = {
    "linear": [(1, 5, 6, "weight")],
    "Conv1D of GPT-2": [(1, 5, 6, "weight")],
    "embedding": [(1, 6, 11, "weight")],
    "Conv2d": [(1, 6, 36, "weight")],
    "Conv2d with groups": [(2, 3, 18, "weight")],
    "MultiheadAttention": [(1, 18, 6, "in_proj_weight"), (1, 6, 6, "weight")],
    "experts (in, out)": [(3, 5, 6, "weight")],
    "experts (out, in)": [(3, 5, 6, "weight")],
    "two expert parameters of one module": [(3, 4, 5, "down"), (3, 5, 6, "up")],
}


def edge(matrix, m, n):
    return float(matrix.norm()) * (m**-0.5 + n**-0.5)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_edge_is_that_of_each_matrix_that_a_pair_moves(name, dtype):
    if name not in {row.name for row in ROWS}:
        pytest.skip("this PEFT has no such layer")
    pairs = find_lora_pairs(BY_NAME[name].build().to(dtype))
    found = bulk_edges(pairs)
    for pair, edges, (batch, m, n, stored) in zip(pairs, found, LAYOUTS[name], strict=True):
        weight = getattr(pair.layer.get_base_layer(), stored).detach().double().reshape(batch, -1)
        assert edges.dtype == torch.float64 and edges.tolist() == pytest.approx([edge(w, m, n) for w in weight])
        assert weight.shape[1] == m * n


@pytest.mark.parametrize("name", ["4-bit base", "8-bit base"])
@pytest.mark.parametrize("has_stepped", [False, True])
def test_a_quantised_weight_is_dequantised(name, has_stepped):
    pytest.importorskip("bitsandbytes")
    model = BY_NAME[name].build()
    if has_stepped:
        BY_NAME[name].loss(model).backward()
    (pair,) = find_lora_pairs(model)
    with torch.no_grad():
        weight = pair.layer.get_base_layer()(torch.eye(64))
    assert float(bulk_edges([pair])[0]) == pytest.approx(edge(weight, 32, 64), rel=1e-3)


class Coded(nn.Module):
    """A quantised layer of a library that is not known."""

    in_features, out_features = 6, 5

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randint(-5, 6, (5, 6), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(5))
        self.bias = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x):
        return x @ (self.codes * self.scales[:, None]).T + self.bias


def coded(pair, layer):
    pair.layer.base_layer = layer
    return pair


def test_any_quantised_layer_that_multiplies_is_read_through_its_products():
    (pair,) = find_lora_pairs(LINEAR.build())
    layer = Coded()
    weight = layer.codes * layer.scales[:, None]
    assert float(bulk_edges([coded(pair, layer)])[0]) == pytest.approx(edge(weight, 5, 6), rel=1e-5)


def test_tied_layers_and_residuals_have_one_size():
    pairs = find_lora_pairs(tied_llama())
    weight = pairs[0].layer.get_base_layer().weight
    assert [float(each) for each in bulk_edges(pairs)] == pytest.approx([edge(weight, 16, 23)])
    before = LINEAR.model().body.weight
    (pair,) = find_lora_pairs(LINEAR.build(init_lora_weights="pissa"))
    residual = pair.layer.get_base_layer().weight
    assert float(bulk_edges([pair])[0]) == pytest.approx(edge(residual, 5, 6))
    assert residual.shape == before.shape


class Unknown(nn.Module):
    weight = None


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(6, 5, device="meta"), r"\(Linear\) is not loaded, or offloaded"),
        (Unknown(), r"\(Unknown\) has a format that cannot be read"),
        (nn.Linear(6, 5).requires_grad_(False), r"\(Linear\) is zero or not finite"),
    ],
)
def test_a_weight_without_a_size_is_refused_before_anything_changes(layer, reason):
    model = LINEAR.build()
    optimizer = create_lorapro_optimizer(model, lr=0.1, trust_region=0.04)
    LINEAR.loss(model).backward()
    if layer.weight is not None and layer.weight.device.type == "cpu":
        layer.weight.data.zero_()
    coded(optimizer.pairs[0], layer)
    before = optimizer.pairs[0].B.detach().clone()
    with pytest.raises(ValueError, match=rf"body: its base weight {reason}, .*Set trust_region=0 \(--lora_pro"):
        optimizer.step()
    assert torch.equal(optimizer.pairs[0].B, before)
    optimizer = create_lorapro_optimizer(model, lr=0.1, trust_region=0)
    optimizer.step()
    assert not torch.equal(optimizer.pairs[0].B, before)


def test_the_weights_are_read_once(monkeypatch):
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=0.1, trust_region=0.04)
    backward(model)
    optimizer.step()
    monkeypatch.setattr("lorapro_hf.optim.held_pairs.bulk_edges", lambda pairs: pytest.fail("read again"))
    backward(model)
    optimizer.step()


def named_edges(model):
    pairs = find_lora_pairs(model)
    return {pair.name.replace("module.", ""): edges for pair, edges in zip(pairs, bulk_edges(pairs), strict=True)}


def models():
    """Linear layers, three experts that two ranks part unevenly, and convolutions of two groups."""
    torch.manual_seed(3)
    return [small_model(torch.bfloat16), *(BY_NAME[name].build() for name in SHARDED)]


def quantised(names=("4-bit base", "8-bit base")):
    """As FSDP can shard them: not in 8 bits."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return []
    torch.manual_seed(4)
    return [BY_NAME[name].build() for name in names]


def by_shards(rank, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    return [named_edges(fully_shard(model, mesh=mesh)) for model in [*models(), *quantised(("4-bit base",))]]


def by_parts(rank, ranks):
    found = []
    for model in [small_model(), *quantised()]:
        engine = engine_of(model, lorapro(model), stage=3)
        found.append(named_edges(engine.module))
        engine.destroy()
    return found


SHARDED = [name for name in ("experts (in, out)", "Conv2d with groups") if name in {row.name for row in ROWS}]


@pytest.mark.distributed
def test_the_edges_of_sharded_weights_are_those_of_one_process(tmp_path):
    expected = [named_edges(model) for model in [*models(), *quantised(("4-bit base",))]]
    for found in run(by_shards, 2, tmp_path):
        for of_model, of_one in zip(found, expected, strict=True):
            assert_close(of_model, of_one, 1e-12)


@pytest.mark.distributed
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_the_edges_of_weights_that_zero_has_partitioned_are_those_of_one_process(tmp_path):
    expected = [named_edges(model) for model in [small_model(), *quantised()]]
    for found in run_zero(by_parts, 2, tmp_path):
        for of_model, of_one in zip(found, expected, strict=True):
            assert_close(of_model, of_one, 1e-12)
