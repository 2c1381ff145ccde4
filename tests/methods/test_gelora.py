"""GeLoRA's ranks against a dense computation from `output_hidden_states`, the names in PEFT, and bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lorapro_hf import gelora_ranks
from lorapro_hf.methods.gelora import BlockRank, block_ranks, lora_keywords
from lorapro_hf.recipes.targets import require_known_names
from two_nn import dense

WIDTHS = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**WIDTHS, "vocab_size": 64, "initializer_range": 0.4}
WIDTH = WIDTHS["hidden_size"]
Model = tuple[Any, dict[str, torch.Tensor]]


def padded(rows: int, tokens: int) -> torch.Tensor:
    """A mask of sequences of different lengths."""
    return (torch.arange(tokens) < torch.randint(2, tokens + 1, (rows, 1))).long()


def llama(rows: int = 64) -> Model:
    """A decoder on pairs of embeddings whose means lie in three dimensions, until a block has bent them."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2))
    first, mean = torch.randn(rows, WIDTH), torch.randn(rows, 3) @ torch.randn(3, WIDTH)
    return model, {"inputs_embeds": torch.stack([first, 2 * mean - first], dim=1)}


def bert(rows: int = 64) -> Model:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT))
    return model, {"input_ids": torch.randint(64, (rows, 9)), "attention_mask": padded(rows, 9)}


def t5(rows: int = 64) -> Model:
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    labels = torch.randint(64, (rows, 7)).masked_fill(padded(rows, 7) == 0, -100)
    return model, {"input_ids": torch.randint(64, (rows, 9)), "attention_mask": padded(rows, 9), "labels": labels}


def vit(rows: int = 64) -> Model:
    config = transformers.ViTConfig(**WIDTHS, image_size=16, patch_size=8, initializer_range=0.4)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(rows, 3, 16, 16)}


def hidden_states(model: Any, batch: dict[str, Any], norm: str | None, output: str) -> list[torch.Tensor]:
    """The states at the boundaries by transformers' own means; the last one is taken before the final norm."""
    if norm is not None:
        model = copy.deepcopy(model)
        parent, _, name = norm.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    with torch.no_grad():
        return list(model.eval()(**batch, output_hidden_states=True)[output])


def batches_of(batch: dict[str, torch.Tensor], size: int = 16) -> list[dict[str, torch.Tensor]]:
    parts = [
        dict(zip(batch, values, strict=True)) for values in zip(*(v.split(size) for v in batch.values()), strict=True)
    ]
    return parts


CASES: list[tuple[Callable[[], Model], list[tuple[str, str | None, str, str | None]]]] = [
    (llama, [("model.layers", "model.norm", "hidden_states", None)]),
    (bert, [("bert.encoder.layer", None, "hidden_states", "attention_mask")]),
    (
        t5,
        [
            ("encoder.block", "encoder.final_layer_norm", "encoder_hidden_states", "attention_mask"),
            ("decoder.block", "decoder.final_layer_norm", "decoder_hidden_states", "labels"),
        ],
    ),
    (vit, [("vit.", "vit.layernorm", "hidden_states", None)]),
]


def dense_dimension(hidden: torch.Tensor, mask: torch.Tensor | None, pooling: str) -> float:
    """TwoNN of the tokens that count, one sequence after the other."""
    kept = list(hidden) if mask is None else [state[row] for state, row in zip(hidden, mask, strict=True)]
    points = torch.cat(kept) if pooling == "tokens" else torch.stack([tokens.double().mean(0) for tokens in kept])
    return dense(torch.unique(points, dim=0).double().numpy())


def plain(pattern: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("\\", ""): value for name, value in pattern.items()}


