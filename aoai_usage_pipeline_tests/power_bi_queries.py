"""Runs the Power Query expressions (M) of the Power BI model, on a lake in a folder or on what stands for another source.

Knows the M that the model uses, and raises `KeyError` or `SyntaxError` for any other. Numbers are decimals as .NET has them, of 28 digits, and
losing one is an error.
"""

import csv
import datetime as dt
import decimal
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from aoai_usage_pipeline_tests.power_bi import Project

Scope = dict[str, Any]
Code = Callable[[Scope], Any]

_EXACT = decimal.Context(prec=28, traps=[decimal.Inexact, decimal.InvalidOperation])
_TOKEN = re.compile(
    r'\s+|//[^\n]*|(?P<text>"(?:[^"]|"")*")|(?P<field>\[[A-Za-z_][\w ]*\])|(?P<number>\d+(?:\.\d+)?)'
    r"|(?P<name>#?[A-Za-z_]\w*(?:\.\w+)*)|(?P<mark>=>|<>|<=|>=|[-+*/&=<>(){}\[\],])"
)
_BINARY = [("or",), ("and",), ("=", "<>", "<", ">", "<=", ">="), ("&", "+", "-"), ("*", "/")]


class Table:
    """Columns in their order, and rows by column."""

    def __init__(self, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
        self.columns, self.rows = list(columns), [dict(row) for row in rows]

    def __getitem__(self, column: str) -> list[Any]:
        return [row[column] for row in self.rows]


class _Later:
    """A value that is computed when it is first needed."""

    def __init__(self, code: Code, scope: Scope) -> None:
        self._code, self._scope = code, scope

    @cached_property
    def value(self) -> Any:
        return self._code(self._scope)


def _look_up(scope: Scope, name: str) -> Any:
    found = scope[name]
    return found.value if isinstance(found, _Later) else found


class _Parser:
    """M to a function of the names in scope. What is not needed is not computed, as in Power Query."""

    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text):
            if not (match := _TOKEN.match(text, at)):
                raise SyntaxError(text[at : at + 40])
            at = match.end()
            if match.lastgroup:
                self.tokens.append((match.lastgroup, match[0]))
        self.tokens.append(("end", ""))
        self.at = 0

    def whole(self) -> Code:
        code = self.expression()
        if self.next("meta"):
            self.expression()
        if self.tokens[self.at][0] != "end":
            raise SyntaxError(" ".join(token for _, token in self.tokens[self.at : self.at + 9]))
        return code

    def next(self, *marks: str) -> str | None:
        kind, token = self.tokens[self.at]
        if kind in ("name", "mark") and token in marks:
            self.at += 1
            return token
        return None

    def need(self, mark: str) -> None:
        if not self.next(mark):
            raise SyntaxError(f"{mark} before {' '.join(token for _, token in self.tokens[self.at : self.at + 9])}")

    def name(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1][1]

    def expression(self) -> Code:
        if self.next("let"):
            steps = {}
            while not steps or self.next(","):
                name = self.name()
                self.need("=")
                steps[name] = self.expression()
            self.need("in")
            result = self.expression()

            def let(scope: Scope) -> Any:
                inner = dict(scope)
                inner.update({name: _Later(code, inner) for name, code in steps.items()})
                return result(inner)

            return let
        if self.next("if"):
            condition = self.expression()
            self.need("then")
            yes = self.expression()
            self.need("else")
            no = self.expression()
            return lambda scope: yes(scope) if condition(scope) else no(scope)
        if self.next("each"):
            return self._function(["_"], self.expression())
        if self.next("error"):
            raised = self.expression()

            def fail(scope: Scope) -> Any:
                raise RuntimeError(raised(scope))

            return fail
        if self.tokens[self.at][1] == "(" and (parameters := self._parameters()) is not None:
            return self._function(parameters, self.expression())
        return self.binary(0)

    @staticmethod
    def _function(parameters: list[str], body: Code) -> Code:
        return lambda scope: lambda *values: body({**scope, **dict(zip(parameters, values, strict=True))})

    def _parameters(self) -> list[str] | None:
        """The names of a function's parameters up to its body, or None where the bracket opens something else."""
        begin, found = self.at, []
        self.at += 1
        while not self.next(")"):
            if self.tokens[self.at][0] != "name":
                break
            found.append(self.name())
            if self.next("as"):
                self.at += 1
            self.next(",")
        else:
            if self.next("as"):
                self.at += 1
            if self.next("=>"):
                return found
        self.at = begin
        return None

    def binary(self, level: int) -> Code:
        if level == len(_BINARY):
            return self.postfix()
        left = self.binary(level + 1)
        while mark := self.next(*_BINARY[level]):
            left = self._operation(mark, left, self.binary(level + 1))
        return left

    @staticmethod
    def _operation(mark: str, left: Code, right: Code) -> Code:
        if mark == "or":
            return lambda scope: left(scope) or right(scope)
        if mark == "and":
            return lambda scope: left(scope) and right(scope)
        compute = {
            "=": lambda a, b: a == b, "<>": lambda a, b: a != b, "<": lambda a, b: a < b, ">": lambda a, b: a > b, "<=": lambda a, b: a <= b,
            ">=": lambda a, b: a >= b, "&": lambda a, b: a + b, "+": lambda a, b: a + b, "-": lambda a, b: a - b,
        }[mark]  # fmt: skip
        return lambda scope: compute(left(scope), right(scope))

    def postfix(self) -> Code:
        code = self.primary()
        while True:
            kind, token = self.tokens[self.at]
            if kind == "field":
                self.at += 1
                code = self._field(code, token[1:-1])
            elif self.next("("):
                code = self._call(code, self._list(")"))
            elif self.next("{"):
                code = self._row(code, self._list("}")[0])
            else:
                return code

    @staticmethod
    def _field(code: Code, name: str) -> Code:
        return lambda scope: code(scope)[name]

    @staticmethod
    def _call(code: Code, arguments: list[Code]) -> Code:
        return lambda scope: code(scope)(*(argument(scope) for argument in arguments))

    @staticmethod
    def _row(code: Code, place: Code) -> Code:
        return lambda scope: code(scope).rows[int(place(scope))]

    def _list(self, end: str) -> list[Code]:
        found: list[Code] = []
        while not self.next(end):
            found.append(self.expression())
            self.next(",")
        return found

    def primary(self) -> Code:
        kind, token = self.tokens[self.at]
        self.at += 1
        if kind == "text":
            text = token[1:-1].replace('""', '"')
            return lambda scope: text
        if kind == "number":
            return lambda scope: Decimal(token)
        if kind == "field":
            return lambda scope: scope["_"][token[1:-1]]
        if token == "(":
            code = self.expression()
            self.need(")")
            return code
        if token == "{":
            items = self._list("}")
            return lambda scope: [item(scope) for item in items]
        if token == "[":
            fields = {}
            while not self.next("]"):
                name = self.name()
                self.need("=")
                fields[name] = self.expression()
                self.next(",")
            return lambda scope: {name: code(scope) for name, code in fields.items()}
        if token == "type":
            return (lambda kind: lambda scope: kind)(self.name())
        if token == "null":
            return lambda scope: None
        if kind == "name":
            return lambda scope: _look_up(scope, token)
        raise SyntaxError(token)


