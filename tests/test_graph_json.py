"""A Program through JSON and back: the same bits out, and nothing but tensor operators in."""

from __future__ import annotations

import contextlib
import copy
import math
import operator
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from geofx import strict_json
from geofx.errors import ArtifactCorruptError, ArtifactError
from geofx.graph_json import graph_from_json, graph_tensors, graph_to_json
from geofx.graph_ops import function_name, named_function
from geofx.program import Program
from geofx.trace import trace

Pair = namedtuple("Pair", "left right")


class Mixed(nn.Module):
    """Tied, transposed, integer and infinite constants, arguments of many kinds, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.conv1d = nn.Parameter(torch.randn(6, 6))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.register_buffer("floor", torch.tensor([-math.inf, 0.0, 1, 2, 3, 4]))
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 5, 4], dtype=torch.int32))
        self.conv1d.data = self.conv1d.data.t()

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        x = self.table(ids) @ self.conv1d + self.frozen
        x = torch.maximum(x, self.floor)[..., self.order]
        hidden = x.masked_fill(mask[..., None] == 0, -1e4).softmax(-1, dtype=torch.float64).float()
        rows = torch.arange(ids.shape[0] * 2 - 1, device=ids.device)
        return {"zz": hidden, "a": (self.head(x), None, [rows.clamp(min=1), x[:, 1:, ::2]])}


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return trace(Mixed().eval(), {"ids": torch.randint(0, 11, (3, 5)), "mask": torch.ones(3, 5)})


def returning(make: Any) -> Program:
    class Returning(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return make(x + 1)

    return trace(Returning().eval(), {"x": torch.randn(2, 3)})


def there_and_back(program: Program) -> Program:
    text = strict_json.dumps(graph_to_json(program))
    loaded = graph_from_json(strict_json.loads(text, "graph.json"), graph_tensors(program))
    assert strict_json.dumps(graph_to_json(loaded)) == text
    return loaded


def assert_same_value(first: Any, second: Any) -> None:
    assert pytree.tree_structure(first) == pytree.tree_structure(second)
    for one, other in zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
        else:
            assert one == other


def test_outputs_are_the_same_bits_and_keep_their_nesting(program: Program) -> None:
    loaded = there_and_back(program)
    assert_same_value(program(**program.example), loaded(**loaded.example))
    other = {"ids": torch.randint(0, 11, (4, 9)), "mask": (torch.rand(4, 9) > 0.3).float()}
    assert_same_value(program(**other), loaded(**other))
    assert list(loaded(**other)) == ["zz", "a"]


def test_everything_but_node_metadata_is_restored(program: Program) -> None:
    loaded = there_and_back(program)
    assert loaded.input_names == program.input_names
    assert loaded.dynamic_shapes == program.dynamic_shapes != {}
    assert loaded.aliases == program.aliases != {}
    assert_same_value(dict(loaded.example), dict(program.example))
    for (name, old), (new_name, new) in zip(program.tensors(), loaded.tensors(), strict=True):
        assert name == new_name
        assert (new.stride(), new.requires_grad, type(new)) == (old.stride(), old.requires_grad, type(old))
    assert [str(node.target) for node in loaded.graph.nodes] == [
        str(node.target) for node in program.graph.nodes
    ]
    assert loaded.weight("head.weight") is loaded.weight("table.weight")


def test_a_tensor_under_two_names_is_stored_and_loaded_once() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first, second = graph.get_attr("a"), graph.get_attr("b")
    summed = graph.call_function(torch.ops.aten.add.Tensor, (x, first))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (summed, second)))
    weight = nn.Parameter(torch.randn(3))
    module = fx.GraphModule({"a": weight, "b": weight}, graph)
    program = Program(module, ("x",), {"x": torch.ones(2, 3)}, {}, {})
    assert set(graph_tensors(program)) == {"a", "example/x"}
    loaded = there_and_back(program)
    assert loaded.attribute("a") is loaded.attribute("b")
    assert_same_value(program(**program.example), loaded(**loaded.example))


def test_constants_and_nested_values_in_the_example() -> None:
    program = returning(lambda x: x)
    example = {"x": program.example["x"]}
    loaded = there_and_back(Program(program.graph_module, ("x",), example, {"x": {0: "batch"}}, {}))
    assert loaded.dynamic_shapes == {"x": {0: "batch"}}
    nested = {"x": [torch.ones(2), {"k": (torch.zeros(1), None, 2.5, False, slice(None, 3))}]}
    loaded = there_and_back(Program(program.graph_module, ("x",), nested, {}, {}))
    assert_same_value(dict(loaded.example), nested)


@pytest.mark.parametrize(
    "value", [math.inf, -math.inf, 0.1, -0.0, 1, True, 2**63 - 1, 1 + 2j, complex(0, math.inf)]
)
def test_numbers_are_exact(value: complex) -> None:
    program = returning(lambda x: x)
    node = next(node for node in program.graph.nodes if node.op == "call_function")
    node.args = (node.args[0], value)
    loaded = there_and_back(program)
    stored = next(node for node in loaded.graph.nodes if node.op == "call_function").args[1]
    assert (repr(stored), type(stored)) == (repr(value), type(value))


def test_hugging_face_outputs_keep_their_class(caplog: pytest.LogCaptureFixture) -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    program = returning(lambda x: outputs.CausalLMOutputWithPast(logits=x, hidden_states=(x, x)))
    result = there_and_back(program)(torch.zeros(2, 3))
    assert type(result) is outputs.CausalLMOutputWithPast
    assert_same_value(result, program(torch.zeros(2, 3)))
    assert "dict" not in caplog.text


def test_other_classes_become_dicts_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    result = there_and_back(returning(lambda x: Pair(x, x * 2)))(torch.zeros(1, 3))
    assert type(result) is dict
    assert list(result) == ["left", "right"]
    assert "Pair" in caplog.text
    assert "dict" in caplog.text
    assert type(there_and_back(returning(lambda x: OrderedDict(q=x)))(torch.zeros(1, 3))) is dict


def test_a_class_that_this_machine_lacks_becomes_a_dict(
    program: Program, caplog: pytest.LogCaptureFixture
) -> None:
    data = graph_to_json(program)
    data["output"] = {"class": ["system", data["output"]["dict"]]}
    assert type(graph_from_json(data, graph_tensors(program))(**program.example)) is dict
    assert "system" in caplog.text


# --- what cannot be saved


def test_submodules_higher_order_and_custom_operators_are_refused(program: Program) -> None:
    module_call = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ArtifactError, match="call_module of 0"):
        graph_to_json(Program(module_call, ("input",), {}, {}, {}))
    for target in (torch.ops.higher_order.cond, torch.cond, print, torch.ops.aten.from_file.default):
        broken = program.clone()
        node = next(node for node in broken.graph.nodes if node.op == "call_function")
        node.target = target
        with pytest.raises(ArtifactError, match="cannot hold") as caught:
            graph_to_json(broken)
        assert caught.value.where == node.name


@pytest.mark.parametrize("name", ["class", 'a"b', "forward", "a\nb"])
def test_row_38_attribute_names_that_break_generated_code_are_refused(program: Program, name: str) -> None:
    tensors = graph_tensors(program)
    data = graph_to_json(program)
    old = next(iter(data["tensors"]))
    data["tensors"][name] = data["tensors"].pop(old)
    for node in data["nodes"]:
        node["target"] = name if node["target"] == old else node["target"]
    with pytest.raises(ArtifactCorruptError, match="name of a tensor"):
        graph_from_json(data, tensors)


# --- hostile graphs


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "builtins.__import__",
        "builtins.getattr",
        "operator.attrgetter",
        "operator.methodcaller",
        "operator.call",
        "torch.load",
        "torch.ops.load_library",
        "subprocess.run",
        "aten.from_file.default",
        "aten.from_file.out",
        "aten.save.default",
        "aten.set_.source_Storage",
        "aten.set_.source_Tensor_storage_offset",
        "aten.__class__.default",
        "aten.__init__.default",
        "aten._dir.default",
        "aten.add.__class__",
        "aten.add.op",
        "aten.add",
        "aten.add.Tensor.x",
        "aten.add.Tensor\n",
        "aten._print.default",
        "aten.warn.default",
        "aten.wait.default",
        "aten.no_such_thing.default",
        "prim.Print.default",
        "inductor.add.default",
        "",
    ],
)
def test_row_118_functions_outside_the_closed_set_are_refused(program: Program, target: str) -> None:
    data, tensors = graph_to_json(program), graph_tensors(program)
    next(node for node in data["nodes"] if node["op"] == "call_function")["target"] = target
    with pytest.raises(ArtifactCorruptError, match="not a tensor operator"):
        graph_from_json(data, tensors)


def test_every_function_of_the_closed_set_is_found_under_its_name() -> None:
    for target in (
        operator.getitem,
        operator.floordiv,
        torch.sym_max,
        math.ceil,
        torch.ops.aten.sym_size.int,
    ):
        assert named_function(function_name(target, "")) is target


def first(data: Any, op: str) -> Any:
    return next(node for node in data["nodes"] if node["op"] == op)


CODE = "ids=__import__('pathlib').Path('canary').touch()"
EVIL: dict[str, Callable[[Any], Any]] = {
    "default that runs": lambda data: (
        data.update(output=None),
        first(data, "placeholder").update(target=CODE),
    ),
    "placeholder": lambda data: first(data, "placeholder").update(target=CODE),
    "input": lambda data: operator.setitem(data["inputs"][0], 0, CODE),
    "node name": lambda data: first(data, "call_function").update(name=CODE),
    "keyword": lambda data: first(data, "call_function")["kwargs"].update({CODE: 1}),
    "attribute": lambda data: first(data, "get_attr").update(target="__class__"),
    "dunder tensor": lambda data: data["tensors"].update({"__class__.x": data["tensors"]["frozen"]}),
    "operation": lambda data: first(data, "call_function").update(op="call_method", target="__reduce__"),
    "submodule": lambda data: first(data, "call_function").update(op="call_module", target="x"),
    "device": lambda data: first(data, "call_function")["args"].append({"device": "__import__('os')"}),
    "constant": lambda data: first(data, "call_function")["args"].append({"torch": "ops"}),
    "kind": lambda data: first(data, "call_function")["args"].append({"pickle": "gASV"}),
    "file tensor in a node": lambda data: first(data, "call_function")["args"].append({"tensor": "frozen"}),
    "cycle": lambda data: first(data, "call_function")["args"].append({"node": data["nodes"][-2]["name"]}),
    "no output": lambda data: data["nodes"].pop(),
    "two outputs": lambda data: data["nodes"].append(copy.deepcopy(data["nodes"][-1])),
    "order": lambda data: data["tensors"]["frozen"].update(order=[0, 0, 7]),
    "leaves": lambda data: operator.setitem(data["inputs"][0], 1, {"tuple": ["*", "*"]}),
}


@pytest.mark.parametrize("case", EVIL)
def test_row_118_hostile_graphs_are_refused_and_run_nothing(
    program: Program, case: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = graph_to_json(program)
    EVIL[case](data)
    named = "is not a name" if CODE in strict_json.dumps(data) else "not well formed"
    with pytest.raises(ArtifactCorruptError, match=named):
        graph_from_json(data, graph_tensors(program))
    assert not list(tmp_path.iterdir())


def test_row_104_tensors_must_be_exactly_those_of_the_graph(program: Program) -> None:
    data, tensors = graph_to_json(program), graph_tensors(program)
    for name in tensors:
        with pytest.raises(ArtifactCorruptError, match="not well formed"):
            graph_from_json(data, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ArtifactCorruptError, match="extra"):
        graph_from_json(data, tensors | {"extra": torch.zeros(1)})


def places(value: Any) -> list[tuple[Any, Any]]:
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


GARBAGE = st.sampled_from(
    [None, -1, 2**62, 0.5, "", "x", "*", [], {}, [[]], {"node": "x"}, {"tuple": 3}, {"a": 1, "b": 2}]
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_row_104_any_damage_is_a_typed_error_or_still_a_graph(data: st.DataObject) -> None:
    torch.manual_seed(0)
    document = copy.deepcopy(DOCUMENT)
    owner, key = data.draw(st.sampled_from(range(len(places(document))))), data.draw(GARBAGE)
    holder, index = places(document)[owner]
    holder[index] = key
    with contextlib.suppress(ArtifactCorruptError):
        assert isinstance(graph_from_json(document, TENSORS), Program)


LAYERS = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).eval()
SMALL = trace(LAYERS, {"input": torch.randn(2, 3)})
DOCUMENT, TENSORS = graph_to_json(SMALL), graph_tensors(SMALL)