@pytest.mark.parametrize("pooling", ["mean", "tokens"])
@pytest.mark.parametrize(("build", "stacks"), CASES, ids=["llama", "bert", "t5", "vit"])
def test_ranks_are_those_of_a_dense_computation(build: Callable[[], Model], stacks: Any, pooling: str):
    model, batch = build()
    model.train()
    rows = list(block_ranks(model, batches_of(batch), pooling=pooling))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    expected: dict[str, int] = {}
    for prefix, norm, output, mask_name in stacks:
        mask = None if mask_name is None else batch[mask_name] != (-100 if mask_name == "labels" else 0)
        states = hidden_states(model, batch, norm, output)
        dimensions = [dense_dimension(state, mask, pooling) for state in states]
        own = [row for row in rows if row.block.startswith(prefix)]
        assert [row.dimension_in for row in own] == pytest.approx(dimensions[:-1], rel=1e-3)
        assert [row.dimension_out for row in own] == pytest.approx(dimensions[1:], rel=1e-3)
        for row, before, after in zip(own, dimensions, dimensions[1:], strict=False):
            expected |= dict.fromkeys(row.ranks, max(round(after - before), 0) + 1)
    pattern = plain(gelora_ranks(model, [batch], pooling=pooling)["rank_pattern"])
    assert pattern == expected
    if build is llama and pooling == "mean":
        assert max(pattern.values()) > 5