def _typed(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "text":
        return str(value)
    if kind == "number":
        return Decimal(value)
    if kind == "Int64.Type":
        return _whole(value)
    if kind == "date":
        return dt.date.fromisoformat(value) if isinstance(value, str) else value
    assert kind == "datetime"
    return dt.datetime.fromisoformat(value) if isinstance(value, str) else value


def _whole(value: Any) -> int:
    if Decimal(value) != int(Decimal(value)):
        raise ValueError(f"{value} is not whole")
    return int(Decimal(value))


def _select_columns(table: Table, columns: list[str], missing: str = "") -> Table:
    rows = [{name: row.get(name) if missing else row[name] for name in columns} for row in table.rows]
    return Table(columns, rows)


def _add_column(table: Table, name: str, make: Callable[[Any], Any], kind: str = "any") -> Table:
    assert name not in table.columns, name
    return Table([*table.columns, name], ({**row, name: make(row)} for row in table.rows))


def _transform_types(table: Table, types: list[list[str]], culture: str) -> Table:
    kinds = dict(types)
    return Table(table.columns, ({name: _typed(value, kinds[name]) if name in kinds else value for name, value in row.items()} for row in table.rows))


def _transform(table: Table, changes: list[list[Any]]) -> Table:
    return Table(table.columns, ({**row, **{name: row[name] and change(row[name]) for name, change, _ in changes}} for row in table.rows))


def _combine(tables: list[Table]) -> Table:
    columns = dict.fromkeys(name for table in tables for name in table.columns)
    return Table(columns, ({name: row.get(name) for name in columns} for table in tables for row in table.rows))


def _group(table: Table, by: list[str], made: list[list[Any]]) -> Table:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in table.rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    rows = []
    for key, members in groups.items():
        group = Table(table.columns, members)
        rows.append(dict(zip(by, key, strict=True)) | {name: make(group) for name, make, _ in made})
    return Table([*by, *(name for name, *_ in made)], rows)


def _distinct(table: Table) -> Table:
    return Table(table.columns, {tuple(row.items()): row for row in table.rows}.values())


def _promote(table: Table, options: Mapping[str, Any]) -> Table:
    names = list(table.rows[0].values())
    return Table(names, (dict(zip(names, row.values(), strict=True)) for row in table.rows[1:]))


def _csv(content: bytes, options: Mapping[str, Any]) -> Table:
    lines = list(csv.reader(io.StringIO(content.decode("utf-8-sig")), delimiter=options["Delimiter"]))
    columns = [f"Column{n}" for n in range(1, len(lines[0]) + 1)]
    return Table(columns, (dict(zip(columns, line, strict=True)) for line in lines))


def _parquet(content: bytes) -> Table:
    found = pq.ParquetFile(io.BytesIO(content)).read()
    return Table(found.column_names, found.to_pylist())


def _after(text: str, delimiter: str) -> str:
    return text.partition(delimiter)[2]


def _present(values: list[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def files(folder: str) -> Table:
    """What `Folder.Files` gives of a folder: names, their folders, contents and times."""
    rows = []
    for file in sorted(file for file in Path(folder).rglob("*") if file.is_file()):
        changed = dt.datetime.fromtimestamp(file.stat().st_mtime, dt.UTC).replace(tzinfo=None)
        rows.append({"Name": file.name, "Folder Path": f"{file.parent}/", "Content": file.read_bytes(), "Date modified": changed})
    return Table(["Content", "Name", "Date modified", "Folder Path"], rows)


def _time(at: dt.datetime, options: Mapping[str, str]) -> str:
    assert options == {"Format": "yyyy-MM-dd HH:mm:ss", "Culture": "en-US"}
    return f"{at:%Y-%m-%d %H:%M:%S}"


def _day(at: dt.date, options: Mapping[str, str]) -> str:
    assert options == {"Format": "yyyy-MM-dd", "Culture": "en-US"}
    return f"{at:%Y-%m-%d}"


LIBRARY: dict[str, Any] = {
    "true": True,
    "#table": lambda columns, rows: Table(columns, (dict(zip(columns, row, strict=True)) for row in rows)),
    "#datetime": lambda *parts: dt.datetime(*map(int, parts)),
    "Csv.Document": _csv,
    "Date.From": lambda at: at.date(),
    "Date.ToText": _day,
    "DateTime.From": lambda at: at,
    "DateTime.ToText": _time,
    "DateTimeZone.RemoveZone": lambda at: at.replace(tzinfo=None),
    "DateTimeZone.UtcNow": lambda: dt.datetime.now(dt.UTC),
    "Decimal.From": lambda value, culture="": Decimal(value),
    "Duration.TotalSeconds": lambda span: Decimal(span // dt.timedelta(microseconds=1)) / 1_000_000,
    "Error.Record": lambda *parts: " ".join(parts),
    "Folder.Files": files,
    "Int64.From": _whole,
    "Int64.Type": "Int64.Type",
    "Json.Document": json.loads,
    "List.Buffer": list,
    "List.Contains": lambda values, value: value in values,
    "List.Count": len,
    "List.Max": lambda values: max(_present(values), default=None),
    "List.RemoveNulls": _present,
    "List.Select": lambda values, condition: [value for value in values if condition(value)],
    "List.Sum": lambda values: sum(_present(values)) if _present(values) else None,
    "List.Transform": lambda values, change: [change(value) for value in values],
    "MissingField.UseNull": "MissingField.UseNull",
    "Number.RoundDown": lambda number: number.to_integral_value(decimal.ROUND_FLOOR),
    "Parquet.Document": _parquet,
    "Precision.Decimal": "Precision.Decimal",
    "QuoteStyle.Csv": "QuoteStyle.Csv",
    "Table.AddColumn": _add_column,
    "Table.Combine": _combine,
    "Table.Distinct": _distinct,
    "Table.FromRecords": lambda records, columns, missing: Table(columns, ({name: record.get(name) for name in columns} for record in records)),
    "Table.Group": _group,
    "Table.IsEmpty": lambda table: not table.rows,
    "Table.PromoteHeaders": _promote,
    "Table.RemoveColumns": lambda table, names: _select_columns(table, [name for name in table.columns if name not in names]),
    "Table.RowCount": lambda table: len(table.rows),
    "Table.SelectColumns": _select_columns,
    "Table.SelectRows": lambda table, condition: Table(table.columns, filter(condition, table.rows)),
    "Table.TransformColumnNames": lambda table, name: Table(map(name, table.columns), ({name(n): v for n, v in row.items()} for row in table.rows)),
    "Table.TransformColumnTypes": _transform_types,
    "Table.TransformColumns": _transform,
    "Text.AfterDelimiter": _after,
    "Text.BetweenDelimiters": lambda text, first, last: _after(text, first).partition(last)[0],
    "Text.Combine": lambda texts, separator="": separator.join(texts),
    "Text.EndsWith": str.endswith,
    "Text.From": lambda value, culture: str(value),
    "Text.Length": len,
    "Text.Lower": str.lower,
    "Text.Range": lambda text, start, count: text[int(start) : int(start) + int(count)],
    "Text.Replace": str.replace,
    "Text.StartsWith": str.startswith,
    "Text.ToList": list,
    "Text.Trim": lambda text, marks=None: text.strip(marks),
    "Time.Hour": lambda at: at.hour,
    "Value.Multiply": lambda left, right, precision: _EXACT.multiply(left, right),
    "Value.Subtract": lambda left, right, precision: _EXACT.subtract(left, right),
}


class Queries:
    """The expressions of a project and the queries of its tables, with other values of parameters and functions that stand for sources."""

    def __init__(self, project: Project, **values: Any) -> None:
        self._scope: Scope = dict(LIBRARY)
        self._scope.update({name: _Later(_Parser(text).whole(), self._scope) for name, text in project.m().items()})
        self._scope.update(values)

    def __getitem__(self, name: str) -> Any:
        return _look_up(self._scope, name)
