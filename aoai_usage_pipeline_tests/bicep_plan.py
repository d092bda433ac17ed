"""What a deployment of Bicep files would make: their resources with the values that given parameters lead to.

What only Azure knows is a text that says what it is: `«Microsoft.Storage/storageAccounts/x».id`.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aoai_usage_pipeline_tests.bicep import File, Project, Symbol
from aoai_usage_pipeline_tests.bicep_syntax import SPREAD, Node, entries, kids, lambda_of, pieces, text

Value = Any
Local = Mapping[str, Value]


@dataclasses.dataclass(frozen=True, eq=False)
class Resource:
    """A resource with its whole type and name; `scope` is the resource that an extension is put on."""

    type: str
    name: str
    body: dict[str, Value]
    existing: bool
    file: str
    scope: "Resource | None" = None
    children: dict[str, "Resource"] = dataclasses.field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"«{self.type}/{self.name}».id"

    def __str__(self) -> str:
        return f"«{self.type}/{self.name}»"


def plan(main: Path, **parameters: Value) -> list[Resource]:
    """The resources of a file and its modules, without those that are there already. Raises `LookupError` where something is used that the
    parameters leave out.
    """
    deployment = _deployment(main, parameters)
    for name in deployment.outputs():
        deployment.output(name)
    return [resource for resource in deployment.resources() if not resource.existing]


def outputs(main: Path, **parameters: Value) -> dict[str, Value]:
    """The outputs of a file."""
    deployment = _deployment(main, parameters)
    return {name: deployment.output(name) for name in deployment.outputs()}


def _deployment(main: Path, parameters: Mapping[str, Value]) -> "Deployment":
    file = Project(main.parent).file(main)
    if file is None:
        raise FileNotFoundError(main)
    return Deployment(file, parameters)


class Deployment:
    """A file with its parameters."""

    def __init__(self, file: File, parameters: Mapping[str, Value]) -> None:
        self._file, self._parameters = file, parameters
        self._values: dict[str, Value] = {}
        self._made: list[Resource] = []

    def resources(self) -> Iterator[Resource]:
        for symbol in self._file.symbols.values():
            if symbol.kind in ("resource", "module"):
                self.value(symbol)
        yield from self._made
        for value in list(self._values.values()):
            for module in value if isinstance(value, list) else [value]:
                if isinstance(module, Deployment):
                    yield from module.resources()

    def outputs(self) -> list[str]:
        return list(self._file.outputs)

    def output(self, name: str) -> Value:
        return self.evaluate(self._file.outputs[name].value, {})

    def value(self, symbol: Symbol) -> Value:
        """What a name stands for."""
        if symbol.name not in self._values:
            self._values[symbol.name] = self._value(symbol)
        return self._values[symbol.name]

    def _value(self, symbol: Symbol) -> Value:
        if symbol.kind == "param":
            if symbol.name in self._parameters:
                return self._parameters[symbol.name]
            return self.evaluate(symbol.value, {}) if symbol.value else f"«{symbol.name}»"
        if symbol.kind == "var":
            return self.evaluate(symbol.value, {})
        return self._each(symbol.value, {}, lambda node, local: self._make(symbol, node, local))

    def _each(self, node: Node | None, local: Local, make: Callable[[Node, Local], Value]) -> Value:
        """What is made of a body, once or in a loop; None where its condition does not hold."""
        assert node is not None
        if node.type == "for_statement":
            return [self._each(kids(node)[-1], inside, make) for inside in self._loop(node, local)]
        if node.type == "if_statement":
            return self._each(kids(node)[-1], local, make) if self.evaluate(kids(node)[0], local) else None
        return make(node, local)

    def _loop(self, node: Node, local: Local) -> Iterator[Local]:
        names = [text(n) for n in ([kids(node)[0]] if kids(node)[0].type == "identifier" else kids(kids(node)[0]))]
        items = self.evaluate(kids(node)[1], local)
        for i, item in enumerate(items if isinstance(items, list) else []):
            yield {**local, **dict(zip(names, (item, i), strict=False))}

    def _make(self, symbol: Symbol, node: Node, local: Local, parent: Resource | None = None) -> Value:
        if symbol.kind == "module":
            file = self._file.module(symbol)
            params = next((value for key, _, value in entries(node) if key == "params"), None)
            return Deployment(file, self.evaluate(params, local) if params else {}) if file else None
        values = {key: self.evaluate(value, local) for key, _, value in entries(node) if key}
        parent = values.pop("parent", parent)
        name = f"{parent.name}/{values['name']}" if isinstance(parent, Resource) else str(values["name"])
        scope = values.pop("scope", None)
        on = scope if isinstance(scope, Resource) else None
        made = Resource(symbol.type_name, name, values, symbol.existing, self._file.project.name(self._file.path), on)
        self._made.append(made)
        for child in [kids(e)[0] for e in kids(node) if e.type == "object_property" and kids(e)[0].type == "resource_declaration"]:
            nested = next(s for s in self._file.nested if s.node == child)
            inside = {**local, symbol.name: made, **made.children}
            made.children[nested.name] = self._each(nested.value, inside, lambda n, where, nested=nested: self._make(nested, n, where, made))
        return made

    def evaluate(self, node: Node | None, local: Local) -> Value:
        """The value of an expression."""
        assert node is not None
        inner = kids(node)
        match node.type:
            case "string":
                return "".join(piece if isinstance(piece, str) else _string(self.evaluate(piece, local)) for piece in pieces(node))
            case "number":
                return int(text(node))
            case "boolean":
                return text(node) == "true"
            case "null":
                return None
            case "array":
                return [self.evaluate(c, local) for c in inner]
            case "object":
                return self._object(node, local)
            case "parenthesized_expression":
                return self.evaluate(inner[0], local)
            case "ternary_expression":
                return self.evaluate(inner[1] if self.evaluate(inner[0], local) else inner[2], local)
            case "for_statement":
                return [self.evaluate(inner[-1], inside) for inside in self._loop(node, local)]
            case "unary_expression":
                return not self.evaluate(inner[0], local) if text(node)[0] == "!" else -self.evaluate(inner[0], local)
            case "binary_expression":
                return self._binary(text(node.fields["operator"]), inner[0], inner[-1], local)
            case "identifier":
                return self._name(text(node), local)
            case "member_expression":
                return self._member(node, local)
            case "resource_expression":
                return self.evaluate(inner[0], local).children[text(inner[-1])]
            case "subscript_expression":
                of, index = self.evaluate(inner[0], local), self.evaluate(inner[-1], local)
                return of[index] if isinstance(of, list) and isinstance(index, int) and index < len(of) else _member(of, str(index))
            case "call_expression":
                return self._call(node, local)
        raise NotImplementedError(f"{self._file.path}: {node.type}")

    def _member(self, node: Node, local: Local) -> Value:
        of, name = self.evaluate(kids(node)[0], local), text(kids(node)[-1])
        if (of is None or (isinstance(of, dict) and name not in of)) and ".?" not in [c.text for c in node.children]:
            raise LookupError(f"{self._file.project.name(self._file.path)}:{node.start_point[0] + 1}: there is no {text(node)}")
        return _member(of, name)

    def _object(self, node: Node, local: Local) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for key, at, value in entries(node):
            if key == SPREAD:
                found |= self.evaluate(value, local)
            else:
                found[_string(self.evaluate(at, local)) if key is None else key] = self.evaluate(value, local)
        return found

    def _name(self, name: str, local: Local) -> Value:
        if name in local:
            return local[name]
        if name in self._file.imports and (found := self._file.imported(name)):
            return Deployment(found[0], {}).value(found[1])
        return self.value(self._file.symbols[name])

    def _binary(self, operator: str, left: Node, right: Node, local: Local) -> Value:
        a = self.evaluate(left, local)
        if operator in ("&&", "||", "??"):
            decided = {"&&": not a, "||": bool(a), "??": a is not None}[operator]
            return a if decided else self.evaluate(right, local)
        b = self.evaluate(right, local)
        compare: dict[str, Callable[[], Value]] = {
            "==": lambda: a == b,
            "!=": lambda: a != b,
            "=~": lambda: a.lower() == b.lower(),
            "<": lambda: a < b,
            "<=": lambda: a <= b,
            ">": lambda: a > b,
            ">=": lambda: a >= b,
            "+": lambda: a + b,
            "-": lambda: a - b,
            "*": lambda: a * b,
            "/": lambda: a // b,
            "%": lambda: a % b,
        }
        return compare[operator]()

    def _call(self, node: Node, local: Local) -> Value:
        function, arguments = text(kids(node)[0]), kids(kids(node)[-1])
        if arguments and arguments[-1].type == "lambda_expression":
            names, result = lambda_of(arguments[-1])
            items = self.evaluate(arguments[0], local)
            results = [(item, self.evaluate(result, {**local, **dict(zip(names, (item, i), strict=False))})) for i, item in enumerate(items)]
            return [item for item, kept in results if kept] if function == "filter" else [value for _, value in results]
        values = [self.evaluate(a, local) for a in arguments]
        if function == "loadTextContent":
            return (self._file.path.parent / values[0]).read_text()
        if function == "loadJsonContent":
            return json.loads((self._file.path.parent / values[0]).read_text())
        if function in _KNOWN:
            return _KNOWN[function](*values)
        return f"«{function}({', '.join(map(_string, values))})»"


def _string(value: Value) -> str:
    if isinstance(value, bool | list | dict) or value is None:
        return json.dumps(value, default=str)
    return str(value)


def _member(of: Value, name: str) -> Value:
    if isinstance(of, Resource):
        plain = {"id": of.id, "name": of.name.rpartition("/")[2], "type": of.type}
        return plain[name] if name in plain else _Part(of, "", of.body).member(name)
    if isinstance(of, _Part):
        return of.member(name)
    if isinstance(of, Deployment):
        return _Outputs(of) if name == "outputs" else f"«module».{name}"
    if isinstance(of, _Outputs):
        return of.deployment.output(name)
    return of.get(name) if isinstance(of, dict) else None if of is None else f"{of}.{name}"


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a resource was given somewhere; Azure adds the rest."""

    resource: Resource
    path: str
    given: dict[str, Value]

    def member(self, name: str) -> Value:
        path = f"{self.path}.{name}"
        found = self.given.get(name, {} if name in ("properties", "identity") else f"{self.resource}{path}")
        return _Part(self.resource, path, found) if isinstance(found, dict) else found


