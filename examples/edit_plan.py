"""A plan changed by hand, in Python and in its file: the planner proposes, and you have the last word.

python examples/edit_plan.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from plain_module import batches, model
from torch.nn import functional

import geofx
from geofx.factorizations import Dense, LowRank


def main() -> None:
    """One rank chosen in Python, one map left whole in the file, both applied."""
    data = batches(24)
    analysis = geofx.analyze(
        model(),
        data[:16],
        holdout=data[16:],
        loss=lambda output, batch: functional.cross_entropy(output, batch["labels"], reduction="none"),
    )
    plan = analysis.plan(geofx.Budget(parameters=0.5), formats=["low_rank"])
    region = plan.rewritten[0].region
    smaller = plan.edit({region: LowRank(rank=8)})
    print(f"{region}: {plan.rewritten[0].factorization} -> {smaller.rewritten[0].factorization}")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        smaller.save(file)
        entries = json.loads(file.read_text())
        entry = next(item for item in entries["choices"] if item["region"] == region)
        entry["factorization"] = {"name": "low_rank", "rank": 4}  # what an editor would do
        file.write_text(json.dumps(entries))
        smallest = geofx.Plan.load(file)

    whole = plan.edit({region: Dense()})
    results = [analysis.apply(each) for each in (whole, plan, smaller, smallest)]
    for result in results:
        found = result.fidelity
        print(
            f"{result.program.parameter_count()} parameters: predicted loss {result.plan.loss:.4f}, "
            f"measured {found.loss_original:.4f} -> {found.loss_optimized:.4f}"
        )
    assert [choice.factorization.rank for choice in smallest.rewritten] == [4]
    assert [result.plan.loss for result in results] == sorted(result.plan.loss for result in results)


if __name__ == "__main__":
    main()
