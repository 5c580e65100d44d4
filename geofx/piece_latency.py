"""How long one use of a region takes, alone, with weights that no cache holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from geofx.cache import Cache
from geofx.calls import exported, loaded, ready
from geofx.digest import digest
from geofx.environment import environment, processor
from geofx.export.onnx_copies import with_copies
from geofx.latency import interleaved_medians
from geofx.piece import Piece
from geofx.program import Program, make_on
from geofx.progress import Progress, log_progress
from geofx.target import Target
from geofx.workload import measure

COLD_BYTES = 64 * 2**20
"""Weights of the copies that are called one after the other: more than caches keep."""
LIMIT_FLOPS = 4e9
"""Of one such call: where arithmetic binds, few copies will do."""
ROUNDS = 11


@dataclass(eq=False)
class PieceTimer:
    """Median seconds of pieces on a target, timed in turns, each in copies with weights of their own.

    What was timed is kept in ``cache`` by hardware, versions, threads, target and pieces.
    """

    target: Target
    cache: Cache | None = None
    progress: Progress = log_progress

    def __call__(self, pieces: Sequence[Piece], rows: int) -> list[float]:
        """Seconds of one use of each by a call of ``rows`` tokens."""
        if self.cache is None:
            return self._seconds(pieces, rows)
        key = digest(
            "piece latency", _hardware(self.target.device), environment(), self._setting(rows), repr(pieces)
        )
        with self.cache.claimed(key):
            found = self.cache.read(key)
            if found is None:
                found = self._seconds(pieces, rows)
                self.cache.write(key, found)
        return [float(value) for value in found]

    def _setting(self, rows: int) -> list[str]:
        return [self.target.runtime, self.target.device, str(rows), str(torch.get_num_threads())]

    def _seconds(self, pieces: Sequence[Piece], rows: int) -> list[float]:
        calls, counts = {}, []
        for number, piece in enumerate(pieces):
            counts.append(copies_of(piece, rows))
            calls[str(number)] = self._call(piece, rows, counts[-1])
            self.progress("time options", number, len(pieces))
        medians = interleaved_medians(calls, ROUNDS, lambda *_: None)
        return [medians[str(number)] / count for number, count in enumerate(counts)]

    def _call(self, piece: Piece, rows: int, count: int) -> Callable[[], Any]:
        if self.target.runtime != "onnxruntime":
            program = repeated(piece, rows, count)
            return ready(program, program.example, self.target, rows)
        one = repeated(piece, rows, 1)
        return loaded(with_copies(exported(one), count), one.example)


def _hardware(device: str) -> str:
    return processor() if device == "cpu" else torch.cuda.get_device_name(device)


def copies_of(piece: Piece, rows: int) -> int:
    """How many copies make a call that no cache serves, or that takes long enough as it is."""
    work = measure(piece.form, piece.region)
    cold = math.ceil(COLD_BYTES / max(1, work.weight_bytes))
    return max(2, min(cold, 128, math.ceil(LIMIT_FLOPS / max(1.0, work.flops * rows))))


def repeated(piece: Piece, rows: int, count: int) -> Program:
    """``count`` copies of a piece on the same inputs, each with its own factors; a column of each output."""
    lead = (1, rows)
    one, inputs = piece.traced(lead), piece.inputs(lead, "cpu")
    graph, root, found = fx.Graph(), nn.Module(), list[fx.Node]()
    names = tuple(f"x{number}" for number in range(len(inputs)))
    given, factors = [graph.placeholder(name) for name in names], piece.factors("cpu").values()
    for copy in range(count):
        own = []
        for number, part in enumerate(factors):
            root.register_buffer(f"copy{copy}_factor{number}", _another(part, copy))
            own.append(graph.create_node("get_attr", f"copy{copy}_factor{number}"))
        found += _inlined(graph, one, [*given, *own])
    graph.output(tuple(found))
    make_on(graph, "cpu")
    return Program(fx.GraphModule(root, graph), names, dict(zip(names, inputs, strict=True)), {}, {})


def _another(part: Tensor, copy: int) -> Tensor:
    """The same tensor elsewhere, with numbers of its own, so that nobody takes two for one."""
    return part * (1.0 + copy / 1024) if part.is_floating_point() else part.clone()


def _inlined(graph: fx.Graph, one: fx.GraphModule, values: Sequence[fx.Node]) -> list[fx.Node]:
    aten, known, given = torch.ops.aten, dict[fx.Node, fx.Node](), iter(values)
    for node in one.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "output":
            outputs = [known[item] for item in node.args[0]]
            narrow = [graph.call_function(aten.slice.Tensor, (item, -1, 0, 1)) for item in outputs]
            return [graph.call_function(aten.clone.default, (item,)) for item in narrow]
        else:
            known[node] = graph.node_copy(node, known.__getitem__)
    raise AssertionError("a traced graph has an output")
