"""Memory of the optimizer: estimates against tensors that are really allocated, and the refusal with its remedies."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from grids import rest_slow
from lora_layers import ROWS, needs_weight_tying, tied_llama
from lorapro_hf import LoRAProConfig, create_lorapro_optimizer, find_lora_pairs
from lorapro_hf.commands.bench.probes import memory_of
from lorapro_hf.config import MODES
from lorapro_hf.optim import memory
from lorapro_hf.optim.memory import StateTooLargeError, available_bytes, require_state_fits, scratch_bytes
from lorapro_hf.optim.memory import _cgroup_available as cgroup_available
from lorapro_hf.optim.memory import state_bytes_by_device as estimate
from lorapro_hf.optim.rules import base, full

CPU, META = torch.device("cpu"), torch.device("meta")
SETTINGS = [*((mode, "float32") for mode in MODES), ("full", "bfloat16")]
all_settings = pytest.mark.parametrize(("mode", "moments_dtype"), SETTINGS)
KIB = 1024


@pytest.fixture(autouse=True)
def _round_working_memory(request, monkeypatch):
    """Four copies of the factors and no tile, unless a test is about the allowance itself: counts that can be read."""
    if "allowance" not in request.node.name:
        monkeypatch.setattr(base, "_WORKING_COPIES", 4)
        monkeypatch.setattr(full, "_TILE_ARRAYS", 0)


def four_layers(dtype: torch.dtype = torch.float32):
    """Rows of 300 and 512 elements have a short last block and several whole ones; one layer is wholly trained."""
    body = nn.Sequential(nn.Linear(300, 40), nn.Linear(40, 16), nn.Linear(16, 512), nn.Linear(512, 4), nn.LayerNorm(4))
    ranks = {"r": 2, "rank_pattern": {"1": 3, "2": 5}, "target_modules": ["0", "1", "2", "3"]}
    return get_peft_model(body, LoraConfig(**ranks, modules_to_save=["4"])).to(dtype)


def one_layer():
    """Needs, working memory of 96 KiB included: 4.1, 2.1 and 1.1 MiB for the dense moments, then 126 and 144 KiB."""
    return get_peft_model(nn.Sequential(nn.Linear(512, 1024)), LoraConfig(r=4, target_modules=["0"]))


def two_layers(elsewhere: torch.device):
    """One layer here, a larger one on another device."""
    layers = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 128))
    model = get_peft_model(layers, LoraConfig(r=4, target_modules=["0", "1"]))
    model.base_model.model[1].to(elsewhere)
    return model


def allocated(pair, mode: str, moments_dtype: str) -> int:
    """Bytes of the tensors that a mode keeps of a pair, derived from the dense weight that the pair moves."""
    A, B = pair.matrix_A(pair.A).detach(), pair.matrix_B(pair.B).detach()
    weight = B @ A
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if mode == "full":
        kept = [weight.to(torch.bfloat16 if moments_dtype == "bfloat16" else exact)] * 2
    elif mode == "full_8bit":
        scales = torch.stack([block.abs().amax(-1) for block in weight.split(256, dim=-1)], dim=-1)
        kept = [weight.to(torch.uint8), scales.float()] * 2
    elif mode == "factored":
        kept = [A.to(exact), weight.to(exact).sum(-2), B.to(exact), weight.to(exact).sum(-1)]
    elif mode == "spectral":
        kept = [A.to(exact), B.to(exact)]
    elif mode == "rite":
        kept = [A.to(exact), B.to(exact), *[(A @ A.mT).double()] * 2]
    else:
        assert mode == "efficient"
        kept = [A.to(exact), B.to(exact)] * 2
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def others_of(model: nn.Module):
    factors = {id(factor) for pair in find_lora_pairs(model) for factor in (pair.A, pair.B, *pair.tied_parameters)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in factors]


@all_settings
@pytest.mark.parametrize("dtype", rest_slow([torch.bfloat16, torch.float32, torch.float64]), ids=str)
def test_bytes_are_those_of_allocated_tensors(mode: str, moments_dtype: str, dtype: torch.dtype):
    model = four_layers(dtype)
    pairs = find_lora_pairs(model)
    config = LoRAProConfig(mode=mode, moments_dtype=moments_dtype)
    expected = sum(allocated(pair, mode, moments_dtype) for pair in pairs)
    assert estimate(pairs, config) == {CPU: expected}
    # weight and bias of a LayerNorm of 4, two moments of each in the dtype of the parameter
    assert estimate(pairs, config, others_of(model)) == {CPU: expected + 2 * 8 * dtype.itemsize}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bytes_of_every_kind_of_layer(row):
    pairs = find_lora_pairs(row.build())
    for mode, moments_dtype in SETTINGS:
        expected = sum(allocated(pair, mode, moments_dtype) for pair in pairs)
        assert estimate(pairs, LoRAProConfig(mode=mode, moments_dtype=moments_dtype)) == {CPU: expected}


@pytest.mark.parametrize(
    "build", [four_layers, pytest.param(tied_llama, marks=needs_weight_tying)], ids=["four layers", "tied embeddings"]
)
@all_settings
def test_bytes_are_those_of_a_stepped_optimizer(build, mode: str, moments_dtype: str):
    model = build()
    optimizer = create_lorapro_optimizer(model, lr=1e-3, config=LoRAProConfig(mode=mode, moments_dtype=moments_dtype))
    inputs = torch.randn(6, 300) if build is four_layers else {"input_ids": torch.arange(12).view(2, 6)}
    out = model(inputs) if build is four_layers else model(**inputs).logits
    out.square().mean().backward()
    optimizer.step()
    kept = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    measured = sum(value.numel() * value.element_size() for value in kept)
    assert estimate(optimizer.pairs, optimizer.config, others_of(model)) == {CPU: measured}


def test_small_states_of_a_7b_block():
    with META:
        layers = {"q": (4096, 4096), "gate": (4096, 11008), "down": (11008, 4096)}
        body = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in layers.items()})
        pairs = find_lora_pairs(get_peft_model(body, LoraConfig(r=8, target_modules=list(layers))))
    factors = 8 * (2 * 4096 + 2 * (4096 + 11008))
    assert estimate(pairs, LoRAProConfig(mode="spectral"))[META] <= 0.52 * (8 * factors)  # AdamW's moments of LoRA
    elements = 4096 * 4096 + 2 * 4096 * 11008
    assert estimate(pairs, LoRAProConfig(mode="full")) == {META: 8 * elements}
    assert 2 * elements < estimate(pairs, LoRAProConfig(mode="full_8bit"))[META] <= 2.1 * elements


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.bfloat16, 4), (torch.float32, 4), (torch.float64, 8)], ids=str)
def test_working_memory_is_four_copies_of_the_factors(dtype: torch.dtype, itemsize: int):
    elements = 2 * (300 + 40) + 3 * (40 + 16) + 5 * (16 + 512) + 2 * (512 + 4)
    assert scratch_bytes(find_lora_pairs(four_layers(dtype)), LoRAProConfig()) == {CPU: 4 * elements * itemsize}


def test_bytes_are_counted_by_device():
    model = two_layers(META)
    pairs = find_lora_pairs(model)
    other = nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))
    assert estimate(pairs, LoRAProConfig(mode="full"), [other]) == {CPU: 8 * 64 * 32 + 40, META: 8 * 32 * 128}
    assert estimate(pairs, LoRAProConfig(mode="efficient")) == {CPU: 8 * 4 * 96, META: 8 * 4 * 160}
    assert scratch_bytes(pairs, LoRAProConfig()) == {CPU: 16 * 4 * 96, META: 16 * 4 * 160}


def set_free(monkeypatch: pytest.MonkeyPatch, **free: int | None) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: free[device.type])


@pytest.mark.parametrize(
    ("free", "config", "expected"),
    [
        (
            3000 * KIB,
            {"mode": "full"},
            "The optimizer state of mode='full', with a step's working memory, needs 4.1 MiB on cpu, where 2.9 MiB are "
            "free. Modes that fit: 'full' with moments_dtype='bfloat16' (2.1 MiB), 'full_8bit' (1.1 MiB), 'factored' "
            "(126.0 KiB), 'spectral' (120.0 KiB, with learning rates of LoRA), 'rite' (120.2 KiB, with learning rates "
            "of LoRA), 'efficient' (144.0 KiB, with learning rates of LoRA). Choose one with "
            "LoRAProConfig(mode=...) or --lora_pro_mode, adapt fewer layers (target_modules), or turn this check off "
            "with check_memory=False (in the arguments lora_pro_check_memory=False).",
        ),
        (
            1200 * KIB,
            {"mode": "full", "moments_dtype": "bfloat16"},
            "mode='full' with moments_dtype='bfloat16', with a step's working memory, needs 2.1 MiB on cpu, where "
            "1.2 MiB are free. Modes that fit: 'full_8bit' (1.1 MiB), 'factored' (126.0 KiB), 'spectral' (120.0 KiB, ",
        ),
        (
            130 * KIB,
            {"mode": "efficient"},
            "Modes that fit: 'factored' (126.0 KiB), 'spectral' (120.0 KiB, with learning rates of LoRA), 'rite' "
            "(120.2 KiB, with learning rates of LoRA). Choose",
        ),
        (
            100 * KIB,
            {"mode": "factored"},
            "needs 126.0 KiB on cpu, where 100.0 KiB are free. No mode fits; the smallest, 'spectral', needs "
            "120.0 KiB. Adapt fewer layers (target_modules), choose a smaller r, free memory on it, or turn this "
            "check off with check_memory=False (in the arguments lora_pro_check_memory=False).",
        ),
    ],
    ids=["full", "full in bfloat16", "efficient", "factored"],
)
def test_refusal_names_the_modes_that_fit(monkeypatch, free: int, config: dict[str, str], expected: str):
    set_free(monkeypatch, cpu=free)
    with pytest.raises(StateTooLargeError) as caught:
        require_state_fits(find_lora_pairs(one_layer()), LoRAProConfig(**config))
    assert expected in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@all_settings
def test_refusal_starts_at_the_first_missing_byte(monkeypatch, mode: str, moments_dtype: str):
    model = four_layers()
    pairs, config = find_lora_pairs(model), LoRAProConfig(mode=mode, moments_dtype=moments_dtype)
    state = sum(allocated(pair, mode, moments_dtype) for pair in pairs) + 2 * 8 * 4
    need = state + 4 * sum(pair.A.nbytes + pair.B.nbytes for pair in pairs)
    set_free(monkeypatch, cpu=need)
    require_state_fits(pairs, config, others_of(model))
    set_free(monkeypatch, cpu=need - 1)
    with pytest.raises(StateTooLargeError):
        require_state_fits(pairs, config, others_of(model))
    require_state_fits(pairs, config)  # without the others there is room


def test_refusal_names_every_device_that_is_short(monkeypatch):
    pairs = find_lora_pairs(two_layers(META))
    set_free(monkeypatch, cpu=10 * KIB, meta=20 * KIB)  # the state alone: 16 KiB and 32 KiB; efficient 3 and 5
    with pytest.raises(StateTooLargeError) as caught:
        require_state_fits(pairs, LoRAProConfig(mode="full"))
    assert "needs 22.0 KiB on cpu, where 10.0 KiB are free, and 42.0 KiB on meta, where 20.0 KiB are" in str(
        caught.value
    )
    others = "'factored' (21.0 KiB), 'spectral' (20.0 KiB, with learning rates of LoRA), 'rite' (20.5 KiB"
    assert f"Modes that fit (all devices together): {others}" in str(caught.value)


def test_a_mode_fits_only_if_it_fits_on_every_device(monkeypatch):
    pairs = find_lora_pairs(two_layers(META))
    set_free(monkeypatch, cpu=100 * KIB, meta=10 * KIB)  # all that is short is the second device
    with pytest.raises(StateTooLargeError, match=r"needs 42\.0 KiB on meta, where 10\.0 KiB are free\. No mode fits"):
        require_state_fits(pairs, LoRAProConfig(mode="full"))


def test_a_device_of_unknown_size_is_not_refused(monkeypatch):
    pairs = find_lora_pairs(two_layers(META))
    set_free(monkeypatch, cpu=23 * KIB, meta=None)
    require_state_fits(pairs, LoRAProConfig(mode="full"))
    set_free(monkeypatch, cpu=21 * KIB, meta=None)
    with pytest.raises(StateTooLargeError, match=r"needs 22\.0 KiB on cpu"):
        require_state_fits(pairs, LoRAProConfig(mode="full"))


def test_this_machine_has_room_for_a_small_model_and_none_for_a_petabyte():
    pairs = find_lora_pairs(one_layer())
    require_state_fits(pairs, LoRAProConfig(mode="full"))
    with pytest.raises(StateTooLargeError, match="No mode fits"):
        require_state_fits(pairs, LoRAProConfig(mode="full"), [torch.empty(1).expand(2**47)])


def test_available_on_the_cpu_is_what_system_and_limits_leave(monkeypatch):
    assert 0 < available_bytes(CPU) < psutil.virtual_memory().total
    monkeypatch.setattr(memory, "_cgroup_available", lambda: 12345)
    assert available_bytes(CPU) == 12345
    monkeypatch.setattr(memory, "_cgroup_available", lambda: 2**62)
    assert available_bytes(CPU) < psutil.virtual_memory().total


def test_available_without_psutil(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(memory, "_cgroup_available", lambda: None)
    assert available_bytes(CPU) is None
    monkeypatch.setattr(memory, "_cgroup_available", lambda: 12345)
    assert available_bytes(CPU) == 12345


def test_available_on_cuda_counts_what_the_allocator_holds_unused(monkeypatch):
    devices = []

    def fake(result):
        return lambda device: (devices.append(device), result)[1]

    monkeypatch.setattr(torch.cuda, "mem_get_info", fake((1000, 8000)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", fake(700))
    monkeypatch.setattr(torch.cuda, "memory_allocated", fake(500))
    assert available_bytes(torch.device("cuda", 1)) == 1200
    assert devices == [torch.device("cuda", 1)] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_available_on_a_cuda_device_falls_by_what_is_allocated():
    device = torch.device("cuda", 0)
    kept = torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
    before = available_bytes(device)
    more = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    taken = before - available_bytes(device)
    del more  # stays in the allocator's cache
    assert taken == pytest.approx(256 * 2**20, rel=0.1)
    assert available_bytes(device) == pytest.approx(before, abs=32 * 2**20)
    assert kept.nbytes < before


def test_available_elsewhere_is_unknown():
    assert available_bytes(META) is None
    assert available_bytes(torch.device("mps")) is None


def write_group(folder: Path, files: tuple[str, str], limit: str, usage: int, stat: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / files[0]).write_text(f"{limit}\n")
    (folder / files[1]).write_text(f"{usage}\n")
    if stat is not None:
        (folder / "memory.stat").write_text(stat)


V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
UNLIMITED_V1 = "9223372036854771712"


def read_groups(root: Path, membership: str) -> int | None:
    (root / "membership").write_text(membership)
    return cgroup_available(root / "membership", root)


def test_cgroup_v2_limit_counts_droppable_caches_as_free(tmp_path: Path):
    write_group(tmp_path / "slice/job", V2, "1000", 600, "anon 250\ninactive_file 150\nactive_file 200\n")
    assert read_groups(tmp_path, "0::/slice/job\n") == 550


def test_cgroup_v2_takes_the_tightest_limit_on_the_way_up(tmp_path: Path):
    write_group(tmp_path / "slice/job", V2, "max", 600, "inactive_file 150\n")
    assert read_groups(tmp_path, "0::/slice/job\n") is None
    write_group(tmp_path / "slice", V2, "2000", 900, "inactive_file 100\n")
    assert read_groups(tmp_path, "0::/slice/job\n") == 1200
    write_group(tmp_path / "slice/job", V2, "1000", 600, "inactive_file 150\n")
    assert read_groups(tmp_path, "0::/slice/job\n") == 550


def test_cgroup_v1_reads_the_memory_controller_alone(tmp_path: Path):
    membership = "9:cpu,cpuacct:/other\n4:memory:/job\n1:name=systemd:/job\n0::/job\n"
    statistics = "inactive_file 1\ntotal_inactive_file 50\n"
    write_group(tmp_path / "memory/other", V1, "1", 0, "")
    write_group(tmp_path / "memory/job", V1, "1000", 900, statistics)
    write_group(tmp_path / "memory", V1, UNLIMITED_V1, 5000, statistics)
    assert read_groups(tmp_path, membership) == 150
    write_group(tmp_path / "memory/job", V1, UNLIMITED_V1, 900, statistics)
    assert read_groups(tmp_path, membership) is None


@pytest.mark.parametrize("path", ["/docker/0123", "/../../host.slice"])
def test_cgroup_path_of_the_host_falls_back_to_the_mount(tmp_path: Path, path: str):
    write_group(tmp_path / "group/memory", V1, "1000", 400, "")
    write_group(tmp_path / "host.slice", V1, "7", 0, "")  # outside of the mount
    assert read_groups(tmp_path / "group", f"4:memory:{path}\n") == 600


def test_cgroup_without_statistics_counts_no_caches(tmp_path: Path):
    write_group(tmp_path, V2, "1000", 600, None)
    assert read_groups(tmp_path, "0::/\n") == 400


def test_cgroup_over_its_limit_leaves_nothing(tmp_path: Path):
    write_group(tmp_path, V2, "1000", 1200, "")
    assert read_groups(tmp_path, "0::/\n") == 0


def test_no_cgroups_no_limit(tmp_path: Path):
    assert cgroup_available(tmp_path / "missing", tmp_path) is None
    assert read_groups(tmp_path, "0::/\n") is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("torch_steps")
def test_allowance_covers_what_a_step_takes(mode):
    """Peak of live tensors in a third step beyond what lives before it, on a model of one shape.

    The C++ kernel takes less, and none of it in tensors.
    """
    torch.manual_seed(0)
    layers = nn.ModuleDict({f"layer{i}": nn.Linear(300, 260, bias=False) for i in range(6)})
    model = get_peft_model(layers, LoraConfig(r=4, target_modules=list(layers), init_lora_weights=False))
    backend = "torch" if mode.startswith("full") else "auto"
    optimizer = create_lorapro_optimizer(model, lr=1e-3, config={"mode": mode, "backend": backend})
    for _ in range(2):
        for pair in optimizer.pairs:
            pair.A.grad, pair.B.grad = torch.randn_like(pair.A), torch.randn_like(pair.B)
        optimizer.step()
    probe = memory_of(optimizer.step, torch.device("cpu"))
    allowed = sum(scratch_bytes(optimizer.pairs, optimizer.config).values())
    assert allowed / 20 < probe.peak <= allowed
