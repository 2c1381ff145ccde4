"""State and traffic of each rank when the ranks divide the pairs, by the number of ranks.

The script measures 1, 2 and 3 processes of this machine with the factors of SmolLM2-135M, and computes more ranks with
those of Llama-3.1-70B. `python benchmarks/scaling.py` prints the Markdown of `benchmarks/scaling.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lorapro_hf import create_lorapro_optimizer
from lorapro_hf.distributed import ownership as shares
from lorapro_hf.distributed.ownership import assign_owners

MODES = ("full", "full_8bit", "factored", "efficient")
R = 8
# (out, in) of the linear layers of a block, and the blocks; huggingface.co/HuggingFaceTB/SmolLM2-135M and
# huggingface.co/meta-llama/Llama-3.1-70B, config.json.
SMOLLM2 = (((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)), 30)
LLAMA_70B = (((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)), 80)
BYTES_OF_MOMENTS = {"full": 8.0, "full_8bit": 2 + 2 * 4 / 256}  # an element; 8 bits with a float32 for 256 of them


def state_bytes(m: int, n: int, mode: str) -> float:
    """Bytes of the moments of one pair."""
    if mode in BYTES_OF_MOMENTS:
        return BYTES_OF_MOMENTS[mode] * m * n
    return 4 * (R + 1) * (m + n) if mode == "factored" else 2 * 4 * R * (m + n)


def computed(shapes: tuple[tuple[tuple[int, int], ...], int], ranks: int) -> dict[str, object]:
    """Largest state of a rank in each mode, and bytes that a rank sends and receives in a step."""
    groups: dict[tuple[int, int], int] = {}
    for shape in shapes[0]:
        groups[shape] = groups.get(shape, 0) + shapes[1]
    ordered = sorted(groups.items(), key=lambda item: -item[0][0] * item[0][1])
    owners = assign_owners([count for _, count in ordered], ranks)
    state = dict.fromkeys(MODES, 0.0)
    for mode in MODES:
        of_rank = [0.0] * ranks
        for ((m, n), _), own in zip(ordered, owners, strict=True):
            for owner in own:
                of_rank[owner] += state_bytes(m, n, mode)
        state[mode] = max(of_rank)
    # All pairs of one shape travel in one collective, to which each rank adds as much as the one that owns most.
    rows = [max(own.count(rank) for rank in range(ranks)) for own in owners]
    own_bytes = sum(4 * R * (m + n) * most for ((m, n), _), most in zip(ordered, rows, strict=True))
    received = (ranks - 1) * own_bytes if ranks > 1 else 0
    return {"state": state, "received": received, "collectives": len(ordered) + 1 if ranks > 1 else 0}


class Layers(nn.Module):
    """The adapted layers of a model, without anything between them."""

    def __init__(self, shapes: tuple[tuple[int, int], ...], blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for _ in range(blocks) for m, n in shapes)


def measure(rank: int, ranks: int, folder: str) -> None:
    """State and traffic of this rank in every mode, written to a file."""
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{ranks}", rank=rank, world_size=ranks)
    traffic = {"received": 0, "collectives": 0}
    gather, reduce = shares.all_gather, dist.all_reduce

    def counted_gather(output, own, *args, **kwargs):  # type: ignore[no-untyped-def]
        traffic["received"] += (output.numel() - own.numel()) * own.element_size()
        traffic["collectives"] += 1
        return gather(output, own, *args, **kwargs)

    def counted_reduce(own, *args, **kwargs):  # type: ignore[no-untyped-def]
        traffic["collectives"] += 1
        return reduce(own, *args, **kwargs)

    shares.all_gather, dist.all_reduce = counted_gather, counted_reduce
    found = {}
    for mode in MODES:
        torch.manual_seed(0)
        model = get_peft_model(Layers(*SMOLLM2), LoraConfig(r=R, target_modules=r"layers\.\d+"))
        optimizer = create_lorapro_optimizer(model, lr=1e-4, config={"mode": mode, "shard_states": True})
        for pair in optimizer.pairs:
            pair.A.grad, pair.B.grad = torch.randn_like(pair.A), torch.randn_like(pair.B)
        traffic.update(received=0, collectives=0)
        optimizer.step()
        own = sum(t.numel() * t.element_size() for n, t in optimizer.own_state().items() if not n.endswith(".step"))
        found[mode] = {"state": own, **traffic}
    Path(folder, f"{ranks}-{rank}.json").write_text(json.dumps(found))
    if ranks > 1:
        dist.destroy_process_group()


def megabytes(count: float) -> str:
    """With three digits."""
    return f"{count / 1e6:,.0f}" if count >= 1e8 else f"{count / 1e6:.3g}"


def main() -> int:
    """Print the tables."""
    lines = ["# State and traffic by the number of ranks", "", "Made by `python benchmarks/scaling.py`.", ""]
    lines += [f"## Measured: SmolLM2-135M, r = {R}, all linear layers, whole factors on every rank (DDP)", ""]
    head = "| ranks | " + " | ".join(f"{mode}, MB" for mode in MODES) + " | received in a step, MB | collectives |"
    rule = "|---" * (len(MODES) + 3) + "|"
    lines += [head, rule]
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2, 3):
            mp.spawn(measure, args=(ranks, folder), nprocs=ranks)  # type: ignore[no-untyped-call]
            found = [json.loads(Path(folder, f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
            states = [megabytes(max(each[mode]["state"] for each in found)) for mode in MODES]
            full = found[0]["full"]
            lines.append(f"| {ranks} | {' | '.join(states)} | {megabytes(full['received'])} | {full['collectives']} |")
            expected = computed(SMOLLM2, ranks)
            assert full["received"] == expected["received"], "the computed tables below would be wrong"
    lines += ["", f"## Computed: Llama-3.1-70B, r = {R}, all linear layers", "", head, rule]
    for ranks in (1, 8, 16, 64, 128, 256, 512, 1024):
        of = computed(LLAMA_70B, ranks)
        states = [megabytes(of["state"][mode]) for mode in MODES]  # type: ignore[index]
        lines.append(f"| {ranks} | {' | '.join(states)} | {megabytes(of['received'])} | {of['collectives']} |")  # type: ignore[arg-type]
    lines += [
        "",
        "State is the size of the moments on the rank that keeps the most. Received counts the new factors from the "
        "other ranks, in float32; each rank sends its factors to all. DDP averages the gradients as for plain LoRA; "
        "they are not counted. The last collective is that of the gradient norm. In a collective each rank sends as "
        "much as the rank that owns the most pairs of a shape: with more ranks than pairs of a shape, 80 or 160 here, "
        "traffic grows with the ranks while state and work no longer shrink.",
    ]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