@pytest.mark.parametrize("build", [llama, t5], ids=["llama", "t5"])
def test_peft_takes_exactly_these_ranks(build: Callable[[], Model]):
    model, batch = build()
    keywords = gelora_ranks(model, [batch], rank_floor=3, alpha_over_r=1.5)
    assert set(keywords) == {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    assert keywords["r"] == 3 and keywords["lora_alpha"] == 4.5
    ranks, alphas = plain(keywords["rank_pattern"]), plain(keywords["alpha_pattern"])
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", **keywords)).base_model.model
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks
    assert {name: layer.lora_alpha["default"] for name, layer in layers.items()} == alphas
    assert min(ranks.values()) == 3 and all(layer.scaling["default"] == 1.5 for layer in layers.values())


class Block(nn.Module):
    """A block that multiplies, so that the dimension is known: that of the image."""

    def __init__(self, rank: int, side: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, side), nn.Linear(side, WIDTH)
        self.register_buffer("image", torch.randn(WIDTH, rank) @ torch.randn(rank, WIDTH))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        return (hidden @ self.image,)


class Chain(nn.Module):
    """Lists of blocks that run one after the other; the name of one ends that of another."""

    def __init__(self, *ranks: int, side: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(rank, side) for rank in ranks)
        self.other = nn.ModuleDict({"layers": nn.Sequential(*(Block(rank) for rank in ranks))})

    def forward(self, inputs: torch.Tensor, **_: Any) -> torch.Tensor:
        for block in [*self.layers, *self.other["layers"]]:
            (inputs,) = block(inputs)
        return inputs


INPUTS = {"inputs": torch.randn(400, 2, WIDTH)}


def test_a_name_that_ends_another_one_is_anchored():
    chain = Chain(2, 3)
    ranks = {
        name: number for number, name in enumerate(n for n, m in chain.named_modules() if isinstance(m, nn.Linear))
    }
    rows = [BlockRank("", 1.0, 1.0, 20, {name: rank + 1}) for name, rank in ranks.items()]
    keywords = lora_keywords(chain, rows)
    assert r"^layers\.0\.up" in keywords["rank_pattern"] and r"other\.layers\.0\.up" in keywords["rank_pattern"]
    adapted = get_peft_model(chain, LoraConfig(target_modules=["up", "down"], **keywords)).base_model.model
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    assert {name: layer.r["default"] - 1 for name, layer in layers.items()} == ranks


def test_blocks_are_chosen_by_name_and_ranks_are_cut_to_the_weight():
    chain = Chain(2, 20, side=5)
    rows = list(block_ranks(chain, [INPUTS], rank_floor=7, blocks=["layers"]))
    assert [row.block for row in rows] == ["layers.0", "layers.1"]
    assert rows[0].dimension_in > 8 and rows[0].dimension_out == pytest.approx(2, rel=0.15)
    assert rows[1].ranks == {"layers.1.up": 5, "layers.1.down": 5}  # rank_floor is more than the side of 5


def test_a_shared_block_gets_its_largest_rank():
    config = transformers.AlbertConfig(**TEXT, embedding_size=24)
    model, batch = transformers.AlbertModel(config), bert()[1]
    (row,) = block_ranks(model, [batch])
    dimensions = [
        dense_dimension(x, batch["attention_mask"] == 1, "mean")
        for x in hidden_states(model, batch, None, "hidden_states")
    ]
    steps = [after - before for before, after in pairwise(dimensions)]
    assert len(steps) == 2 and set(row.ranks.values()) == {max(max(map(round, steps)), 0) + 1}
    assert row.block == "encoder.albert_layer_groups.0"


class Experts(nn.Module):
    """Three packed matrices with a smaller side of 5."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH, 5))


def test_packed_experts_get_the_rank_of_their_block():
    chain = Chain(2)
    chain.layers[0].experts = Experts()
    keywords = gelora_ranks(chain, [INPUTS], rank_floor=7, blocks=["layers"])
    config = LoraConfig(target_modules=["up"], target_parameters=["experts.weight"], **keywords)
    require_known_names(chain, config)
    layer = get_peft_model(chain, config).base_model.model.layers[0].experts
    assert layer.r == {"default": 5} and layer.scaling == {"default": 2.0}


def test_a_compiled_model_gives_the_names_of_its_layers():
    chain = Chain(2)
    keywords = gelora_ranks(torch.compile(chain, backend="eager"), [INPUTS], blocks=["layers"])
    assert all(name.startswith("^layers") for name in keywords["rank_pattern"])


def test_a_function_pools_states_of_any_shape():
    chain = Chain(3)
    picture = {"inputs": torch.randn(60, 4, 4, WIDTH)}
    with pytest.raises(ValueError, match=r"shape \(60, 4, 4, 24\), not \(sequences, tokens, width\).*pooling=lambda"):
        gelora_ranks(chain, [picture])
    (first, _) = block_ranks(chain, [picture], pooling=lambda hidden, mask: hidden.mean(dim=(1, 2)))
    expected = dense((picture["inputs"].mean(dim=(1, 2)) @ chain.layers[0].image).double().numpy())
    assert first.dimension_out == pytest.approx(expected, rel=1e-3)


def test_only_as_many_batches_run_as_are_needed():
    model, batch = vit(64)
    left = iter(batches_of(batch))
    assert {row.points for row in block_ranks(model, left, max_points=24)} == {24}
    assert len(list(left)) == 2


def with_nan() -> Model:
    model, batch = bert()
    model.bert.encoder.layer[0].output.dense.bias.data[0] = torch.nan
    return model, batch


def adapted() -> Model:
    model, batch = bert()
    return get_peft_model(model, LoraConfig(target_modules=["query"])), batch


def without_blocks() -> Model:
    return nn.Linear(3, 3), {}


def of_another_mask() -> Model:
    return Chain(2), {**INPUTS, "attention_mask": padded(400, 9)}


@pytest.mark.parametrize(
    ("build", "settings", "said"),
    [
        (adapted, {}, r"has an adapter already \(.*query\).*before get_peft_model, or on model.unload\(\)"),
        (lambda: (bert()[0], None), {}, "batches is empty: give at least one batch"),
        (lambda: bert(1), {}, "a single sequence.*give several hundred"),
        (lambda: bert(1), {"pooling": "tokens"}, "a single sequence"),
        (lambda: bert(19), {}, r"bert.encoder.layer, after 0 of its blocks: 19 distinct points.*more and different"),
        (with_nan, {}, r"the hidden states after 1 of its blocks are not finite. Load the model in a wider dtype"),
        (without_blocks, {}, "Linear has no list of blocks.*or set the ranks by hand"),
        (of_another_mask, {}, r"attention_mask of shape \(400, 9\) fits no hidden states.*without a mask"),
        (bert, {"blocks": ["encoder"]}, "'encoder' is no list of blocks.*has bert.encoder.layer"),
        (bert, {"pooling": "max"}, "pooling='max' must be one of mean, tokens, or a function"),
        (bert, {"rank_floor": 0}, "rank_floor=0 must be a whole number of at least 1"),
        (bert, {"max_points": 19}, "max_points=19 must be a whole number of at least 20"),
        (lambda: (bert()[0], None), {"alpha_over_r": 0.0}, "alpha_over_r=0.0 must be positive"),  # before any batch
    ],
)
def test_bad_input_is_refused(build: Callable[[], Model], settings: dict[str, Any], said: str):
    model, batch = build()
    with pytest.raises(ValueError, match=said):
        gelora_ranks(model, [] if batch is None else [batch], **settings)
