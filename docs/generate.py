"""Writes the pages that say what the code says: `make docs`."""

import importlib
import json
import textwrap
from pathlib import Path
from typing import Any

from aoai_usage_pipeline import tables
from aoai_usage_pipeline.usage import contracts as package
from aoai_usage_pipeline.usage.contract import TEXT_COLUMNS, Contract, contracts

DOCS = Path(__file__).parent
TABLES = """# Published tables

The tables of the DuckDB file; the day tables have the same columns in the lake. Times are UTC.
"""
CONTRACTS = """# Event contracts

What a gateway may send, one page each, made from the code by `make docs`. An event is read by the contract whose marker comes first in it,
and if that does not fit, by any other that fits. An event that none fits is quarantined as `unknown_contract` with the names of its fields.
Bodies that hold several records (`{"records": […]}` of Azure Monitor, plain arrays) are opened first; each record is an event.

| contract | what it is |
|---|---|
"""


def pages() -> dict[Path, str]:
    """Every generated page with its text."""
    found = {DOCS / "tables.md": TABLES + "".join(_table(name, columns) for name, columns in tables.PUBLISHED.items())}
    summary = CONTRACTS
    for contract in contracts():
        text = _about(contract)
        found[DOCS / "contracts" / f"{contract.name}.md"] = _contract(contract, text)
        summary += f"| [{contract.name}]({contract.name}.md) | {' '.join(text.split('. ')[0].split()).rstrip('.')} |\n"
    found[DOCS / "contracts" / "README.md"] = summary
    return found


def _table(name: str, columns: tuple[tables.Column, ...]) -> str:
    rows = "".join(f"| {c.name} | {c.type} | {c.description} |\n" for c in columns)
    return f"\n## {name}\n\n| column | type | meaning |\n|---|---|---|\n{rows}"


def _about(contract: Contract) -> str:
    return textwrap.dedent(importlib.import_module(f"aoai_usage_pipeline.usage.contracts.{contract.name}").__doc__ or "").strip()


def _contract(contract: Contract, about: str) -> str:
    meaning = {column.name: column.description for column in tables.RAW_EVENTS}
    fields = "".join(f"| {name} | `{_cell(contract.fields[name])}` | {meaning[name]} |\n" for name in TEXT_COLUMNS if name in contract.fields)
    counts = "".join(f"| {name} | `{_cell(sql)}` | as counted by the sender |\n" for name, sql in contract.counts.items())
    usage = f"| token counts | `{_cell(contract.usage)}` | an OpenAI usage object, in any of its shapes |\n" if contract.usage else ""
    lines = [f"- Found by the text {' or '.join(f'`{marker}`' for marker in contract.markers)}; is read when `{_cell(contract.matches)}`."]
    if contract.response:
        lines.append(f"- `a` is what the answer in `{contract.response}` says: JSON, a stream of events, or a line of a batch.")
    if contract.placeholder != "false":
        lines.append(f"- Counts are placeholders, and unknown, when `{_cell(contract.placeholder)}`.")
    if contract.truncated_at:
        lines.append(f"- Of an event that the gateway cut off, everything before `{contract.truncated_at}` is read.")
    if contract.estimate:
        lines.append(f"- With `AOAI_ESTIMATE_USAGE`, usage that is missing is `{_cell(contract.estimate)}`.")
    if contract.secrets:
        lines.append(f"- Never stored: {', '.join(f'`{secret}`' for secret in contract.secrets)}.")
    if contract.ignores:
        lines.append(f"- Known and not read: {', '.join(f'`{field}`' for field in contract.ignores)}.")
    if not contract.billable:
        lines.append("- Never a request of its own: kept in `raw_events` without a usage date.")
    head = "| usage record | from the event `e` | meaning |\n|---|---|---|\n"
    return f"# {contract.name}\n\n{about}\n\n" + "\n".join(lines) + f"\n\n{head}{fields}{counts}{usage}{_schema(contract)}"


def _schema(contract: Contract) -> str:
    """The properties and the example of a contract that has a JSON Schema."""
    path = Path(package.__path__[0]) / f"{contract.name}.schema.json"
    if not path.exists():
        return ""
    schema = json.loads(path.read_text())
    rows = _properties(schema["properties"])
    examples = "\n".join(f"```json\n{json.dumps(example, indent=2)}\n```\n" for example in schema["examples"])
    return f"\n## The message\n\n{schema['description']}\n\n| property | type | meaning |\n|---|---|---|\n{rows}\n{examples}"


def _properties(properties: dict[str, Any], prefix: str = "") -> str:
    rows = ""
    for name, value in properties.items():
        types = value.get("type", [])
        text = " or ".join(f"{type_}" for type_ in ([types] if isinstance(types, str) else types)) or json.dumps(value.get("const"))
        rows += f"| {prefix}{name} | {text} | {value['description']} |\n" + _properties(value.get("properties", {}), f"{prefix}{name}.")
    return rows


def _cell(sql: str) -> str:
    return " ".join(sql.split()).replace("|", "\\|")


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
