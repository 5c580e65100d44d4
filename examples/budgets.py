"""One analysis, many budgets: the analysis is dear, a plan takes moments.

    python examples/budgets.py [MODEL]

MODEL is what ``geofx optimize`` takes, with a tokenizer; by default SmolLM2-135M from its package.
"""

from __future__ import annotations

import sys

import geofx
from geofx.sources import load_source
from geofx.text import python_text, windows


def main() -> None:
    """The predicted loss at seven sizes, and one of them made."""
    source = load_source(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    first, second = python_text()
    calibration, heldout = (
        list(windows(text, source.tokenizer, length=256, batch_size=2, limit_tokens=tokens))
        for text, tokens in ((first, 4096), (second, 1024))
    )
    analysis = geofx.analyze(source.model, calibration, holdout=heldout)
    for share in (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5):
        plan = analysis.plan(geofx.Budget(parameters=share, scope="factorizable"))
        changed = f"{len(plan.rewritten)} of {len(plan.choices)} rewritten"
        print(f"{share:.0%} of the linear parameters: predicted loss {plan.loss:.4f}, {changed}")
    result = analysis.apply(analysis.plan(geofx.Budget(parameters=0.9, scope="factorizable")))
    print(f"at 90 %: measured {result.fidelity.loss_increase:.4f}")


if __name__ == "__main__":
    main()
