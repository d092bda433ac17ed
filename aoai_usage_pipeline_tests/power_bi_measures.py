"""Computes the measures of the Power BI model over the published DuckDB file, exactly: each column by what Power Query makes of it.

Knows the DAX that the model uses, and raises `NotImplementedError` for any other.
"""

import calendar
import dataclasses
import datetime as dt
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import duckdb
from pbi_parsers import dax

from aoai_usage_pipeline.lake.engine import literal
from aoai_usage_pipeline_tests.power_bi import Project

Value = Decimal | dt.date | dt.datetime | str | bool | None

_MADE = {
    "Hourly usage": {
        "requests": "1",
        "failed": "CAST(coalesce(status_code >= 400, false) AS INTEGER)",
        "throttled": "CAST(coalesce(status_code = 429, false) AS INTEGER)",
        "lag_seconds": "epoch_us(enqueued_at) - epoch_us(event_time)",
        "longest_lag_seconds": "epoch_us(enqueued_at) - epoch_us(event_time)",
        "last_enqueued_at": "enqueued_at",
    },
    "Capture files": {"files": "1"},
}
_IN_MICROSECONDS = {"lag_seconds", "longest_lag_seconds"}

_DATE = """(SELECT day, day <= (SELECT max(usage_date) FROM daily_billing) AS billed FROM (
    SELECT CAST(unnest(generate_series(min(day), max(day), INTERVAL 1 DAY)) AS DATE) AS day FROM (
        SELECT usage_date AS day FROM daily_billing UNION ALL SELECT capture_date FROM capture_files)))"""
_DATES = {"[Date]": "day", "[Billed]": "billed"}