@dataclasses.dataclass(frozen=True)
class _Outputs:
    deployment: Deployment


def _union(*values: Value) -> Value:
    if isinstance(values[0], list):
        joined = list(itertools.chain(*values))
        return [v for i, v in enumerate(joined) if v not in joined[:i]]
    found: dict[str, Value] = {}
    for value in values:
        for key, new in value.items():
            found[key] = _union(found[key], new) if isinstance(found.get(key), dict) and isinstance(new, dict) else new
    return found


_KNOWN: dict[str, Callable[..., Value]] = {
    "array": lambda value: value if isinstance(value, list) else [value],
    "bool": lambda value: str(value).lower() == "true",
    "concat": lambda *values: list(itertools.chain(*values)) if isinstance(values[0], list) else "".join(values),
    "contains": lambda of, what: what in of,
    "empty": lambda value: not value,
    "endsWith": lambda value, end: value.lower().endswith(end.lower()),
    "first": lambda value: value[0] if value else None,
    "flatten": lambda value: list(itertools.chain(*value)),
    "int": int,
    "items": lambda value: [{"key": k, "value": v} for k, v in sorted(value.items())],
    "json": json.loads,
    "last": lambda value: value[-1] if value else None,
    "length": len,
    "range": lambda start, count: list(range(start, start + count)),
    "replace": lambda value, old, new: value.replace(old, new),
    "split": lambda value, by: value.split(by),
    "startsWith": lambda value, start: value.lower().startswith(start.lower()),
    "string": _string,
    "subscriptionResourceId": lambda *parts: "/".join(parts),
    "take": lambda value, count: value[:count],
    "toLower": lambda value: value.lower(),
    "toUpper": lambda value: value.upper(),
    "union": _union,
    "uniqueString": lambda *_: "abcdefghijklm",  # as long as Azure's
}
