"""DeepSpeed's ZeRO 1, 2 and 3 take the steps of one process; their checkpoints resume on any number of processes."""

import importlib.util
import shutil
import sys

import pytest
import torch

from training import STEPS, assert_close, assert_differ, batches, build, config_of, loss_of, make_optimizer, share
from training import result as result_of
from training import train as train_alone
from zero_helpers import configuration, launch, lorapro, message_of, result, run, train, trained

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="DeepSpeed runs on Linux"),
]

STAGES = (1, 2, 3)
BF16 = {"enabled": True}
FOREMOST = ("spectral", "full", "factored", "efficient")  # the modes that meet every stage


def single(config, model_settings=None, **options):
    """One process without DeepSpeed."""
    model = build(torch.float32, **(model_settings or {}))
    train_alone(model, make_optimizer(model, config), dtype=torch.float32, **options)
    return result_of(model)


# What is trained in one set of processes, by name: settings of the engine and of LoRA-Pro.
TRAININGS = {f"{mode} {stage}": (config_of(mode), {"stage": stage}) for mode in FOREMOST for stage in STAGES}
VARIANTS = {
    **{f"accumulated {stage}": ({"mode": "full"}, {"stage": stage, "accumulate": 2}) for stage in STAGES},
    **{f"clipped {stage}": ({"mode": "full"}, {"stage": stage, "clip": 0.05}) for stage in STAGES},
    "full_8bit 2": ({"mode": "full_8bit"}, {"stage": 2}),
    "rite 2": (config_of("rite"), {"stage": 2}),
    "rite 2, repeated": (config_of("rite", shard_states=False), {"stage": 2}),
    "repeated 2": ({"mode": "full", "shard_states": False}, {"stage": 2}),
    "adamw 3": ("adamw", {"stage": 3}),
    "overlapping 1": ({"mode": "full"}, {"stage": 1, "zero_optimization": {"contiguous_gradients": False}}),
    "overlapping 2": ({"mode": "full"}, {"stage": 2, "zero_optimization": {"overlap_comm": True}}),
    "sub-groups 3": (
        {"mode": "full"},
        {"stage": 3, "zero_optimization": {"sub_group_size": 20, "stage3_param_persistence_threshold": 10}},
    ),
}


KINDS = [*((mode, stage) for stage in STAGES for mode in FOREMOST), ("rite", 2)]
CLIPS = {"rite": 0.0}  # of others 0.5
DAMAGED = ("truncated", "missing", "foreign", "mixed", "none")
# What stands for the rest where not everything is run.
FEW = ("full 1", "spectral 2", "clipped 2", "accumulated 3", "full_8bit 2")
FEW_KINDS = [("full", 3), ("spectral", 2)]


def many(rank, ranks, trainings, model_settings):
    return {
        name: trained(rank, ranks, config, model_settings=model_settings, **settings)
        for name, (config, settings) in trainings.items()
    }


def few(rank, ranks, folder):
    trainings = {**TRAININGS, **VARIANTS}
    return {
        "trained": many(rank, ranks, {name: trainings[name] for name in FEW}, {}),
        "uneven": uneven(rank, ranks, (2,)),
        "interrupted": interrupted(rank, ranks, folder, FEW_KINDS),
        "resumed": resumed(rank, ranks, folder, FEW_KINDS, damaged=()),
    }


def by_two(rank, ranks, folder):
    return {
        "trained": many(rank, ranks, {**TRAININGS, **VARIANTS}, {}),
        "narrow": narrow(rank, ranks),
        "uneven": uneven(rank, ranks, STAGES),
        "interrupted": interrupted(rank, ranks, folder, KINDS),
    }


def by_one(rank, ranks, folder):
    return {
        "refused": refusals(rank, ranks),
        "resumed": resumed(rank, ranks, folder, KINDS, DAMAGED),
        "saved": saved_by_one(rank, ranks, folder),
    }


