"""`weight_gradients` and `gelora_ranks` take the batches of all ranks."""

import pytest
import torch
import transformers
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lorapro_hf import find_lora_pairs, gelora_ranks, weight_gradients
from processes import run
from training import batches, build, loss_of

pytestmark = pytest.mark.distributed


def gradients_of(model, data):
    return {pair.name: gradient for pair, gradient in weight_gradients(model, data, loss_of, max_bytes=0)}


def on_each_rank(rank, ranks):
    """Two batches on the first rank and one on the second, in a model that DDP has wrapped."""
    model = DistributedDataParallel(build())
    found = gradients_of(model, batches(steps=3)[rank::ranks])
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match=r"is sharded .* Call it before the model is sharded"):
        weight_gradients(fully_shard(build()), batches(steps=1), loss_of)
    return found


def test_ranks_get_the_gradients_of_one_process_with_all_batches(tmp_path):
    model, data = build(), batches(steps=3)
    expected = gradients_of(model, data)
    for pair in find_lora_pairs(model):
        weight = pair.layer.get_base_layer().weight.requires_grad_(True)
        (of_autograd,) = torch.autograd.grad(sum(loss_of(model, batch) for batch in data) / 3, weight)
        torch.testing.assert_close(
            expected[pair.name], of_autograd.reshape(expected[pair.name].shape), rtol=1e-10, atol=0
        )
    for found in run(on_each_rank, 2, tmp_path):
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-10 * gradient.norm()


def failing_on_one_rank(rank, ranks):
    """The second rank meets an error in its second batch, and then none."""
    model, data = build(), list(batches(steps=2))

    def loss_fn(model, batch):
        if rank == 1 and batch is data[1]:
            raise KeyError("labels")
        return loss_of(model, batch)

    with pytest.raises((KeyError, RuntimeError)) as raised:
        list(weight_gradients(model, data, loss_fn))
    return {"said": f"{type(raised.value).__name__}: {raised.value}", "after": gradients_of(model, data)}


def test_an_error_on_one_rank_is_raised_on_all(tmp_path):
    first, second = run(failing_on_one_rank, 2, tmp_path)
    assert first["said"] == "RuntimeError: no gradient was computed: rank 1 raised KeyError: 'labels'"
    assert second["said"] == "KeyError: 'labels'"
    for name, gradient in gradients_of(build(), batches(steps=2)).items():
        for found in (first, second):
            torch.testing.assert_close(found["after"][name], gradient, rtol=1e-10, atol=0)


def encoder_with_batches():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=64, initializer_range=0.4))
    return model, [{"input_ids": tokens} for tokens in torch.randint(64, (60, 7)).split(20)]


def gelora_on_each_rank(rank, ranks):
    """Two batches on the first rank and one on the second; then none on the second."""
    model, data = encoder_with_batches()
    found = gelora_ranks(DistributedDataParallel(model), data[rank::ranks])
    with pytest.raises((ValueError, RuntimeError)) as raised:
        gelora_ranks(model, data if rank == 0 else [])
    return {"ranks": found["rank_pattern"], "said": str(raised.value)}


def test_ranks_choose_the_ranks_of_one_process_with_all_batches(tmp_path):
    expected = gelora_ranks(*encoder_with_batches())["rank_pattern"]
    first, second = run(gelora_on_each_rank, 2, tmp_path)
    assert first["ranks"] == second["ranks"] == expected
    assert first["said"] == "no rank was chosen: rank 1 raised ValueError: batches is empty: give at least one batch."
    assert second["said"] == "batches is empty: give at least one batch."
