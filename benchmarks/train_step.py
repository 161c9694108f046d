"""What routing and bf16 autocast do to the time of a train step: forward, backward, AdamW.

`python benchmarks/train_step.py`: under a minute on one core; `--model ADM-T` for a U-Net. Variants run
one after the other in each round, and ratios are taken within a round, so that other work on the machine
weighs on all alike; on the CPU it is the process's own time that counts.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from clock import seconds

from dtr_ray.models import build_model

VARIANTS: dict[str, tuple[dict[str, object], bool]] = {
    "none, fp32": ({"name": "none"}, False),
    "dtr, fp32": ({"name": "dtr", "alpha": 4, "beta": 0.8}, False),
    "none, bf16": ({"name": "none"}, True),
    "dtr, bf16": ({"name": "dtr", "alpha": 4, "beta": 0.8}, True),
}
RATIOS = [
    ("dtr, fp32", "none, fp32"),
    ("dtr, bf16", "none, bf16"),
    ("none, bf16", "none, fp32"),
    ("dtr, bf16", "dtr, fp32"),
]


def dit_sizes(options: argparse.Namespace) -> dict[str, object]:
    """The DiT that the options ask for size by size."""
    sizes = {key: getattr(options, key) for key in ("hidden_size", "depth", "num_heads")}
    return {"name": "DiT", "patch_size": 2} | sizes


def make_step(options: argparse.Namespace, routing: dict[str, object], bf16: bool) -> Callable[[], None]:
    """One variant: a function that makes one train step."""
    torch.manual_seed(0)
    sizes = {"name": options.model} if options.model else dit_sizes(options)
    inputs = {"input_size": options.input_size, "in_channels": 4, "num_classes": 1000}
    model = build_model(sizes | inputs, routing).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    size, batch = options.input_size, options.batch_size
    x = torch.randn(batch, 4, size, size, device=options.device)
    t = torch.randint(1000, (batch,), device=options.device)
    y = torch.randint(1000, (batch,), device=options.device)

    def step() -> None:
        with torch.autocast(options.device, dtype=torch.bfloat16, enabled=bf16):
            loss = model(x, t, y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=1, help="steps a round; 10 or more on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="a preset, such as ADM-T, in place of a DiT of the next three sizes")
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--num-heads", type=int, default=3)
    parser.add_argument("--input-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    steps = {name: make_step(options, routing, bf16) for name, (routing, bf16) in VARIANTS.items()}
    for step in steps.values():
        seconds(step, options.device, 2)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds):
        # Every other round backwards: no variant always follows the same one.
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds(steps[name], options.device, options.repeats))

    tokens = (options.input_size // 2) ** 2
    sizes = f"hidden {options.hidden_size}, depth {options.depth}, {tokens} tokens"
    print(
        f"{options.model or sizes}, {options.input_size} px, batch {options.batch_size}, "
        f"{options.device}, torch {torch.__version__}, {options.rounds} rounds"
    )
    print(f"{'variant':24}{'ms a step (median)':>20}")
    for name, values in times.items():
        print(f"{name:24}{1000 * statistics.median(values):20.1f}")
    print(f"{'ratio':36}{'median':>8}{'lowest':>8}{'highest':>8}")
    for name, base in RATIOS:
        ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
        print(f"{f'{name} / {base}':36}{statistics.median(ratios):8.3f}{min(ratios):8.3f}{max(ratios):8.3f}")


if __name__ == "__main__":
    main()
