"""What the Power BI project says: its model (TMDL), read by indentation, and the visuals of its report (PBIR)."""

import dataclasses
import json
import re
import textwrap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

_OBJECT = re.compile(
    r"(?P<kind>table|column|measure|partition|expression|relationship|role|tablePermission|refreshPolicy|annotation|model|database|cultureInfo"
    r"|pollingExpression|sourceExpression|source)\b(?: (?P<name>'(?:[^']|'')*'|[^\s=]+))?(?: = ?(?P<value>.*)| =)?"
)


@dataclasses.dataclass
class Object:
    """One object of the model: its description, its value (an expression or kind), its properties and what is in it."""

    kind: str
    name: str
    description: str
    value: str
    properties: dict[str, str] = dataclasses.field(default_factory=dict)
    children: list["Object"] = dataclasses.field(default_factory=list)

    def of(self, kind: str) -> list["Object"]:
        return [child for child in self.children if child.kind == kind]

    def one(self, kind: str) -> "Object":
        [found] = self.of(kind)
        return found


def parse(text: str) -> list[Object]:
    """The objects of a TMDL file. A value that begins on the next line is two levels below its object, or one below its property."""
    root = Object("", "", "", "")
    stack: list[tuple[int, Object]] = [(-1, root)]
    description: list[str] = []
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        depth, content = len(line) - len(line.lstrip("\t")), line.strip("\t ")
        if not content:
            continue
        if content.startswith("///"):
            description.append(content[3:].strip())
            continue
        while stack[-1][0] >= depth:
            stack.pop()
        parent = stack[-1][1]
        if ": " in content and re.fullmatch(r"[A-Za-z]+: .*", content):
            name, _, value = content.partition(": ")
            parent.properties[name] = value
            continue
        if not (match := _OBJECT.fullmatch(content)):
            parent.properties[content] = "true"
            continue
        value = match["value"] or ""
        if content.endswith(" ="):
            block = []
            least = depth + (1 if match["kind"].endswith(("source", "Expression")) else 2)
            while at < len(lines) and (not lines[at].strip() or len(lines[at]) - len(lines[at].lstrip("\t")) >= least):
                block.append(lines[at])
                at += 1
            value = textwrap.dedent("\n".join(block)).strip("\n")
        found = Object(match["kind"], (match["name"] or "").strip("'").replace("''", "'"), " ".join(description), value)
        description = []
        parent.children.append(found)
        stack.append((depth, found))
    return root.children


@dataclasses.dataclass(frozen=True)
class Visual:
    """One visual: its page, its file, its type and the fields it shows, each as (role, kind, table, name)."""

    page: str
    file: Path
    type: str
    fields: tuple[tuple[str, str, str, str], ...]


class Project:
    """A Power BI project below a folder."""

    def __init__(self, folder: Path) -> None:
        self.model, self.report = folder / "aoai-usage.SemanticModel", folder / "aoai-usage.Report"

    @cached_property
    def objects(self) -> list[Object]:
        return [found for file in sorted((self.model / "definition").rglob("*.tmdl")) for found in parse(file.read_text())]

    def of(self, kind: str) -> dict[str, Object]:
        return {found.name: found for found in self.objects if found.kind == kind}

    @cached_property
    def tables(self) -> dict[str, Object]:
        return self.of("table")

    @cached_property
    def columns(self) -> dict[tuple[str, str], Object]:
        return {(table.name, column.name): column for table in self.tables.values() for column in table.of("column")}

    @cached_property
    def measures(self) -> dict[str, Object]:
        return {measure.name: measure for table in self.tables.values() for measure in table.of("measure")}

    @cached_property
    def expressions(self) -> dict[str, Object]:
        return self.of("expression")

    def m(self) -> dict[str, str]:
        """Every M expression by where it stands."""
        found = {name: expression.value for name, expression in self.expressions.items()}
        for table in self.tables.values():
            partition = table.one("partition")
            if partition.value == "m":
                found[table.name] = partition.one("source").value
            for policy in table.of("refreshPolicy"):
                found[f"{table.name}: polling"] = policy.one("pollingExpression").value
        return found

    def dax(self) -> dict[str, str]:
        """Every DAX expression by where it stands."""
        found = {name: measure.value for name, measure in self.measures.items()}
        for table in self.tables.values():
            if table.one("partition").value == "calculated":
                found[table.name] = table.one("partition").one("source").value
        for role in self.of("role").values():
            found |= {f"{role.name}: {permission.name}": permission.value for permission in role.of("tablePermission")}
        return found

    def visuals(self) -> Iterator[Visual]:
        for file in sorted((self.report / "definition/pages").glob("*/visuals/*/visual.json")):
            visual = json.loads(file.read_text())["visual"]
            yield Visual(file.parts[-4], file, visual["visualType"], tuple(_fields(visual.get("query", {}))))


def _fields(query: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for role, state in query.get("queryState", {}).items():
        for projection in state["projections"]:
            yield role, *_field(projection["field"])
    for sort in query.get("sortDefinition", {}).get("sort", []):
        yield "sort", *_field(sort["field"])


def _field(field: dict[str, Any]) -> tuple[str, str, str]:
    [(kind, what)] = field.items()
    return kind, what["Expression"]["SourceRef"]["Entity"], what["Property"]