@dataclasses.dataclass
class Measures:
    """The measures of a project over a file. `facts` are the published tables by the model's; `kinds` the meters of each kind; `selected` is what
    the slicers leave, as SQL by the model's table, with the columns `day` and `billed` of its table Date."""

    db: duckdb.DuckDBPyConnection
    project: Project
    facts: Mapping[str, str]
    kinds: Mapping[str, set[str]]
    selected: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Value:
        return self._measure(name, self.selected)

    def at(self, name: str, cell: Mapping[str, list[str]]) -> Value:
        """A measure in one cell of a visual, which filters further."""
        return self._measure(name, {table: [*self.selected.get(table, []), *cell.get(table, [])] for table in {**self.selected, **cell}})

    def _measure(self, name: str, context: Mapping[str, list[str]]) -> Value:
        return self._value(dax.to_ast(self.project.measures[name].value), context, {})

    def _value(self, node: Any, context: Mapping[str, list[str]], names: Mapping[str, Value]) -> Any:
        match type(node).__name__:
            case "MeasureExpression":
                return self._measure(node.name.text.strip("[]"), context)
            case "LiteralNumberExpression":
                return Decimal(node.value.text)
            case "LiteralStringExpression":
                return node.value.text.strip('"')
            case "IdentifierExpression":
                return names[node.name.text]
            case "AddSubUnaryExpression":
                number = self._value(node.number, context, names)
                return -number if node.operator.text == "-" else number
            case "AddSubExpression":
                left, right = self._value(node.left, context, names), self._value(node.right, context, names)
                if isinstance(left, dt.date):
                    return left + dt.timedelta(int(right))
                # a blank is nothing in a sum
                return None if left is None and right is None else (left or 0) + ((right or 0) if node.operator.text == "+" else -(right or 0))
            case "DivMulExpression":
                left, right = self._value(node.left, context, names), self._value(node.right, context, names)
                if node.operator.text != "*":
                    raise NotImplementedError(node.operator.text)
                return None if left is None or right is None else left * right
            case "ComparisonExpression":
                left, right = self._value(node.left, context, names), self._value(node.right, context, names)
                return {"=": left == right, ">": left > right}[node.operator.text]
            case "ReturnExpression":
                found = dict(names)
                for variable in node.variable_statements:
                    found[variable.var_name.text] = self._value(variable.statement, context, found)
                return self._value(node.ret, context, found)
            case "FunctionExpression":
                return self._call(node.function_name(), node.args, context, names)
        raise NotImplementedError(type(node).__name__)

    def _call(self, function: str, arguments: list[Any], context: Mapping[str, list[str]], names: Mapping[str, Value]) -> Any:
        if function == "CALCULATE":
            inside = {table: list(predicates) for table, predicates in context.items()}
            for argument in arguments[1:]:
                self._filter(argument, inside, context, names)
            return self._value(arguments[0], inside, names)
        if function == "COUNTROWS":
            return self._sql("count(*)", arguments[0].name.text.strip("'"), context)
        if function in ("SUM", "MIN", "MAX", "DISTINCTCOUNTNOBLANK") and len(arguments) == 1:
            [column] = arguments
            table, source = self._source(column)
            aggregate = "count(DISTINCT {})" if function == "DISTINCTCOUNTNOBLANK" else f"{function}({{}})"
            found = self._sql(aggregate.format(self._column(table, source)), table, context)
            return found / 1_000_000 if source in _IN_MICROSECONDS and found is not None else found
        if function == "IF":
            condition = self._value(arguments[0], context, names)
            return self._value(arguments[1], context, names) if condition else self._value(arguments[2], context, names) if arguments[2:] else None
        if function == "HASONEVALUE":
            return self._sql(f"count(DISTINCT {self._column(*self._source(arguments[0]))})", "Daily billing", context) == 1
        if function == "TRUE":
            return True
        if function == "UTCTODAY":
            return dt.datetime.now(dt.UTC).date()
        if function == "DATEDIFF":
            first, last = (self._value(argument, context, names) for argument in arguments[:2])
            return Decimal((last - first).days)
        values = [self._value(argument, context, names) for argument in arguments]
        if function == "MAX":
            return max(value or 0 for value in values)
        if function == "ISBLANK":
            return values[0] is None
        if function == "NOT":
            return not values[0]
        if function == "DIVIDE":
            above, below = values
            return None if above is None or not below else above / below
        if function == "DAY":
            return Decimal(values[0].day)
        if function in ("EDATE", "EOMONTH"):
            start, months = values
            year, month = divmod(start.year * 12 + start.month - 1 + int(months), 12)
            last = calendar.monthrange(year, month + 1)[1]
            return dt.date(year, month + 1, last if function == "EOMONTH" else min(start.day, last))
        raise NotImplementedError(function)

    def _filter(self, node: Any, context: dict[str, list[str]], outer: Mapping[str, list[str]], names: Mapping[str, Value]) -> None:
        """Add a filter of CALCULATE, which is evaluated in the outer context, to the facts that it reaches."""
        function = node.function_name()
        if function == "ALLSELECTED" and not node.args:
            context.clear()
            context.update({table: list(predicates) for table, predicates in self.selected.items()})
        elif function == "REMOVEFILTERS" and node.args[0].name.text == "'Date'":
            self._forget_dates(context)
        elif function == "CALCULATETABLE":
            inside = {table: list(predicates) for table, predicates in outer.items()}
            for argument in node.args[1:]:
                self._filter(argument, inside, outer, names)
            self._filter(node.args[0], context, inside, names)
        elif function == "VALUES":
            table, source = self._source(node.args[0])
            found = self.db.execute(f"SELECT DISTINCT {source} FROM {self.facts[table]} WHERE {self._where(table, outer)}").fetchall()
            context.setdefault(table, []).append(
                f"coalesce({source}, '') IN ({', '.join(literal(value or '') for [value] in found)})" if found else "false"
            )
        elif function == "DATESBETWEEN":
            first, last = (self._value(argument, outer, names) for argument in node.args[1:])
            self._forget_dates(context)
            for table in self.facts:
                day = "capture_date" if table in ("Quarantine", "Capture files") else "usage_date"
                context.setdefault(table, []).append(f"{day} BETWEEN DATE '{first}' AND DATE '{last}'")
        elif function == "KEEPFILTERS":
            [predicate] = node.args
            if type(getattr(predicate, "right", None)).__name__ == "FunctionExpression":
                table, source = self._source(predicate.left)
                context.setdefault(table, []).append(f"{self._column(table, source)} = {self._value(predicate.right, outer, names)}")
                return
            if type(predicate).__name__ == "InExpression":
                column, texts, no = predicate.value, [element.value.text for element in predicate.array.elements], ""
            else:
                column, texts, no = predicate.left, [predicate.right.value.text], {"=": "", "<>": "NOT "}[predicate.operator.text]
            table, source = self._source(column)
            values = ", ".join(literal(text.strip('"').lower()) for text in texts)  # DAX compares without regard to case
            for reached, expression in self._reached(table, source).items():
                context.setdefault(reached, []).append(f"{no}coalesce(lower({expression}), '') IN ({values})")
        else:
            raise NotImplementedError(function)

    def _forget_dates(self, context: dict[str, list[str]]) -> None:
        """Take away the filters on the table Date, which is marked as the date table: all of them at once."""
        for table in (*self.facts, "Date"):
            context[table] = [predicate for predicate in context.get(table, []) if not re.match(r"(usage_date|capture_date|day)\b", predicate)]

    def _reached(self, table: str, source: str) -> dict[str, str]:
        """The facts that a filter on a column reaches, with the column's SQL there."""
        if table in self.facts:
            return {table: self._column(table, source)}
        if table == "Meter" and source == "[Kind]":
            kinds = " ".join(f"WHEN meter IN ({', '.join(map(literal, sorted(meters)))}) THEN {literal(kind)}" for kind, meters in self.kinds.items())
            return {"Daily billing": f"CASE {kinds} ELSE 'other' END"}
        if table == "Payer":
            return dict.fromkeys(("Daily billing", "Daily usage", "Hourly usage"), source)
        raise NotImplementedError(table)

    def _source(self, column: Any) -> tuple[str, str]:
        table, name = column.table.text.strip("'"), column.column.text.strip("[]")
        # the columns of Payer and Meter are named as those of the facts they are made of
        return table, self.project.columns["Daily billing" if table == "Payer" else table, name].properties["sourceColumn"]

    @staticmethod
    def _column(table: str, source: str) -> str:
        if source.endswith("_millionths"):
            return f"CAST(floor({source.removesuffix('_millionths')} * 1000000) AS BIGINT)"
        if source.endswith("_remainder"):
            return remainder(source.removesuffix("_remainder"))
        return _MADE.get(table, {}).get(source, _DATES.get(source, source) if table == "Date" else source.strip("[]").lower())

    def _sql(self, expression: str, table: str, context: Mapping[str, list[str]]) -> Any:
        source = _DATE if table == "Date" else self.facts[table]
        [[value]] = self.db.execute(f"SELECT {expression} FROM {source} WHERE {self._where(table, context)}").fetchall()
        return Decimal(value) if isinstance(value, int) else value

    @staticmethod
    def _where(table: str, context: Mapping[str, list[str]]) -> str:
        return " AND ".join(context.get(table, [])) or "true"


def remainder(money: str) -> str:
    """SQL: what whole millionths leave over of an amount, in units of the 15th place."""
    return f"CAST(({money} - CAST(floor({money} * 1000000) AS DECIMAL(38,15)) * 0.000001) * 1000000000000000 AS BIGINT)"
