"""What a step costs, told by the operators it runs: no wait for the device, nothing of the size of the weight."""

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from grids import rest_slow
from lorapro_hf import LoRAProAdamW, LoRAProConfig, create_lorapro_optimizer, find_lora_pairs
from lorapro_hf.config import MODES
from lorapro_hf.functional import reference
from lorapro_hf.kernels import dense
from lorapro_hf.optim import lora_pro
from optimizer_helpers import longest_step

# The operators of torch tell what a step costs on CUDA; the C++ kernels are no operators.
pytestmark = pytest.mark.usefixtures("torch_steps")

# Sizes that no other quantity has; the weight is larger than the factors and the tiles.
M, N, R = 96, 200, 4
TILE = 2**12
CONFIGS = [
    *({"mode": mode} for mode in MODES),
    {"mode": "full", "update": "sequential", "trust_region": 0.03},
    {"mode": "full_8bit", "update": "sequential"},
    {"mode": "full", "moments_dtype": "bfloat16", "trust_region": 0.03},
    {"mode": "factored", "update": "linear", "trust_region": 0.03},
    {"mode": "efficient", "update": "sequential"},
    {"mode": "full", "trust_region": 0},
    {"mode": "factored", "trust_region": 0},
]


# The kernels of torch stand for those of devices: the host sees no operator of the kernel in C++.
CONFIGS = [{**c, "backend": "torch"} if c["mode"].startswith("full") else c for c in CONFIGS]


def name_of(config):
    return "-".join(map(str, config.values()))


each_config = pytest.mark.parametrize("config", CONFIGS, ids=name_of)
DENSE = [c for c in CONFIGS if c["mode"].startswith("full")]
with_dense_moments = pytest.mark.parametrize("config", DENSE, ids=name_of)

# Each of these lets the host know a value, or gives a result whose size depends on values: on CUDA the host waits.
WAITING = {
    "_local_scalar_dense",
    "is_nonzero",
    "item",
    "equal",
    "allclose",
    "nonzero",
    "nonzero_static",
    "argwhere",
    "masked_select",
    "unique",
    "unique_dim",
    "unique_consecutive",
    "_unique",
    "_unique2",
    "bincount",
    "histc",
    "index",  # by a mask it is nonzero
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_linalg_check_errors",
    "_linalg_svd",
    "linalg_qr",
    "linalg_inv_ex",
    "_linalg_solve_ex",
    "linalg_cholesky_ex",
    "_linalg_eigh",
    "lift_fresh",  # torch.tensor: a copy of the host's numbers to the device
}
# On CUDA the eigensolver is a Triton kernel that reports nothing to the host; LAPACK stands for it on the CPU.
STAND_INS = {"_linalg_eigh"}
# Which pairs have no gradient is known to the host, and copied from pinned memory without waiting.
OF_SOME = {"lift_fresh"}


class Record(TorchDispatchMode):
    """The names of the operators that ran, all and but for views, and the tensors they returned."""

    def __init__(self):
        super().__init__()
        self.names, self.results, self.launched = [], [], Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace != "profiler":
            self.names.append(function.__name__.split(".")[0])
            aliases = [returned.alias_info for returned in function._schema.returns]
            if not any(alias is not None and not alias.is_write for alias in aliases):
                self.launched[str(function)] += 1
            flat = out if isinstance(out, tuple | list) else [out]
            self.results += [(self.names[-1], x) for x in flat if isinstance(x, torch.Tensor)]
        return out


def build(layers=2, config=None, **options):
    body = nn.Sequential(*(nn.Linear(N, M, bias=False) for _ in range(layers)))
    settings = {"r": R, "target_modules": [str(i) for i in range(layers)], "init_lora_weights": False}
    return create_lorapro_optimizer(get_peft_model(body, LoraConfig(**settings)), lr=1e-3, config=config, **options)


def give_gradients(optimizer, without=()):
    for index, pair in enumerate(optimizer.pairs):
        for factor in (pair.A, pair.B):
            factor.grad = None if index in without else torch.randn_like(factor)


def third_step(optimizer, without=(), poisoned=False):
    """A record of the third step: the first two allocate and settle."""
    for _ in range(2):
        give_gradients(optimizer)
        optimizer.step()
    give_gradients(optimizer, without)
    if poisoned:
        optimizer.pairs[0].A.grad[0, 0] = float("nan")
    with Record() as record:
        optimizer.step()
    return record


