"""geofx: factorize the matmuls of a traced model under a budget, measured and exported."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parent.parent
if (_ROOT / "pyproject.toml").is_file():  # run from a checkout: passes/ and cost_models/ lie beside geofx/
    __path__.append(str(_ROOT))

from geofx import recipes, runtime  # noqa: E402
from geofx.analysis import Analysis  # noqa: E402
from geofx.api import analyze, load_analysis, optimize  # noqa: E402
from geofx.budget import Budget  # noqa: E402
from geofx.compare import compare  # noqa: E402
from geofx.comparison import Comparison  # noqa: E402
from geofx.errors import GeofxError  # noqa: E402
from geofx.model import OptimizedModel  # noqa: E402
from geofx.plan import Plan  # noqa: E402
from geofx.pretrained import register  # noqa: E402
from geofx.program import Program  # noqa: E402
from geofx.restore import load  # noqa: E402
from geofx.target import Target  # noqa: E402
from geofx.trace import trace  # noqa: E402

register()

__version__ = "0.1.0"
__all__ = [
    "Analysis",
    "Budget",
    "Comparison",
    "GeofxError",
    "OptimizedModel",
    "Plan",
    "Program",
    "Target",
    "analyze",
    "compare",
    "load",
    "load_analysis",
    "optimize",
    "recipes",
    "runtime",
    "trace",
]
