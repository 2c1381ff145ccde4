"""What DeepSpeed's configuration says: where it clips, and what is refused before an engine is built."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorapro_hf.distributed.engines import require_configuration, settle_clipping
from training import build
from zero_helpers import configuration, launch, lorapro, message_of, run, train

needs_deepspeed = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="DeepSpeed runs on Linux"),
]

CPU = {"device": "cpu"}
REFUSED: dict[str, dict[str, Any]] = {
    "section 'optimizer' names 'AdamW'": {"optimizer": {"type": "AdamW"}},
    "Remove 'offload_optimizer' and": {"zero_optimization": {"stage": 2, "offload_optimizer": CPU}},
    "'offload_param' from": {"zero_optimization": {"stage": 3, "offload_param": CPU}},
    "are offloaded": {"zero_optimization": {"stage": 2, "cpu_offload": True}},
    "ZeRO stage is 0": {"zero_optimization": {"stage": 0}},
    "parallelism (mpu)": {"tensor_parallel": {"autotp_size": 2}},
    "'round_robin_gradients' from 'zero_optimization'": {"zero_optimization": {"round_robin_gradients": True}},
    "'elastic_checkpoint'": {"zero_optimization": {"elastic_checkpoint": True}},
    "'zenflow'": {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}},
    "'zero_quantized_weights'": {"zero_optimization": {"zero_quantized_weights": True}},
    "'zero_quantized_gradients'": {"zero_optimization": {"zero_quantized_gradients": True}},
    "'deepcompile' from 'compile'": {"compile": {"deepcompile": True}},
    "'load_universal'": {"checkpoint": {"load_universal": True}},
    "'zero_hpz_partition_size'": {"zero_optimization": {"zero_hpz_partition_size": 2}},
    "'compute_grad_norm'": {"zero_optimization": {"compute_grad_norm": False}},
    "Remove 'fp16_master_weights_and_grads'": {"fp16": {"fp16_master_weights_and_grads": True}},
    "and 'bf16_master_weights_and_grads'": {"bf16": {"bf16_master_weights_and_grads": True}},
    "master_factors=True": {"bf16": {"enabled": True}},
    "'check_grad_overflow'": {"bf16": {"enabled": True, "check_grad_overflow": False}},
    "'torch_autocast'": {"torch_autocast": {"enabled": True, "dtype": "torch.float16"}},
}
ORDINARY: dict[str, Any] = {
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto", "check_grad_overflow": True},
    "fp16": {"enabled": False, "fp16_master_weights_and_grads": "auto"},
    "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    "tensor_parallel": {"autotp_size": 1},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "nvme_path": None},
        "offload_param": None,
        "round_robin_gradients": "auto",
        "zero_hpz_partition_size": 1,
    },
}


@pytest.mark.parametrize("remedy", REFUSED)
def test_a_configuration_is_refused_with_the_remedy(remedy: str) -> None:
    with pytest.raises(RuntimeError, match=r"^DeepSpeed would train without LoRA-Pro") as raised:
        require_configuration(REFUSED[remedy], master_factors="master_factors" in remedy)
    assert remedy in str(raised.value)


@pytest.mark.parametrize("config", [{}, {"zero_optimization": True}, ORDINARY])
def test_ordinary_configurations_are_accepted(config: dict[str, Any]) -> None:
    require_configuration(config, master_factors=False)


def plugin(in_file: Any = None, in_plugin: Any = "auto") -> Any:
    config = {} if in_file is None else {"gradient_clipping": in_file}
    return SimpleNamespace(deepspeed_config=config, gradient_clipping=in_plugin)


@pytest.mark.parametrize("stated", [plugin(), plugin("auto"), plugin(in_plugin=None), plugin(0.3), plugin(None, 0.3)])
def test_deepspeed_clips_at_max_grad_norm(stated: Any) -> None:
    settle_clipping(stated, 0.3)
    assert stated.deepspeed_config == {"gradient_clipping": 0.3}


@pytest.mark.parametrize("stated", [plugin(), plugin("auto")])
def test_the_next_training_may_clip_at_another_value(stated: Any) -> None:
    for clipping in (1.0, 0.3, 0.0):
        settle_clipping(stated, clipping)
        assert stated.deepspeed_config == {"gradient_clipping": clipping}


def test_a_stated_value_stays_the_users() -> None:
    stated = plugin(0.5)
    settle_clipping(stated, 0.5)
    with pytest.raises(ValueError, match=r"gradient_clipping=0\.5, and max_grad_norm is 0\.3"):
        settle_clipping(stated, 0.3)


@pytest.mark.parametrize("stated", [plugin(0.5), plugin("auto", 0.5), plugin(None, 0.5)])
def test_two_values_of_clipping_are_refused(stated: Any) -> None:
    says = "gradient_clipping=0.5, and max_grad_norm is 0.3. Write .gradient_clipping.: .auto. .* both the same"
    with pytest.raises(ValueError, match=says):
        settle_clipping(stated, 0.3)


def trainer_with(folder: str, max_grad_norm: float, deepspeed: Any = None, mode: str = "full", **zero: Any) -> Any:
    from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
    from trainer_helpers import arguments
    from trainer_helpers import build as build_trainer

    if deepspeed is not None:
        sizes = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
        deepspeed = {
            "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": {"stage": 2, **sizes, **zero},
            **deepspeed,
        }
    settings = {"max_steps": 1, "max_grad_norm": max_grad_norm, "deepspeed": deepspeed, "lora_pro_mode": mode}
    args = arguments(Path(folder), LoRAProTrainingArguments, **settings)
    return build_trainer(LoRAProTrainer, args)


def clipped_at(trainer: Any) -> float:
    """Where the engine of a trainer clips, after a step."""
    trainer.train()
    return float(trainer.deepspeed.optimizer.clip_grad)


def trainers(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """Where engines clip, and what is refused, by the way in which a trainer gets its configuration."""
    found: dict[str, Any] = {
        "file": clipped_at(trainer_with(folder, 0.05, {})),
        "off": clipped_at(trainer_with(folder, 0.0, {})),
        "other": message_of(trainer_with, folder, 0.05, {"gradient_clipping": 0.5}),
        "rite, auto": clipped_at(trainer_with(folder, 1.0, {"gradient_clipping": "auto"}, "rite")),
        "rite, other": message_of(trainer_with, folder, 1.0, {"gradient_clipping": 0.5}, "rite"),
    }
    import deepspeed

    original, deepspeed.initialize = deepspeed.initialize, None  # so that nothing can build an engine
    found["offload"] = message_of(trainer_with, folder, 1.0, {}, offload_optimizer=CPU)
    deepspeed.initialize = original
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "0.0"}
    found["accelerate"] = clipped_at(trainer_with(folder, 0.0))
    found["accelerate, other"] = message_of(trainer_with, folder, 1.0)
    return found


def loops(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """The same of loops with accelerate or DeepSpeed, and what a checkpoint makes of clipping."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    from lorapro_hf.deepspeed.engine import attach_deepspeed

    found: dict[str, Any] = {}
    found["rite"] = message_of(launch, {"mode": "rite"}, stage=2, clip=0.5)
    for name, clip in (("saved", 0.5), ("loaded", 0.05)):
        engine = launch({"mode": "full"}, stage=2, clip=clip)
        if name == "saved":
            train(engine, rank, ranks, range(1))
            engine.save_checkpoint(folder)
        else:
            engine.load_checkpoint(folder)
            found["checkpoint"] = float(engine.optimizer.clip_grad)
    del engine.optimizer.dp_process_group
    engine.__dict__.pop("_lora_pro_attached")
    found["private"] = message_of(attach_deepspeed, engine, engine.optimizer)

    def accelerated(**settings: Any) -> Any:
        AcceleratorState._reset_state(True)
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(**settings))

    offloading = configuration(2, zero_optimization={"offload_optimizer": CPU})
    accelerated(hf_ds_config=offloading)
    found["offload"] = message_of(lorapro, build(torch.float32))
    for name, clipping in (("left out", 0.0), ("default", None)):
        accelerator = accelerated(zero_stage=2, gradient_clipping=clipping)
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        model = build(torch.float32)
        engine, optimizer = accelerator.prepare(model, lorapro(model))
        found[name] = message_of(attach_deepspeed, engine, optimizer)
        found[f"{name}, clips"] = float(engine.optimizer.clip_grad)
    return found


