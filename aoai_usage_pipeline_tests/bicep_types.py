"""Types of Bicep: what is known of a value and asked of it, and the resource types, which the npm package @azure/mcp has in it.

The package is asked once per type, offline, and what it says is kept beside it. It names some types that it does not have; those that infra/ needs are
written by hand in data/bicep_types.json.
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Property:
    type: "Type"
    required: bool = False
    read_only: bool = False


@dataclasses.dataclass(frozen=True)
class Shape:
    """The properties of an object; `others` is the type of those that are not listed, None where there may be none."""

    properties: Mapping[str, Property]
    others: "Type | None" = None
    discriminator: str | None = None
    variants: Mapping[object, "Shape"] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Type:
    """What is known of a value, or asked of it. `values` are the literals it is one of; empty: any. `limits` are minLength and its like."""

    kind: str = "any"
    values: tuple[object, ...] = ()
    item: "Type | None" = None
    shape: Callable[[], Shape] | None = None
    limits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    nullable: bool = False

    def member(self, name: str) -> "Type | None":
        """The type of a property; None where there is no such property."""
        if self.kind != "object" or not self.shape:
            return ANY
        shape = self.shape()
        if name in shape.properties:
            return shape.properties[name].type
        return ANY if shape.discriminator else shape.others


ANY = Type()


def one_of(values: Sequence[object]) -> Type:
    kinds = {"bool" if isinstance(v, bool) else "int" if isinstance(v, int) else "string" for v in values}
    return Type(kinds.pop(), tuple(values)) if len(kinds) == 1 else ANY


def object_type(properties: Mapping[str, Property], others: Type | None = None) -> Type:
    return Type("object", shape=lambda: Shape(properties, others))


def merged(types: Sequence[Type]) -> Type:
    """What is known of a value that has one of several types."""
    known = [t for t in types if t.kind != "null"]
    if not known or len({t.kind for t in known}) > 1 or known[0].kind == "any":
        return ANY
    nullable = len(known) < len(types) or any(t.nullable for t in known)
    if len(known) == 1:
        return dataclasses.replace(known[0], nullable=nullable)
    if known[0].kind == "array":
        return Type("array", item=merged([t.item or ANY for t in known]), nullable=nullable)
    if known[0].kind == "object":
        # a property of one of them may be missing in another, so nothing is known of it for certain
        shapes = [t.shape() for t in known if t.shape]
        names = dict.fromkeys(name for shape in shapes for name in shape.properties)
        if len(shapes) < len(known) or any(shape.others or shape.discriminator for shape in shapes):
            return Type("object", nullable=nullable)
        found = {name: [s.properties[name] for s in shapes if name in s.properties] for name in names}
        return object_type({name: Property(merged([p.type for p in ps]), len(ps) == len(shapes)) for name, ps in found.items()})
    values = tuple(dict.fromkeys(v for t in known for v in t.values)) if all(t.values for t in known) else ()
    return Type(known[0].kind, values, nullable=nullable)


def unfit(actual: Type, expected: Type, where: str = "the value") -> Iterator[str]:
    """Why a value does not fit what is asked."""
    if "any" in (actual.kind, expected.kind) or (actual.kind == "null"):
        return
    if actual.kind != expected.kind:
        yield f"BCP036: {where} is of type {actual.kind}, expected {expected.kind}"
        return
    if expected.values:
        for value in actual.values:
            if value not in expected.values:
                yield f"BCP036: {where} is {value!r}, expected one of {', '.join(map(repr, expected.values))}"
    for name, limit in expected.limits.items():
        for value in actual.values:
            if _breaks(name, limit, value):
                yield f"BCP329: {where} is {value!r}, which breaks {name} {limit}"
    if expected.kind == "array" and actual.item and expected.item:
        yield from unfit(actual.item, expected.item, f"an item of {where}")
    if expected.kind == "object" and actual.shape and expected.shape:
        shape = actual.shape()
        yield from unfit_object({n: p.type for n, p in shape.properties.items()}, expected.shape(), shape.others is not None, where)
        for name, given in shape.properties.items():
            yield from unfit(given.type, expected.member(name) or ANY, name)


def _breaks(limit: str, text: str, value: object) -> bool:
    if limit == "pattern":
        return isinstance(value, str) and not re.search(text, value)
    size = len(value) if limit.endswith("Length") and isinstance(value, str) else value
    return isinstance(size, int) and (size < int(text) if limit.startswith("min") else size > int(text))


def unfit_object(actual: Mapping[str, Type], expected: Shape, open_: bool, where: str) -> Iterator[str]:
    properties, others = dict(expected.properties), expected.others
    if expected.discriminator:
        chosen = actual.get(expected.discriminator, ANY)
        variants = [expected.variants[v] for v in chosen.values if v in expected.variants] if chosen.values else list(expected.variants.values())
        for variant in variants:
            properties = {n: p if len(variants) == 1 else Property(p.type) for n, p in variant.properties.items()} | properties
        known = Property(Type("string", tuple(expected.variants)), True)
        properties[expected.discriminator] = known
        yield from unfit(chosen, known.type, expected.discriminator)
    for name in actual:
        if name not in properties and others is None:
            near = [p for p in properties if p.lower() == name.lower()]
            yield f"BCP037: {where} has no property {name}" + (f"; it is {near[0]}" if near else "")
        elif name in properties and properties[name].read_only:
            yield f"BCP073: property {name} is read-only"
    missing = [name for name, p in properties.items() if p.required and not p.read_only and name not in actual]
    if missing and not open_:
        yield f"BCP035: {where} lacks {', '.join(missing)}"


@dataclasses.dataclass(frozen=True)
class ResourceType:
    """What a resource of a type looks like in its newest known API version, and the scope that it is deployed to."""

    version: str
    scope: str
    body: Type


class _Schema:
    """What `azmcp bicepschema get` says of one resource type."""

    def __init__(self, data: Sequence[Mapping]) -> None:
        self._named = {t["name"]: t for t in data if t["$type"] != "ResourceInstanceFunction"}
        resource = next(t for t in data if t["$type"] == "Resource")
        scope = resource["writableScopes"][:1].lower() + resource["writableScopes"][1:]
        self.resource = ResourceType(resource["name"].partition("@")[2], scope, self._type(resource["bodyType"]))

    def _type(self, data: Mapping) -> Type:
        return Type("object", shape=functools.cache(lambda: self._shape(data)))

    def _shape(self, data: Mapping) -> Shape:
        others = data.get("additionalPropertiesType")
        variants = {}
        for element in data.get("elements", ()):
            shape = self._shape(element)
            variants.update(dict.fromkeys(shape.properties[data["discriminator"]].type.values, shape))
        properties = {p["name"]: self._property(p) for p in data.get("properties") or data.get("baseProperties") or ()}
        return Shape(properties, self._named_type(others) if others else None, data.get("discriminator"), variants)

    def _property(self, data: Mapping) -> Property:
        flags = data.get("flags", "")
        limits = dict(re.findall(r"(m\w+(?:Length|Value)|pattern): (.+?)(?=, (?:m\w+|pattern): |$)", data.get("modifiers", "")))
        return Property(dataclasses.replace(self._named_type(data["type"]), limits=limits), "Required" in flags, "ReadOnly" in flags)

    def _named_type(self, name: str) -> Type:
        if name.endswith("[]"):
            return Type("array", item=self._named_type(name[:-2]))
        if name in self._named:
            return self._type(self._named[name])
        if name in ("string", "int", "bool", "object", "array", "any"):
            return Type(name)
        # what may be any string by the data's word is one of the known values all the same: a value that is not is most likely misspelt
        values = [v for v in name.split(" | ") if v != "string"]
        if set(values) & self._named.keys():
            return ANY
        return Type("string", tuple(values))


def resource_type(data: Sequence[Mapping]) -> ResourceType:
    """A resource type from what `azmcp bicepschema get` prints."""
    return _Schema(data).resource


def own_type(name: str, body: Mapping) -> ResourceType:
    """A resource type that is written by hand: `key!` is required, `key=` read-only, `*` any other; a type is a name, literals, [item] or {object}."""

    def read(data: object) -> Type:
        if isinstance(data, list):
            return Type("array", item=read(data[0]))
        if isinstance(data, dict):
            known = {k.rstrip("!="): Property(read(v), k.endswith("!"), k.endswith("=")) for k, v in data.items() if k != "*"}
            return object_type(known, read(data["*"]) if "*" in data else None)
        return Type(str(data)) if data in ("string", "int", "bool", "any") else Type("string", tuple(str(data).split(" | ")))

    # what every resource has
    common = {"id=": "string", "type=": "string", "apiVersion=": "string"}
    return ResourceType(name.partition("@")[2], "", read({**body, **common}))


Types = Callable[[str], ResourceType | str | None]
"""A resource type by its name; a sentence where it is not known; None: not to be checked."""


def partial(expected: Type) -> Type:
    """What is asked of a part of an object."""
    if not expected.shape:
        return expected
    shape = expected.shape()
    return object_type({n: Property(p.type, False, p.read_only) for n, p in shape.properties.items()}, ANY if shape.discriminator else shape.others)


def json_type(value: object, unknown: Callable[[str], bool]) -> Type:
    """What is known of a value in JSON, in which some texts stand for something else."""
    if isinstance(value, float) or (isinstance(value, str) and unknown(value)):
        return ANY  # Bicep has no type for fractions
    if value is None:
        return Type("null")
    if isinstance(value, list):
        return Type("array", item=merged([json_type(v, unknown) for v in value]) if value else None)
    if isinstance(value, dict):
        return object_type({k: Property(json_type(v, unknown), True) for k, v in value.items()})
    return one_of([value])


_BY_HAND = json.loads((Path(__file__).parent / "data/bicep_types.json").read_text())
OWN_TYPES = {name.partition("@")[0]: own_type(name, body) for name, body in _BY_HAND.items()}


class TypeData:
    """The types of one installation of the package in a folder. Its server is started when the first type that is not kept is asked for."""

    def __init__(self, folder: Path, node: str) -> None:
        package = folder / "node_modules/@azure/mcp"
        self._command = [node, str(package / "index.js"), "server", "start", "--transport", "stdio", "--mode", "all", "--namespace", "bicepschema"]
        self._kept = folder / f"types-{json.loads((package / 'package.json').read_text())['version']}"
        self._kept.mkdir(exist_ok=True)
        self._server, self._id = None, 0

    def __enter__(self) -> "TypeData":
        return self

    def __exit__(self, *_: object) -> None:
        if self._server:
            self._server.communicate(timeout=30)

    def __call__(self, name: str) -> ResourceType | str:
        """A resource type, or why it is not known."""
        return OWN_TYPES[name] if name in OWN_TYPES else self.microsofts(name)

    def microsofts(self, name: str) -> ResourceType | str:
        """A resource type as the package has it, or why it has not."""
        path = self._kept / f"{name.replace('/', '_')}.json"
        if not path.exists():
            answer = self._ask("tools/call", {"name": "bicepschema_get", "arguments": {"resource-type": name}})
            content = json.loads(answer["content"][0]["text"])
            if content["status"] != 200:
                return f"{name} is not in the type data: {content['message'].partition(' To mitigate')[0]}"
            partly = path.with_suffix(f".{os.getpid()}")
            partly.write_text(json.dumps(content["results"]["BicepSchemaResult"]))
            partly.replace(path)
        return resource_type(json.loads(path.read_text()))

    def _ask(self, method: str, params: dict) -> dict:
        if self._server is None:
            env = os.environ | {"AZURE_MCP_COLLECT_TELEMETRY": "false"}
            pipe = subprocess.PIPE
            self._server = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=env)
            client = {"protocolVersion": "2024-11-05", "capabilities": {}, "clientInfo": {"name": "tests", "version": "1"}}
            self._ask("initialize", client)
            self._send({"method": "notifications/initialized"})
        self._id += 1
        self._send({"id": self._id, "method": method, "params": params})
        while line := self._server.stdout.readline():
            answer = json.loads(line)
            if answer.get("id") == self._id:
                return answer["result"]
        raise RuntimeError("azmcp ended without an answer")

    def _send(self, message: dict) -> None:
        self._server.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        self._server.stdin.flush()
