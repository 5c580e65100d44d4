"""geofx: factorize the matmuls of a traced model under a budget, measured and exported."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parent.parent
if (_ROOT / "pyproject.toml").is_file():  # run from a checkout: passes/ and cost_models/ lie beside geofx/
    __path__.append(str(_ROOT))