@each_config
@pytest.mark.parametrize(
    ("without", "poisoned"), [((), False), pytest.param((), True, marks=pytest.mark.slow), ((1,), True)]
)
def test_no_step_waits_for_the_device(config, without, poisoned, monkeypatch):
    monkeypatch.setattr(lora_pro, "can_be_read", lambda tensor: False)  # as for tensors on CUDA
    optimizer = build(3, config, weight_decay=0.1)
    record = third_step(optimizer, without, poisoned)
    assert optimizer.skipped_steps == poisoned
    assert set(record.names) & WAITING <= STAND_INS | (OF_SOME if without else set())
    assert {"_linalg_eigh", "_foreach_copy_"} <= set(record.names)  # the record is that of a step


def test_the_record_sees_what_would_wait():
    with Record() as record:
        x = torch.tensor([0.0, 1.0, 2.0])
        x[x > 1] = float(x.sum())
        torch.equal(x, x)
        x.unique()
        x[x > 2]
        if x.any():
            x.tolist()
    assert {"lift_fresh", "_local_scalar_dense", "index_put_", "equal", "_unique2", "index"} <= set(
        record.names
    ) & WAITING


@each_config
def test_no_step_makes_a_tensor_of_the_size_of_the_weight(config, monkeypatch):
    """Beside the dense moments there are factors, twice them side by side, and tiles."""
    monkeypatch.setattr(dense, "_CPU_ELEMENTS", TILE)
    layers = 2
    optimizer = build(layers, config)
    record = third_step(optimizer)
    kept = {view.untyped_storage().data_ptr() for state in optimizer.state.values() for view in state.values()}
    made = [
        (x.numel(), name, tuple(x.shape)) for name, x in record.results if x.untyped_storage().data_ptr() not in kept
    ]
    bound = layers * 2 * R * N
    if config["mode"].startswith("full"):
        padded = -(-N // 256) * 256 if config["mode"] == "full_8bit" else N
        bound = max(bound, TILE // N * padded)
    assert bound < M * M < M * N
    assert max(made)[0] <= bound, max(made)
    assert max(made)[0] >= layers * R * N  # factors have been seen


@pytest.mark.parametrize("config", [c for c in CONFIGS if not c["mode"].startswith("full")], ids=str)
@pytest.mark.parametrize("without", [(), (1,)], ids=["all", "some"])
def test_layers_of_one_shape_cost_no_more_operators(config, without):
    """Views aside, which run nothing on a device; a `foreach` operator on many tensors counts as one."""
    few, many = (third_step(build(layers, config), without).launched for layers in (2, 6))
    assert few == many and few.total() > 50


@pytest.mark.parametrize("config", rest_slow(DENSE, fast=2), ids=name_of)
def test_operators_of_dense_moments_grow_with_the_tiles_alone(config, monkeypatch):
    """An unsplit tile takes several layers at once; of split ones each costs as many operators as any other."""
    tiles_of = dense._tiles
    made = []

    def counted(*args):
        for tile in tiles_of(*args):
            made.append(tile)
            yield tile

    monkeypatch.setattr(dense, "_tiles", counted)
    halved = 2 if config["mode"] == "full_8bit" else 1  # tiles of 8-bit moments have half as many elements

    def cost(layers, elements):
        monkeypatch.setattr(dense, "_CPU_ELEMENTS", halved * elements)
        optimizer = build(layers, config)
        made.clear()
        launched = third_step(optimizer).launched.total()
        assert len(made) % 3 == 0
        return len(made) // 3, launched

    assert cost(2, 6 * M * N) == cost(6, 6 * M * N)
    rows = M // 4
    (two, of_two), (four, of_four), (six, of_six) = (cost(layers, rows * N) for layers in (2, 4, 6))
    assert (two, four, six) == (8, 16, 24)
    of_tile = (of_six - of_four) / (six - four)
    assert of_tile == (of_four - of_two) / (four - two) and 0 < of_tile < 90


def train_on_full_gradients(config):
    """Ten steps from B = 0 along full gradients that are the same for any configuration; gives `s B A` of two pairs."""
    torch.manual_seed(3)
    body = nn.Sequential(*(nn.Linear(40, 24, bias=False) for _ in range(2)))
    model = get_peft_model(body, LoraConfig(r=R, lora_alpha=6, target_modules=["0", "1"]))
    pairs = find_lora_pairs(model)
    optimizer = create_lorapro_optimizer(model, config=config, lr=1e-3)
    for _ in range(10):
        for pair in pairs:
            give(pair, torch.randn(24, 40, dtype=torch.float64))
        optimizer.step()
    return torch.stack([(pair.scaling * pair.B @ pair.A).detach() for pair in pairs])


def give(pair, g):
    """The gradients of the factors that the full gradient `g` `(m, n)` leads to."""
    g, s = g.to(pair.A), pair.scaling
    pair.A.grad, pair.B.grad = s * pair.B.detach().mT @ g, s * g @ pair.A.detach().mT


@pytest.mark.parametrize(
    ("config", "tolerance"), [({"mode": "full", "moments_dtype": "bfloat16"}, 0.003), ({"mode": "full_8bit"}, 0.02)]
)
@pytest.mark.parametrize("update", ["linear", "sequential"])
def test_smaller_moments_follow_the_full_ones(config, tolerance, update):
    full = train_on_full_gradients({"mode": "full", "update": update})
    found = train_on_full_gradients({**config, "update": update})
    assert 1e-5 < (found - full).norm() / full.norm() < tolerance


@pytest.mark.parametrize("init", [True, False], ids=["from B = 0", "from random factors"])
@pytest.mark.parametrize(("lr_A", "lr_B"), rest_slow([(0.01, 0.04), (0.02, 0.02)]), ids=["a rate for B", "one rate"])
@pytest.mark.parametrize("weight_decay", rest_slow([0.5, 0.0]))
@pytest.mark.parametrize("trust_region", [0, 0.005])
def test_sequential_steps_of_full_mode_move_the_weight_as_meant(init, lr_A, lr_B, weight_decay, trust_region):
    """`s (B'A' − BA)`, with decayed B and A, is `−[lr_B u P_A + lr_A P_B' u (I − P_A)]` for Adam's own dense u."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(13, 9), nn.Linear(9, 13), nn.Linear(13, 9)),
        LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1", "2"], init_lora_weights=init),
    ).double()
    pairs = find_lora_pairs(model)
    groups = [
        {"params": [pair.A for pair in pairs], "lr": lr_A},
        {"params": [pair.B for pair in pairs], "lr": lr_B, "weight_decay": weight_decay},
    ]
    config = LoRAProConfig(mode="full", update="sequential", trust_region=trust_region)
    optimizer = LoRAProAdamW(groups, pairs, betas=(0.8, 0.95), eps=1e-7, weight_decay=weight_decay, config=config)
    keep_A, keep_B = ((1 - lr * weight_decay) ** 0.5 for lr in (lr_A, lr_B))
    moments = [(0.0, 0.0)] * 3
    for step in range(1, 6):
        before, directions = [], []
        for index, pair in enumerate(pairs):
            A, B = pair.A.detach().clone(), pair.B.detach().clone()
            g = torch.randn(len(B), A.shape[1], dtype=torch.float64)
            give(pair, g)
            projected = reference.projected_gradient(g, A, B)
            M, V = moments[index]
            M, V = moments[index] = 0.8 * M + 0.2 * projected, 0.95 * V + 0.05 * projected**2
            directions.append(M / (1 - 0.8**step) / ((V / (1 - 0.95**step)).sqrt() + 1e-7))
            before.append((A, B))
        optimizer.step()
        for pair, (A, B), u in zip(pairs, before, directions, strict=True):
            longest = longest_step(pair, trust_region)
            new_A, new_B = reference.sequential_step(
                u, A, B, pair.scaling, lr_A, lr_B, keep=(keep_A, keep_B), longest=longest
            )
            torch.testing.assert_close(pair.A.detach(), new_A, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(pair.B.detach(), new_B, rtol=1e-8, atol=1e-9)
            moved = pair.scaling * (pair.B @ pair.A - keep_B * keep_A * B @ A).detach()
            if longest is not None:
                assert torch.linalg.matrix_norm(moved, 2) <= 1.01 * longest
                continue
            inside = u @ torch.linalg.pinv(A) @ A
            P_B = pair.B @ torch.linalg.pinv(pair.B)
            expected = -(lr_B * inside + lr_A * P_B @ (u - inside))
            assert (moved - expected).norm() <= 1e-8 * u.norm() * lr_A