class TestEngines:
    pytestmark = needs_deepspeed

    @pytest.mark.slow
    def test_trainers(self, tmp_path: Path) -> None:
        found = run(trainers, 1, tmp_path, str(tmp_path))[0]
        assert found["file"] == 0.05 and found["off"] == found["rite, auto"] == found["accelerate"] == 0
        assert "gradient_clipping=0.5, and max_grad_norm is 0" in found["rite, other"]
        assert (
            "ValueError: DeepSpeed's configuration has gradient_clipping=0.5, and max_grad_norm is 0.05"
            in found["other"]
        )
        assert "gradient_clipping=0, and max_grad_norm is 1" in found["accelerate, other"]
        assert "RuntimeError: DeepSpeed would train" in found["offload"] and "offloaded" in found["offload"]

    @pytest.mark.slow
    def test_loops(self, tmp_path: Path) -> None:
        found = run(loops, 1, tmp_path, str(tmp_path))[0]
        assert found["checkpoint"] == 0.05
        assert "gradient_clipping=0.5 clips the raw gradients" in found["rite"]
        assert "mode 'rite' depends on how B A is split. Set \"gradient_clipping\": 0" in found["rite"]
        assert "has no DeepSpeedZeroOptimizer.dp_process_group, on which LoRA-Pro relies" in found["private"]
        assert "RuntimeError: DeepSpeed would train" in found["offload"] and "offloaded" in found["offload"]
        assert "gradient_clipping=0 was handed to accelerate, which has left it out" in found["left out"]
        assert "DeepSpeed clips at 1." in found["left out"] and found["left out, clips"] == 1
        assert found["default"] == "no exception" and found["default, clips"] == 1
