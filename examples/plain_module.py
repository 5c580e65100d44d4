"""Any torch.nn.Module with any loss: here a classifier that is trained for a moment and then compressed.

    python examples/plain_module.py

The two functions also serve the command line, from this folder:

    geofx optimize plain_module:model --data plain_module:batches --size 0.5 -o out
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import geofx


def model() -> nn.Module:
    """A classifier of 20 numbers into 5 classes."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for batch in batches(200):
        optimizer.zero_grad()
        functional.cross_entropy(network(batch["input"]), batch["labels"]).backward()
        optimizer.step()
    return network.eval()


def batches(count: int = 16) -> list[dict[str, Tensor]]:
    """Inputs by the name of forward's argument; whatever else a batch holds is for the loss."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(20, 5, generator=generator)
    inputs = [torch.randn(64, 20, generator=generator) for _ in range(count)]
    return [{"input": rows, "labels": (rows @ truth).argmax(-1)} for rows in inputs]


def main() -> None:
    """Half the bytes, by the loss that the model was trained for."""
    result = geofx.optimize(
        model(),
        geofx.Budget(size=0.5),
        calibration=batches(),
        loss=lambda output, batch: functional.cross_entropy(output, batch["labels"], reduction="none"),
    )
    print(result.plan)
    print(f"loss {result.fidelity.loss_original:.4f} -> {result.fidelity.loss_optimized:.4f}")
    print(result.program.graph_module.code)


if __name__ == "__main__":
    main()
