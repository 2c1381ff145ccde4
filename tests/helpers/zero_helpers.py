"""DeepSpeed engines around the small training, on the CPU and under gloo."""

import torch

from lorapro_hf import create_lorapro_optimizer
from processes import run_afresh
from training import STEPS, batches, build, loss_of, make_optimizer, share


def run(job, ranks, folder, *arguments):
    """As `processes.run_afresh`, with DeepSpeed ready for the CPU."""
    return run_afresh(_prepared, ranks, folder, job, arguments, environment={"DS_ACCELERATOR": "cpu"})


def _prepared(rank, ranks, job, arguments):
    import deepspeed.ops

    # What is found there would be compiled now, and nothing here needs it.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel("ERROR")
    return job(rank, ranks, *arguments)


def configuration(stage, accumulate=1, clip=0.0, **sections):
    """An ordinary configuration, with buffers of the size of the model instead of gigabytes."""
    zero = {
        "stage": stage,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 1000,
        "stage3_param_persistence_threshold": 0,
        **sections.pop("zero_optimization", {}),
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        **sections,
    }


def launch(config, model_settings=None, attach=True, **settings):
    """An engine that trains with LoRA-Pro in the given configuration, or with plain AdamW."""
    model = build(torch.float32, **(model_settings or {}))
    return engine_of(model, make_optimizer(model, config), attach and config != "adamw", **settings)


def engine_of(model, optimizer, attach=True, **settings):
    """An engine that trains a model, with LoRA-Pro where it is attached."""
    import deepspeed

    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=configuration(**settings))[0]
    if attach:
        from lorapro_hf.deepspeed.engine import attach_deepspeed

        attach_deepspeed(engine, optimizer)
    return engine


def train(engine, rank, ranks, steps=range(STEPS), dtype=torch.float32):
    """Steps on the rank's share of each batch, cut into the parts that the engine accumulates."""
    data = batches(dtype)
    for step in steps:
        for part in share(data[step], rank, ranks).chunk(engine.gradient_accumulation_steps()):
            engine.backward(loss_of(engine, part))
            engine.step()


def result(engine, masters=True):
    """The whole masters of all trainable parameters, or the parameters themselves."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and masters:
            found[name] = safe_get_full_fp32_param(parameter).clone()
        elif parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
    return found


def trained(rank, ranks, config, **settings):
    """The parameters after the whole training, seen both ways where these must agree."""
    dtype = torch.bfloat16 if "bf16" in settings else torch.float32
    engine = launch(config, **settings)
    train(engine, rank, ranks, dtype=dtype)
    found = result(engine)
    for name, parameter in result(engine, masters=False).items():
        assert torch.equal(parameter, found[name].to(parameter.dtype)), name
    engine.destroy()
    return found


def message_of(action, *args, **kwargs):
    """What the exception says that an action raises, after its class."""
    try:
        action(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no exception"


def lorapro(model, **config):
    return create_lorapro_optimizer(model, lr=1e-2, config=config)
