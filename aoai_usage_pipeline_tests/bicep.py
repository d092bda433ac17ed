"""A checker of Bicep files, for machines without the Bicep compiler: syntax, symbols, modules, secrets, and resources against Microsoft's type data.

It reports what is certainly wrong and keeps silent about what is known only when deploying. A fault carries the compiler's own code where it has one, so
that `#disable-next-line` works for both. The type data know one API version of each resource type, the latest at their time; a file that names an older
one is checked against the newer properties.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from aoai_usage_pipeline_tests.bicep_syntax import SPREAD, Node, above, body, entries, entry, kids, lambda_of, literal, parse, pieces, text, walk
from aoai_usage_pipeline_tests.bicep_types import (
    ANY,
    Property,
    ResourceType,
    Shape,
    Type,
    Types,
    json_type,
    merged,
    object_type,
    partial,
    unfit,
    unfit_object,
)

_DECLARATIONS = {
    "parameter_declaration": "param",
    "variable_declaration": "var",
    "resource_declaration": "resource",
    "module_declaration": "module",
    "type_declaration": "type",
    "user_defined_function": "func",
    "output_declaration": "output",
}
# what Bicep's functions give, and how many arguments they take: `name/fewest`, `name/fewest-most`, `name/fewest+`
_RETURNS = {
    "string": "base64/1 base64ToString/1 cidrHost/2 cidrSubnet/3 dataUri/1 dataUriToString/1 dateTimeAdd/2-3 dateTimeFromEpoch/1 extensionResourceId/3+ "
    "format/2+ guid/1+ join/2 loadFileAsBase64/1 loadTextContent/1-2 managementGroupResourceId/2+ newGuid/0 padLeft/2-3 replace/3 resourceId/2+ "
    "string/1 subscriptionResourceId/2+ substring/2-3 tenantResourceId/2+ toLower/1 toUpper/1 trim/1 uniqueString/1+ uri/2 uriComponent/1 "
    "uriComponentToString/1 utcNow/0-1",
    "int": "dateTimeToEpoch/1 indexOf/2 int/1 lastIndexOf/2 length/1 max/1+ min/1+",
    "bool": "bool/1 contains/2 empty/1 endsWith/2 startsWith/2",
    "array": "array/1 filter/2 flatten/1 items/1 map/2 objectKeys/1 range/2 sort/2 split/2",
    "any": "any/1 coalesce/1+ concat/1+ deployer/0 deployment/0 environment/0 fail/1 first/1 groupBy/2 intersection/2+ json/1 last/1 loadJsonContent/1-3 "
    "loadYamlContent/1-3 managementGroup/0-1 mapValues/2 nameof/1 parseCidr/1 pickZones/3-5 providers/1-2 reduce/3 reference/1-3 resourceGroup/0-2 "
    "shallowMerge/1 skip/2 subscription/0-1 take/2 tenant/0 toObject/2-3 tryGet/2+ union/2+",
}
_FUNCTIONS = {name.partition("/")[0]: kind for kind, names in _RETURNS.items() for name in names.split()}
_ARGUMENTS = {m[1]: (int(m[2]), 99 if m[3] == "+" else int(m[4] or m[2])) for m in re.finditer(r"(\w+)/(\d)(\+|-(\d))?", " ".join(_RETURNS.values()))}
_LOADS = {"loadTextContent", "loadFileAsBase64", "loadJsonContent", "loadYamlContent"}
_DECORATORS = {"allowed", "batchSize", "description", "discriminator", "export", "maxLength", "maxValue", "metadata", "minLength", "minValue"}
_DECORATORS |= {"onlyIfNotExists", "sealed", "secure"}
_SECRETIVE = re.compile("^list[A-Z]|^getSecret$")
_SCOPES = ("resourceGroup", "subscription", "managementGroup", "tenant")
_VERSION = re.compile(r"\d{4}-\d\d-\d\d(-(preview|alpha|beta|rc|privatepreview))?")


@dataclasses.dataclass(frozen=True, order=True)
class Fault:
    """Something that is wrong, and where."""

    path: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}: {self.message}"


@dataclasses.dataclass
class Symbol:
    """A declaration. `type_name` of a resource is its whole type, without the version."""

    kind: str
    name: str
    node: Node
    decorators: dict[str, Node]
    type_name: str = ""
    version: str = ""

    @property
    def value(self) -> Node | None:
        """What stands right of `=`."""
        children = self.node.children
        equals = next((i for i, c in enumerate(children) if c.type == "="), None)
        return None if equals is None else next(c for c in children[equals + 1 :] if c.is_named and "comment" not in c.type)

    @property
    def looped(self) -> bool:
        return self.value is not None and self.value.type == "for_statement"

    @property
    def existing(self) -> bool:
        return any(c.type == "existing" for c in self.node.children)


class File:
    """A parsed Bicep file."""

    def __init__(self, path: Path, project: "Project") -> None:
        self.path, self.project = path, project
        source = path.read_bytes()
        self.root, self.symbols, self.outputs, self.nested = parse(source), dict[str, Symbol](), dict[str, Symbol](), list[Symbol]()
        self.imports: dict[str, tuple[str, str | None, Node]] = {}
        self.scope, self.faults, self.secret = "resourceGroup", set[Fault](), set[str]()
        lines = enumerate(source.decode().splitlines(), 2)
        self.disabled = {following: set(line.split()[1:]) for following, line in lines if line.strip().startswith("#disable-next-line ")}
        self.read()

    def fault(self, node: Node, message: str) -> None:
        row, column = node.start_point
        if message.partition(":")[0] not in self.disabled.get(row + 1, ()):
            self.faults.add(Fault(self.project.name(self.path), row + 1, column + 1, message))

    def read(self) -> None:
        """Collect what is declared."""
        decorators: dict[str, Node] = {}
        for node in self.root.children:
            if node.type == "decorators":
                calls = [call for d in node.named_children for call in kids(d)]
                decorators = {text(call.fields["function"]).removeprefix("sys."): call for call in calls}
            elif node.type in _DECLARATIONS:
                self.declare(Symbol(_DECLARATIONS[node.type], text(next(c for c in node.named_children if c.type == "identifier")), node, decorators))
                decorators = {}
            elif node.type == "target_scope_assignment":
                self.scope = literal(kids(node)[0]) or self.scope
            elif node.type == "import_functionality":
                self.read_import(node)

    def declare(self, symbol: Symbol, parent: Symbol | None = None) -> None:
        if symbol.kind == "resource":
            name = literal(next((c for c in symbol.node.named_children if c.type == "string"), None)) or ""
            symbol.type_name, _, symbol.version = name.partition("@")
            if parent:
                symbol.type_name, symbol.version = f"{parent.type_name}/{symbol.type_name}", symbol.version or parent.version
                self.nested.append(symbol)
            for node in kids(body(symbol.node)):
                for child in kids(node)[:1] if node.type == "object_property" else ():
                    if child.type == "resource_declaration":
                        self.declare(Symbol("resource", text(kids(child)[0]), child, {}), symbol)
        if not parent:
            known = self.outputs if symbol.kind == "output" else self.symbols
            if symbol.name in known:
                self.fault(symbol.node, f"BCP028: {symbol.name} is declared twice")
            known[symbol.name] = symbol

    def read_import(self, node: Node) -> None:
        path, names = "", [c for c in node.children if c.type in ("identifier", "as", "*", "string")]
        path = literal(names[-1]) or ""
        for i, child in enumerate(names[:-1]):
            if child.type in ("identifier", "*") and (i == 0 or names[i - 1].type != "as"):
                alias = names[i + 2] if i + 1 < len(names) and names[i + 1].type == "as" else child
                self.imports[text(alias)] = (path, None if child.type == "*" else text(child), child)

    def imported(self, name: str) -> "tuple[File, Symbol] | None":
        path, original, _ = self.imports[name]
        file = self.project.file(self.path.parent / path)
        return (file, file.symbols[original]) if file and original in file.symbols else None

    @functools.cached_property
    def parameters(self) -> Shape:
        """What a module or a parameters file may pass."""
        params = [s for s in self.symbols.values() if s.kind == "param"]
        types = {s.name: self.declared(s) for s in params}
        return Shape({s.name: Property(types[s.name], s.value is None and not types[s.name].nullable) for s in params})

    def declared(self, symbol: Symbol) -> Type:
        """The declared type of a parameter or an output, with its decorators."""
        node = kids(symbol.node)[1]
        found = self.type(node)
        if allowed := symbol.decorators.get("allowed"):
            values = self.typeof(kids(kids(allowed)[-1])[0]).item
            found = dataclasses.replace(found, item=values) if found.kind == "array" else dataclasses.replace(values or ANY, nullable=found.nullable)
        limits = {n: text(kids(kids(call)[-1])[0]) for n, call in symbol.decorators.items() if n.startswith(("min", "max"))}
        return dataclasses.replace(found, limits=limits)

    def type(self, node: Node) -> Type:
        """A type expression."""
        inner = kids(node)
        match node.type:
            case "type" | "parenthesized_type":
                return self.type(inner[0])
            case "nullable_type":
                return dataclasses.replace(self.type(inner[0]), nullable=True)
            case "primitive_type":
                return Type(text(node))
            case "array_type":
                return Type("array", item=self.type(inner[0]))
            case "union_type":
                return merged([self.type(c) for c in inner])
            case "object":
                properties = {k: Property(t := self.type(v), not t.nullable) for k, _, v in entries(node) if k}
                return object_type(properties, ANY if "*" in {text(c.children[0]) for c in inner if c.type == "object_property"} else None)
            case "string" | "number" | "boolean" | "null":
                return self.typeof(node)
            case "identifier":
                name = text(node)
                if name in self.symbols and self.symbols[name].kind == "type":
                    return self.type(self.symbols[name].value or node)
                if name in self.imports and (found := self.imported(name)) and found[1].kind == "type":
                    return found[0].type(found[1].value or node)
                if name not in self.imports and name not in ("string", "int", "bool", "object", "array"):
                    self.fault(node, f"BCP302: {name} is not a type")
        return ANY

    def typeof(self, node: Node, local: Mapping[str, Type] | None = None) -> Type:
        """What is known of an expression before deploying."""
        local, inner = local or {}, kids(node)
        match node.type:
            case "string":
                value = literal(node)
                return Type("string") if value is None else Type("string", (value,))
            case "number":
                return Type("int", (int(text(node)),))
            case "boolean":
                return Type("bool", (text(node) == "true",))
            case "null":
                return Type("null")
            case "array":
                return Type("array", item=merged([self.typeof(c, local) for c in inner]) if inner else None)
            case "object":
                found = {k: Property(self.typeof(v, local), True) for k, _, v in entries(node) if k and k != SPREAD}
                known = all(k and k != SPREAD for k, _, _ in entries(node))
                return object_type(found, None if known else ANY)
            case "parenthesized_expression":
                return self.typeof(inner[0], local)
            case "ternary_expression":
                return merged([self.typeof(c, local) for c in inner[1:]]) if len(inner) == 3 else ANY
            case "for_statement":
                return Type("array", item=self.typeof(inner[-1], local | self.loop(node, local)))
            case "if_statement":
                return self.typeof(inner[-1], local)
            case "binary_expression":
                operator = text(node.fields["operator"])
                return Type("int") if operator in "+-*/%" else ANY if operator == "??" else Type("bool")
            case "unary_expression":
                return Type("bool") if text(node).startswith("!") else Type("int")
            case "identifier":
                return local.get(text(node)) or self.typeof_symbol(text(node))
            case "member_expression":
                of = self.typeof(inner[0], local)
                found = of.member(text(inner[-1]))
                if found is None:
                    if ".?" not in [c.text for c in node.children]:
                        self.fault(inner[-1], f"BCP053: {text(inner[0])} has no {text(inner[-1])}")
                    return ANY
                return found
            case "subscript_expression":
                return self.typeof(inner[0], local).item or ANY
            case "call_expression":
                return self.typeof_call(node, local)
        return ANY

    def typeof_symbol(self, name: str) -> Type:
        if name in self.imports and (found := self.imported(name)):
            return found[0].typeof_symbol(found[1].name)
        symbol = self.symbols.get(name)
        if symbol is None or symbol.name in self.project.busy:
            return ANY
        self.project.busy.add(name)
        try:
            match symbol.kind:
                case "param":
                    # a default is not what will be given; what is allowed is
                    return dataclasses.replace(self.declared(symbol), limits={})
                case "var" if symbol.value:
                    return self.typeof(symbol.value)
                case "resource":
                    table = self.project.types(symbol.type_name)
                    found = table.body if isinstance(table, ResourceType) else ANY
                case "module":
                    module = self.module(symbol)
                    outputs = {n: Property(module.declared(o)) for n, o in module.outputs.items()} if module else {}
                    found = object_type({"name": Property(Type("string")), "outputs": Property(object_type(outputs))}) if module else ANY
                case _:
                    return ANY
            return Type("array", item=found) if symbol.looped else found
        finally:
            self.project.busy.discard(name)

    def typeof_call(self, node: Node, local: Mapping[str, Type]) -> Type:
        function, arguments = text(kids(node)[0]).removeprefix("sys.").removeprefix("az."), kids(kids(node)[-1])
        if function == "union" and arguments:
            found = [self.typeof(a, local) for a in arguments]
            if any(t.kind != "object" for t in found):
                return merged(found)
            shapes = [t.shape() if t.shape else Shape({}, ANY) for t in found]
            properties: dict[str, Property] = {}
            for shape in shapes:
                properties |= shape.properties
            return object_type(properties, next((s.others for s in shapes if s.others), None))
        if function == "map" and len(arguments) == 2 and arguments[1].type == "lambda_expression":
            names, result = lambda_of(arguments[1])
            item = self.typeof(arguments[0], local).item or ANY
            return Type("array", item=self.typeof(result, {**local, **dict.fromkeys(names, ANY), **({names[0]: item} if names else {})}))
        if function in self.symbols and self.symbols[function].kind == "func":
            return self.type(self.symbols[function].node.fields["returns"])
        return Type(_FUNCTIONS.get(function, "any"))

    def loop(self, node: Node, local: Mapping[str, Type]) -> dict[str, Type]:
        """The variables of a loop."""
        names, over = kids(node)[0], kids(node)[1]
        variables = [text(n) for n in ([names] if names.type == "identifier" else kids(names))]
        return dict(zip(variables, (self.typeof(over, local).item or ANY, Type("int")), strict=False))

    def module(self, symbol: Symbol) -> "File | None":
        path = literal(next((c for c in symbol.node.named_children if c.type == "string"), None))
        return self.project.file(self.path.parent / path) if path and ":" not in path else None

    def check(self) -> None:
        """Find what is wrong in this file."""
        for node in walk(self.root):
            if node.type == "ERROR" or node.is_missing:
                self.fault(node, f"BCP018: syntax: {text(node)[:40]!r} is not understood")
        if any(f.message.startswith("BCP018") for f in self.faults):
            return  # the rest would be noise
        used = self.check_names(self.root, {})
        for name, (path, _, node) in self.imports.items():
            if not self.imported(name) and self.imports[name][1] is not None:
                self.fault(
                    node, f"BCP360: {path} does not export {name}" if self.project.file(self.path.parent / path) else f"BCP091: no file {path}"
                )
            elif (found := self.imported(name)) and "export" not in found[1].decorators:
                self.fault(node, f"BCP360: {path} does not export {name}")
            if name not in used:
                self.fault(node, f"no-unused-imports: {name} is never used")
        self.secret = {s.name for s in self.symbols.values() if "secure" in s.decorators}
        while more := {s.name for s in self.symbols.values() if s.kind == "var" and self.secretive(s.value)} - self.secret:
            self.secret |= more
        for symbol in [*self.symbols.values(), *self.nested, *self.outputs.values()]:
            for name, call in symbol.decorators.items():
                if name not in _DECORATORS:
                    self.fault(call, f"BCP057: there is no decorator {name}")
            if symbol.kind in ("param", "var") and symbol.name not in used and "export" not in symbol.decorators:
                self.fault(symbol.node, f"no-unused-{symbol.kind}s: {symbol.name} is never used")
            getattr(self, f"check_{symbol.kind}", lambda _: None)(symbol)
            self.check_start(symbol)
        self.check_cycles()

    def check_start(self, symbol: Symbol) -> None:
        """Loops, conditions, names and scopes must be known when the deployment starts, and loops stand in few places."""
        for node in walk(symbol.node):
            if node.type == "for_statement":
                self.check_start_of(kids(node)[1], "BCP178: the list of the loop")
                if symbol.kind == "var":
                    self.check_start_of(kids(node)[-1], "BCP182: the loop of a variable")
                outer = node.parent
                if outer and symbol.kind in ("resource", "module") and outer.type == "object_property":
                    while outer and outer.type in ("object", "object_property", "array", "if_statement"):
                        outer = outer.parent
                    if outer and outer.type == "for_statement" and outer.parent and outer.parent.type == "object_property":
                        self.fault(node, "BCP142: a loop cannot stand in the loop of another property")
                if outer and outer.type not in (*_DECLARATIONS, "for_statement"):
                    self.fault(node, "BCP138: a loop cannot stand here")
            elif node.type == "if_statement":
                self.check_start_of(kids(node)[0], "BCP177: the condition")
        for name in ("name", "scope") if symbol.kind in ("resource", "module") and not symbol.existing else ():
            if value := entry(body(symbol.node), name):
                self.check_start_of(value, f"BCP120: {name}")

    def check_start_of(self, node: Node, what: str) -> None:
        if late := self.late(node, frozenset()):
            self.fault(node, f"{what} is known only when {late} is deployed")

    def late(self, node: Node, seen: frozenset[str]) -> str | None:
        """What an expression waits for: outputs of a module, or properties that a resource has once it is there."""
        if node.type == "member_expression":
            base, members = node, list[str]()
            while base.type in ("member_expression", "subscript_expression", "resource_expression"):
                members = [text(kids(base)[-1]), *members] if base.type == "member_expression" else members
                base = kids(base)[0]
            symbol = self.symbols.get(text(base))
            if symbol and symbol.kind in ("resource", "module") and members and members[0] not in ("id", "name", "type", "apiVersion"):
                return symbol.name
        if node.type == "call_expression" and (_SECRETIVE.match(text(kids(node)[0]).rpartition(".")[2]) or text(kids(node)[0]) == "reference"):
            return text(kids(node)[0])
        if node.type == "identifier" and (symbol := self.symbols.get(text(node))) and symbol.kind == "var" and symbol.name not in seen:
            return self.late(symbol.value, seen | {symbol.name}) if symbol.value else None
        children = kids(node)[1:] if node.type == "object_property" and kids(node)[0].type == "identifier" else kids(node)
        return next((found for child in children if (found := self.late(child, seen))), None)

    def check_cycles(self) -> None:
        """Resources, modules and variables that need each other."""
        needs = {s.name: self.check_names(s.node, {}) & self.symbols.keys() for s in self.symbols.values()}
        for name, names in needs.items():
            if self.symbols[name].kind == "resource":
                names.discard(name)  # nested resources may name the one that they are in

        def reach(name: str, path: tuple[str, ...]) -> tuple[str, ...] | None:
            if name in path:
                return (*path[path.index(name) :], name)
            if name in done:
                return None
            found = next((cycle for n in sorted(needs[name]) if (cycle := reach(n, (*path, name)))), None)
            done.add(name)
            return found

        done = set[str]()
        for name in needs:
            if cycle := reach(name, ()):
                self.fault(self.symbols[cycle[0]].node, f"BCP080: {' needs '.join(cycle)}")

    def check_names(self, node: Node, local: Mapping[str, Type]) -> set[str]:
        """Report names that are not declared, and return those that are used."""
        used, inner = set[str](), kids(node)
        match node.type:
            case "identifier":
                name = text(node)
                if name not in local and name not in self.symbols and name not in self.imports and name not in ("az", "sys"):
                    self.fault(node, f"BCP057: {name} is not declared")
                return {name}
            case "import_functionality" | "primitive_type" | "property_identifier" | "metadata_declaration":
                return used
            case "object_property" if inner[0].type == "identifier":
                inner = inner[1:]
            case "decorator":
                inner = kids(kids(inner[0])[-1])
            case "lambda_expression":
                names, result = lambda_of(node)
                return self.check_names(result, {**local, **dict.fromkeys(names, ANY)})
            case "for_statement":
                used = self.check_names(inner[1], local)
                return used | self.check_names(inner[-1], {**local, **self.loop(node, local)})
            case "resource_expression":
                inner = inner[:1]
            case "user_defined_function":
                parameters = [c for c in inner if c.type == "parameters"]
                names = [text(kids(p)[0]) for p in kids(parameters[0])]
                local, inner = {**local, **dict.fromkeys(names, ANY)}, inner[1:]
            case "parameter":
                inner = inner[1:]
            case "call_expression":
                self.check_function(node)
                if inner[0].type == "identifier":
                    used, inner = {text(inner[0])}, inner[1:]
            case _ if node.type in _DECLARATIONS:
                inner = inner[1:]
                if node.type == "resource_declaration":
                    nested = [kids(kids(e)[0])[0] for e in kids(body(node)) if kids(e) and kids(e)[0].type == "resource_declaration"]
                    local = {**local, **{text(n): ANY for n in nested}}
        return used.union(*(self.check_names(c, local) for c in inner))

    def check_function(self, node: Node) -> None:
        function = kids(node)[0]
        if function.type == "member_expression" and text(kids(function)[0]) not in ("az", "sys"):
            return  # a function of a resource, such as listKeys
        name = text(function).rpartition(".")[2]
        own = self.symbols.get(name)
        if name not in _FUNCTIONS and not _SECRETIVE.match(name) and not (own and own.kind == "func") and name not in self.imports:
            self.fault(function, f"BCP057: there is no function {name}")
        fewest, most = _ARGUMENTS.get(name, (0, 99))
        if not fewest <= len(kids(kids(node)[-1])) <= most:
            self.fault(function, f"BCP071: {name} takes {fewest}{'' if most == fewest else f' to {most}'} arguments")
        if name in ("newGuid", "utcNow") and not any(n.type == "parameter_declaration" for n in above(node)):
            self.fault(function, f"BCP065: {name} is for defaults of parameters only")
        if name in _LOADS:
            argument = literal(next(iter(kids(kids(node)[-1])), None))
            if argument is None or not (self.path.parent / argument).is_file():
                self.fault(node, f"BCP091: {name}: no file {argument}")

    def secretive(self, node: Node | None) -> bool:
        """Whether an expression has a secret in it."""
        for part in walk(node) if node else ():
            is_key = part.parent and part.parent.type == "object_property" and kids(part.parent)[0] is part
            if part.type == "identifier" and text(part) in self.secret and not is_key:
                return True
            if part.type == "call_expression" and _SECRETIVE.match(text(kids(part)[0]).rpartition(".")[2]):
                return True
        return False

    def check_param(self, symbol: Symbol) -> None:
        if "description" not in symbol.decorators:
            self.fault(symbol.node, f"parameter {symbol.name} has no @description")
        if symbol.value:
            self.check_value(symbol.value, self.declared(symbol), {}, f"the default of {symbol.name}")
            if "secure" in symbol.decorators and literal(symbol.value) != "" and not text(symbol.value).startswith("newGuid"):
                self.fault(symbol.value, f"secure-parameter-default: the secret {symbol.name} has a default")
        elif re.search("password|secret$|(account|access|api)key$", symbol.name, re.I) and "secure" not in symbol.decorators:
            self.fault(symbol.node, f"secure-secrets-in-params: {symbol.name} is not @secure")

    def check_var(self, symbol: Symbol) -> None:
        if symbol.value:
            self.check_value(symbol.value, ANY, {})

    def check_output(self, symbol: Symbol) -> None:
        if symbol.value:
            self.check_value(symbol.value, self.declared(symbol), {}, f"output {symbol.name}")
        if self.secretive(symbol.value):
            self.fault(symbol.node, f"outputs-should-not-contain-secrets: {symbol.name}")

    def check_module(self, symbol: Symbol) -> None:
        module, at = self.module(symbol), body(symbol.node)
        if module is None:
            self.fault(symbol.node, f"BCP091: no file {text(kids(symbol.node)[1])}")
            return
        local = self.loop(symbol.value, {}) if symbol.looped and symbol.value else {}
        given = entry(at, "params")
        expected = Type("object", shape=lambda: module.parameters)
        if given is None:
            for why in unfit_object({}, module.parameters, False, symbol.name):
                self.fault(symbol.node, why)
        else:
            self.check_value(given, expected, local, f"module {symbol.name}")
            for name, key, value in entries(given) if given.type == "object" else ():
                target = module.symbols.get(name or "")
                if target and self.secretive(value) and "secure" not in target.decorators:
                    self.fault(key, f"a secret is passed to {name}, which is not @secure")
        for name, key, value in entries(at):
            if name not in ("name", "scope", "params", "dependsOn", "identity"):
                self.fault(key, f"BCP037: a module has no {name}")
            elif name != "params":
                self.check_value(value, ANY, local)
        scope = entry(at, "scope")
        if (found := self.scope_of(scope)) and found != module.scope:
            self.fault(scope or symbol.node, f"BCP134: {symbol.name} has the scope {found}, its file {module.scope}")

    def scope_of(self, node: Node | None) -> str | None:
        """The kind of scope that is meant, None where that cannot be known."""
        if node is None:
            return self.scope
        name = text(kids(node)[0]) if node.type == "call_expression" else text(node)
        if name in self.symbols:
            return "resourceGroup" if self.symbols[name].type_name.lower() == "microsoft.resources/resourcegroups" else "resource"
        return name if name in _SCOPES else None

    def check_resource(self, symbol: Symbol) -> None:
        at, table = body(symbol.node), self.project.types(symbol.type_name)
        local = self.loop(symbol.value, {}) if symbol.looped and symbol.value else {}
        if not _VERSION.fullmatch(symbol.version):
            self.fault(symbol.node, f"BCP029: {symbol.type_name} has no valid API version: {symbol.version!r}")
        if isinstance(table, str):
            self.fault(symbol.node, f"BCP081: {table}")
        elif table and symbol.version[:10] > table.version[:10]:
            self.fault(symbol.node, f"BCP081: {symbol.type_name}@{symbol.version} is newer than the newest known, {table.version}")
        self.check_parent(symbol, at)
        expected = table.body.shape() if isinstance(table, ResourceType) and table.body.shape else None
        if expected and symbol.existing:
            expected = Shape({n: Property(p.type, False, p.read_only) for n, p in expected.properties.items() if n == "name"})
        if expected:
            own = {"parent": Property(ANY), "scope": Property(ANY), "dependsOn": Property(Type("array"))}
            expected = dataclasses.replace(expected, properties={**expected.properties, **own})
        self.check_value(at, Type("object", shape=lambda: expected) if expected else ANY, local, symbol.type_name)
        scope = self.scope_of(entry(at, "scope"))
        if isinstance(table, ResourceType) and table.scope in _SCOPES and scope not in (None, table.scope):
            self.fault(symbol.node, f"BCP135: {symbol.type_name} cannot be deployed to the scope {scope}")

    def check_parent(self, symbol: Symbol, at: Node) -> None:
        parent, name, nested = entry(at, "parent"), entry(at, "name"), symbol in self.nested
        depth = symbol.type_name.count("/")
        if parent is not None and text(parent).split("[")[0] in self.symbols:
            of = self.symbols[text(parent).split("[")[0]]
            if of.kind != "resource" or of.type_name.lower() != symbol.type_name.rpartition("/")[0].lower():
                self.fault(parent, f"BCP036: the parent of {symbol.type_name} cannot be {of.type_name or of.kind}")
        if name is None:
            self.fault(symbol.node, f"BCP035: {symbol.name} lacks name")
        elif name.type == "string":
            slashes = "".join(piece for piece in pieces(name) if isinstance(piece, str)).count("/")
            if slashes != (0 if parent is not None or nested else depth - 1):
                self.fault(name, f"BCP169: the name of {symbol.type_name} must have {0 if parent is not None or nested else depth - 1} slashes")

    def check_value(self, node: Node, expected: Type, local: Mapping[str, Type], where: str = "the value") -> None:
        """Report where an expression does not fit what is asked, as near to the fault as can be."""
        inner = kids(node)
        match node.type:
            case "parenthesized_expression":
                return self.check_value(inner[0], expected, local, where)
            case "ternary_expression" if len(inner) == 3:
                self.check_value(inner[0], ANY, local)
                self.check_value(inner[1], expected, local, where)
                return self.check_value(inner[2], expected, local, where)
            case "if_statement":
                self.check_value(inner[0], ANY, local)
                return self.check_value(inner[-1], expected, local, where)
            case "array" if expected.kind in ("any", "array"):
                for child in inner:
                    self.check_value(child, expected.item or ANY, local, f"an item of {where}")
            case "for_statement" if expected.kind in ("any", "array", "object"):
                item = expected if expected.kind == "object" else expected.item or ANY
                self.check_value(inner[1], ANY, local)
                return self.check_value(inner[-1], item, {**local, **self.loop(node, local)}, f"an item of {where}")
            case "object" if expected.kind in ("any", "object"):
                return self.check_object(node, expected, local, where)
            case "call_expression" if text(inner[0]) == "union" and expected.kind == "object" and expected.shape:
                for argument in kids(inner[-1]):
                    self.check_value(argument, partial(expected), local, where)
                whole = self.typeof(node, local)
                shape = whole.shape() if whole.shape else Shape({}, ANY)
                for why in unfit_object({n: p.type for n, p in shape.properties.items()}, expected.shape(), shape.others is not None, where):
                    if why.startswith("BCP035"):
                        self.fault(node, why)
                return None
            case "call_expression":
                mapped = text(inner[0]) == "map" and expected.kind == "array"
                self.check_arguments(kids(inner[-1]), expected.item or ANY if mapped else ANY, local, where)
                if mapped:
                    return None
            case "lambda_expression" | "identifier" | "property_identifier":
                pass
            case _:
                for child in inner:
                    self.check_value(child, ANY, local)
        for why in unfit(self.typeof(node, local), expected, where):
            self.fault(node, why)
        return None

    def check_arguments(self, arguments: Sequence[Node], asked: Type, local: Mapping[str, Type], where: str) -> None:
        """The arguments of a function; `asked` is the type that its lambda should give."""
        for argument in arguments:
            if argument.type == "lambda_expression":
                names, result = lambda_of(argument)
                item = self.typeof(arguments[0], local).item or ANY
                self.check_value(result, asked, {**local, **dict.fromkeys(names, ANY), **({names[0]: item} if names else {})}, f"an item of {where}")
            else:
                self.check_value(argument, ANY, local)

    def check_object(self, node: Node, expected: Type, local: Mapping[str, Type], where: str) -> None:
        found: dict[str, Type] = {}
        for key, at, value in entries(node):
            if key is None:
                self.check_value(value, ANY, local)
            elif key in found and key != SPREAD:
                self.fault(at, f"BCP025: {key} is there twice")
            else:
                found[key] = self.typeof(value, local)
        open_ = found.pop(SPREAD, None) is not None or any(key is None for key, _, _ in entries(node))
        keys = {key: at for key, at, _ in entries(node)}
        shape = expected.shape() if expected.shape else Shape({}, ANY)
        for why in unfit_object(found, shape, open_, where):
            self.fault(next((at for key, at in keys.items() if key and re.search(rf"(property|is) {re.escape(key)}\b", why)), node), why)
        chosen = expected
        if shape.discriminator and (values := found.get(shape.discriminator, ANY).values) and values[0] in shape.variants:
            variant = shape.variants[values[0]]
            chosen = object_type({**shape.properties, **variant.properties}, shape.others)
        for key, _, value in entries(node):
            if key in found:
                self.check_value(value, chosen.member(key) or ANY, local, key)


class Project:
    """The Bicep files of a folder. Without `types` the bodies of resources are not checked."""

    def __init__(self, root: Path, types: Types = lambda _: None) -> None:
        self.root, self.types = root, functools.cache(types)
        self.busy = set[str]()
        self._files: dict[Path, File | None] = {}

    def name(self, path: Path) -> str:
        """How a path is named in a fault."""
        return str(path.resolve().relative_to(self.root.resolve()))

    def file(self, path: Path) -> File | None:
        """A file, read once; None where there is none."""
        path = path.resolve()
        if path not in self._files:
            self._files[path] = File(path, self) if path.is_file() else None
        return self._files[path]

    def files(self) -> list[File]:
        return [file for path in sorted(self.root.rglob("*.bicep")) if (file := self.file(path))]

    def faults(self) -> list[Fault]:
        """What is wrong in all files."""
        for file in self.files():
            file.check()
        return sorted({fault for file in self.files() for fault in file.faults} | set(self.parameter_faults()))

    def parameter_faults(self) -> Iterator[Fault]:
        """Where *.parameters.json does not fit the Bicep file beside it."""
        for path in sorted(self.root.rglob("*.parameters.json")):
            main = self.file(path.with_name(path.name.replace(".parameters.json", ".bicep")))
            lines = path.read_text().splitlines()
            given = json.loads(path.read_text()).get("parameters", {})
            if main is None:
                yield Fault(self.name(path), 1, 1, "BCP091: there is no Bicep file of this name")
                continue
            # azd puts the values of variables there
            types = {name: json_type(p["value"], lambda text_: "${" in text_) if "value" in p else ANY for name, p in given.items()}
            for why in unfit(
                object_type({n: Property(t, True) for n, t in types.items()}), Type("object", shape=lambda m=main: m.parameters), "the file"
            ):
                line, column = next(
                    ((i, text_.index(f'"{n}"')) for n in given if n in why for i, text_ in enumerate(lines) if f'"{n}"' in text_), (0, 0)
                )
                yield Fault(self.name(path), line + 1, column + 1, why)