def by_two_again(rank, ranks, folder):
    return {"resumed": resumed(rank, ranks, folder, KINDS, DAMAGED), "grown": grown(rank, ranks, folder)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def two(folder):
    """What two processes have found; starting DeepSpeed takes longer than all these trainings."""
    found = run(by_two, 2, folder, str(folder))
    damage(folder)
    return found


@pytest.fixture(scope="module")
def one(folder, two):
    return run(by_one, 1, folder, str(folder))


@pytest.fixture(scope="module")
def two_again(folder, one):
    return run(by_two_again, 2, folder, str(folder))


def test_some_of_it_on_two_processes(tmp_path):
    found = run(few, 2, tmp_path, str(tmp_path))
    assert_equal_one(found, FEW)
    assert_uneven(found, (2,))
    for mode, stage in FEW_KINDS:
        name = f"{mode}{stage}"
        assert_close(found[0]["resumed"][name], found[0]["interrupted"][name], 0)


def assert_equal_one(two, names):
    """Each of the trainings on two processes ends where one process does."""
    plain, full, clipped = single("adamw"), single({"mode": "full"}), single({"mode": "full"}, clip=0.05)
    assert any((full[name] - value).norm() > 1e-4 for name, value in clipped.items())
    trainings = {**TRAININGS, **VARIANTS}
    for name in names:
        config, settings = trainings[name]
        expected = clipped if "clip" in settings else single(config)
        if config != "adamw":
            assert_differ(expected, plain)
        # 8-bit codes turn differences of rounding into differences of a code
        tolerance = 1e-3 if "8bit" in name else 1e-5
        for rank in range(2):
            assert_close(two[rank]["trained"][name], expected, tolerance)


@pytest.mark.slow
def test_two_processes_equal_one(two):
    assert_equal_one(two, [*TRAININGS, *VARIANTS])


@pytest.mark.slow
def test_three_processes_and_rank_1(tmp_path):
    settings = {"r": 1, "modules_to_save": None}
    trainings = {name: TRAININGS[name] for name in ("full 1", "efficient 2", "full 3", "efficient 3")}
    found = run(many, 3, tmp_path, trainings, settings)
    for name, (config, _) in trainings.items():
        expected = single(config, settings)
        for rank in range(3):
            assert_close(found[rank][name], expected, 1e-5)


def narrow(rank, ranks):
    """Parameters in bf16; gradients accumulated in float32 have a class of their own in stage 1."""
    return {
        f"{stage} {dtype}": trained(
            rank, ranks, {"mode": "full"}, stage=stage, bf16=BF16, accumulate=2, data_types={"grad_accum_dtype": dtype}
        )
        for stage, dtype in ((1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"))
    }


@pytest.mark.slow
def test_bf16_stays_near_float32(two):
    expected, start = single({"mode": "full"}), result_of(build(torch.float32))
    for found in two:
        for masters in found["narrow"].values():
            # bf16 has three digits; small biases, which it rounds most, drift furthest
            assert_close(masters, expected, 0.1)
            assert_differ(masters, start)
            assert not any(torch.equal(value, value.bfloat16().float()) for value in masters.values())


def interrupted(rank, ranks, folder, kinds):
    """Saves halfway and goes on."""
    found = {}
    for mode, stage in kinds:
        engine = launch({"mode": mode}, stage=stage, clip=CLIPS.get(mode, 0.5))
        train(engine, rank, ranks, range(5))
        engine.save_checkpoint(f"{folder}/{mode}{stage}", exclude_frozen_parameters=True)
        train(engine, rank, ranks, range(5, STEPS))
        found[f"{mode}{stage}"] = result(engine)
        engine.destroy()
    return found


def resumed(rank, ranks, folder, kinds, damaged):
    """New engines that go on from there, after checkpoints that they have refused."""
    found = {}
    for mode, stage in kinds:
        engine = launch({"mode": mode}, stage=stage, clip=CLIPS.get(mode, 0.5))
        before = result(engine)
        for name in damaged if mode == "full" else ():
            message = message_of(engine.load_checkpoint, f"{folder}/{name}{stage}", load_module_strict=False)
            found[f"{name} {stage}"] = message
        assert all(torch.equal(value, before[name]) for name, value in result(engine).items())
        engine.load_checkpoint(f"{folder}/{mode}{stage}", load_module_strict=False)
        train(engine, rank, ranks, range(5, STEPS))
        found[f"{mode}{stage}"] = result(engine)
        engine.destroy()
    return found


def damage(folder):
    """Copies of the checkpoints with one thing wrong in each."""
    for stage in STAGES:
        for name in DAMAGED:
            shutil.copytree(folder / f"full{stage}", folder / f"{name}{stage}")
        files = {
            name: sorted((folder / f"{name}{stage}" / "global_step5").glob("lora_pro_rank*.safetensors"))
            for name in DAMAGED
        }
        content = files["truncated"][1].read_bytes()
        files["truncated"][1].write_bytes(content[: len(content) // 2])
        files["missing"][1].unlink()
        for file in files["foreign"]:
            file.write_bytes(file.read_bytes().replace(b"base_model.model.0", b"base_model.model.7"))
        file = files["mixed"][0]
        file.write_bytes(file.read_bytes().replace(b'global_steps\\": 5', b'global_steps\\": 4'))
        for file in files["none"]:
            file.unlink()


@pytest.mark.slow
def test_checkpoints_resume_and_damaged_ones_are_refused(two, one, two_again):
    for ranks, tolerance in ((two_again, 0), (one, 1e-6)):
        for found in (rank["resumed"] for rank in ranks):
            for mode, stage in KINDS:
                assert_close(found[f"{mode}{stage}"], two[0]["interrupted"][f"{mode}{stage}"], tolerance)
            for stage in STAGES:
                assert "lora_pro_rank1.safetensors is truncated" in found[f"truncated {stage}"]
                assert "lacks lora_pro_rank1.safetensors" in found[f"missing {stage}"]
                assert "of another LoRA-Pro training: its pairs have base_model" in found[f"foreign {stage}"]
                assert "are of two saves: global_steps is [4, 5]" in found[f"mixed {stage}"]
                assert "was written without LoRA-Pro" in found[f"none {stage}"]


def saved_by_one(rank, ranks, folder):
    for stage in STAGES:
        engine = launch({"mode": "full"}, stage=stage, clip=0.5)
        train(engine, rank, ranks, range(5))
        engine.save_checkpoint(f"{folder}/one{stage}", exclude_frozen_parameters=True)
        engine.destroy()
    return {}


def grown(rank, ranks, folder):
    """On more processes than have saved."""
    found = {}
    for stage in STAGES:
        engine = launch({"mode": "full"}, stage=stage, clip=0.5)
        message = message_of(engine.load_checkpoint, f"{folder}/one{stage}", load_module_strict=False)
        train(engine, rank, ranks, range(5, STEPS))
        found[f"{stage}"], found[f"message {stage}"] = result(engine), message
        engine.destroy()
    return found


@pytest.mark.slow
def test_a_checkpoint_of_one_process_loads_on_two(two_again):
    expected = single({"mode": "full"}, clip=0.5)
    for found in (rank["grown"] for rank in two_again):
        for stage in (1, 2):
            assert_close(found[f"{stage}"], expected, 1e-5)
        assert "use at most 1 processes" in found["message 3"]


def uneven(rank, ranks, stages):
    """Steps that DeepSpeed leaves out, and pairs that some steps do not reach."""
    found = {}
    for stage in stages:
        engine = launch({"mode": "full"}, stage=stage)
        train(engine, rank, ranks, range(3))
        before = result(engine)
        moments = {name: tensor.clone() for name, tensor in engine.optimizer.optimizer.pair_state().items()}
        batch = share(batches(torch.float32)[3], rank, ranks).clone()
        batch[0, 0] = float("inf") if rank == 0 else 0.0
        engine.backward(loss_of(engine, batch))
        engine.step()
        assert_close(result(engine), before, 0)
        for name, tensor in engine.optimizer.optimizer.pair_state().items():
            assert torch.equal(tensor, moments[name]), name
        assert engine.skipped_steps == 1
        engine.destroy()

        engine = launch({"mode": "full"}, stage=stage)
        alternate(engine.module)
        for step in range(6):
            engine.module.second_is_on = step % 2 == 0
            train(engine, rank, ranks, range(step, step + 1))
        found[f"{stage}"] = result(engine)
        found[f"none {stage}"] = message_of(engine.step)
        engine.destroy()
    return found


def alternate(model):
    """Let the second adapted layer of a model be as `second_is_on` says."""
    layer = model.base_model.model[3]
    with_adapter = layer.forward
    layer.forward = lambda inputs: with_adapter(inputs) if model.second_is_on else layer.base_layer(inputs)


def assert_uneven(two, stages):
    """As one process with the same steps."""
    model = build(torch.float32)
    optimizer = make_optimizer(model, {"mode": "full"})
    alternate(model)
    for step in range(6):
        model.second_is_on = step % 2 == 0
        train_alone(model, optimizer, steps=range(step, step + 1), dtype=torch.float32)
    for found in (rank["uneven"] for rank in two):
        for stage in stages:
            assert_close(found[f"{stage}"], result_of(model), 1e-5)
            assert "none of the 2 LoRA pairs has a gradient" in found[f"none {stage}"]


@pytest.mark.slow
def test_skipped_steps_and_pairs_without_gradients(two):
    assert_uneven(two, STAGES)


def refusals(rank, ranks):
    """What attaching raises, by what is wrong."""
    import deepspeed

    from lorapro_hf.deepspeed.engine import attach_deepspeed

    found = {}

    def attempt(name, stage=2, make=lorapro, model_settings=None, attached=None, **sections):
        model = build(torch.float32, **(model_settings or {}))
        given = make(model) if make else None
        config = configuration(stage, **sections)
        engine = deepspeed.initialize(model=model, optimizer=given, config=config)[0]
        found[name] = message_of(attach_deepspeed, engine, attached or given or engine.optimizer)
        return engine

    cpu = {"device": "cpu"}
    offload = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": {"offload_optimizer": cpu}}
    attempt("offload_optimizer 2", **offload)
    attempt("offload_optimizer 3", stage=3, **offload)
    attempt("offload_param", stage=3, zero_optimization={"offload_param": cpu})
    named = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
    attempt("section 'optimizer' 1", **named)
    attempt("section 'optimizer' 2", make=None, **named)
    attempt("steps a AdamW", make=lambda model: make_optimizer(model, "adamw"))
    attempt("was given another one", attached=lorapro(build(torch.float32)))
    attempt("ZeRO stage is 0", stage=0)
    attempt("'round_robin_gradients'", zero_optimization={"round_robin_gradients": True})
    attempt("'elastic_checkpoint'", zero_optimization={"elastic_checkpoint": True})
    attempt("'load_universal'", checkpoint={"load_universal": True})
    attempt("'check_grad_overflow'", bf16={**BF16, "check_grad_overflow": False})
    attempt("master_factors=True", make=with_masters, bf16=BF16)
    attempt("mixes factors", make=mixed)

    engine = attempt("no exception")
    attach_deepspeed(engine, engine.optimizer)  # once more, by what DeepSpeed returned
    found["a Linear"] = message_of(attach_deepspeed, torch.nn.Linear(1, 1), engine.optimizer)
    for stage in STAGES:
        engine = launch({"mode": "full"}, attach=False, stage=stage)
        found[f"attach_deepspeed(engine, optimizer) before the first step {stage}"] = message_of(
            train, engine, rank, ranks, range(1)
        )
    return found


def with_masters(model):
    return make_optimizer(model, {"master_factors": True})


def mixed(model):
    from lorapro_hf import LoRAProAdamW, find_lora_pairs

    return LoRAProAdamW([p for p in model.parameters() if p.requires_grad], find_lora_pairs(model), lr=1e-2)


@pytest.mark.slow
def test_what_would_be_wrong_is_refused_with_the_remedy(one):
    for name, message in one[0]["refused"].items():
        assert name.rstrip(" 123") in message, (name, message)
        if name != "no exception":
            assert message.startswith(("RuntimeError", "TypeError", "ValueError")), message
