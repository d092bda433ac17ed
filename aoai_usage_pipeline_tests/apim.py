"""A gateway that runs the policies: their C# expressions are taken out of the XML, compiled with mono and executed by `apim.cs`."""

import base64
import dataclasses
import datetime as dt
import json
import re
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

POLICIES = Path(__file__).parent.parent / "infra/policies"
NEWTONSOFT = Path("/usr/lib/cli/Newtonsoft.Json-5.0/Newtonsoft.Json.dll")
NAMED_VALUES = {"aoai-usage-tenant-id": "contoso.onmicrosoft.com", "aoai-usage-backend": "aoai-swc"}
# what API Management imports for expressions; other namespaces are written out
_USINGS = """using System; using System.Collections.Generic; using System.Linq; using System.Text; using System.Text.RegularExpressions;
using System.Xml.Linq; using Newtonsoft.Json.Linq;"""
_EPOCH = dt.datetime(1, 1, 1)


class CompileError(Exception):
    """The compiler's messages, which name the policy file and its line and column."""


@dataclasses.dataclass(frozen=True)
class Expression:
    """A policy expression: `code` is between `@(` or `@{` and its end, and begins at `line` and `column` of the file, both from 1.

    `block` says that it is statements, `attribute` that it is the value of an attribute.
    """

    line: int
    column: int
    block: bool
    attribute: bool
    code: str


def mask(text: str, first: int = 0) -> tuple[str, list[Expression]]:
    """A policy as well-formed XML, with `__E<number>__` for each expression, and the expressions."""
    out, found, at = [], [], 0
    while at < len(text):
        if text.startswith("<!--", at):
            end = text.index("-->", at) + 3
            out.append(text[at:end])
            at = end
        elif text.startswith(("@(", "@{"), at):
            end = _end(text, at + 1)
            begin = at + 2
            line = text.count("\n", 0, begin) + 1
            found.append(Expression(line, begin - text.rfind("\n", 0, begin), text[at + 1] == "{", text[at - 1] == '"', text[begin : end - 1]))
            out.append(f"__E{first + len(found) - 1}__")
            at = end
        else:
            out.append(text[at])
            at += 1
    return "".join(out), found


TOKEN = re.compile(r"""@"(?:[^"]|"")*"|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'|//[^\n]*|/\*.*?\*/|[(){}\[\]]""", re.DOTALL)


def _end(text: str, at: int) -> int:
    """Where the bracket at a place of C# is closed again, behind it."""
    depth = 0
    for token in TOKEN.finditer(text, at):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(token.group(), 0)
        if depth == 0:
            return token.end()
    raise ValueError(f"line {text.count(chr(10), 0, at) + 1}: the expression does not end")


def project_policies() -> dict[str, str]:
    """The policies and fragments of the project by name, with named values put in."""
    return {path.stem: substituted(path.read_text()) for path in sorted(POLICIES.glob("*.xml"))}


def substituted(text: str) -> str:
    """A policy with its named values; one that is not set is an error, as in API Management."""
    return re.sub(r"{{([\w.-]+)}}", lambda name: NAMED_VALUES[name.group(1)], text)


def compile_policies(folder: Path, policies: Mapping[str, str]) -> None:
    """Compile policies into `folder`, which can then run as a gateway. Raises CompileError."""
    methods, count = [], 0
    for name, text in policies.items():
        masked, expressions = mask(text, count)
        ET.fromstring(masked)
        (folder / f"{name}.xml").write_text(masked)
        for number, expression in enumerate(expressions, count):
            # padded, so that columns are those of the file
            code = f'#line {expression.line} "{name}.xml"\n{" " * (expression.column - 1)}{expression.code}\n#line default'
            body = code if expression.block else f"return (\n{code}\n);"
            methods.append(f"static object E{number}(Context context) {{\n{body}\n}}")
        count += len(expressions)
    table = ", ".join(f"E{number}" for number in range(count))
    source = f"""{_USINGS}
public static class Expressions {{
{chr(10).join(methods)}
static Func<Context, object>[] Table() {{ return new Func<Context, object>[] {{ {table} }}; }}
public static readonly Func<Context, object>[] All = Table();
}}"""
    (folder / "Expressions.cs").write_text(source)
    gateway = Path(__file__).with_suffix(".cs")
    command = [
        "mcs",
        "-langversion:7",
        "-warn:0",
        "-r:System.Xml.Linq.dll",
        f"-r:{NEWTONSOFT}",
        f"-out:{folder}/gateway.exe",
        str(gateway),
        "Expressions.cs",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise CompileError(done.stdout + done.stderr)


class Gateway:
    """A running gateway over compiled policies."""

    def __init__(self, folder: Path, zone: str = "UTC") -> None:
        environment = {"MONO_PATH": str(NEWTONSOFT.parent), "PATH": "/usr/bin:/bin", "TZ": zone, "LANG": "C.UTF-8"}
        command = ["mono", str(folder / "gateway.exe"), str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment)

    def close(self) -> None:
        """Stop it."""
        self._process.communicate(timeout=30)

    def ask(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """What the gateway says to one line; an interpreter that cannot go on is an AssertionError."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        said = json.loads(self._process.stdout.readline())
        assert "broken" not in said, said["broken"]
        return said

    def call(
        self,
        path: str = "/openai/deployments/chat/chat/completions?api-version=2024-10-21",
        body: Any = None,
        *,
        at: dt.datetime,
        request_id: str = "6f0c2f3e-6d0b-4d53-8a0f-0c9d3e2b7a11",
        headers: Mapping[str, str] | None = None,
        status: int = 200,
        answer: Any = None,
        answer_headers: Mapping[str, str] | None = None,
        error: str | None = None,
        **changes: Any,
    ) -> "Served":
        """Send a request through inbound, backend, outbound and on-error. Bodies are sent as JSON unless they are bytes; `error` is why the backend
        did not answer; `changes` are further fields of the call, such as subscription or variables.
        """
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        answered = answer if isinstance(answer, bytes | None) else json.dumps(answer).encode()
        length = {"Content-Length": str(len(content))} if content is not None else {}
        call = {
            "policy": "azure-openai-api", "url": f"https://apim.azure-api.net{path}", "requestId": request_id, "service": "APIM.azure-api.net",
            "ticks": (at - _EPOCH) // dt.timedelta(microseconds=1) * 10, "api": "azure-openai", "operation": "op", "product": "hr", "subscription": "sales",
            "headers": {"Content-Type": "application/json", "api-key": "CANARY-KEY", **length, **(headers or {})}, "body": _base64(content),
            "backend": {"error": error} if error else {
                "status": status, "headers": {"Content-Type": "application/json", "x-ms-region": "Sweden Central", **(answer_headers or {})},
                "body": _base64(answered),
            },
        }  # fmt: skip
        return Served(self.ask(call | changes), content, answered)


def _base64(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode()


@dataclasses.dataclass(frozen=True)
class Served:
    """What came of a call."""

    said: dict[str, Any]
    asked: bytes | None
    answered: bytes | None

    @property
    def bodies(self) -> list[bytes]:
        """The messages that went to the event hub."""
        return [event["body"].encode() for event in self.said["events"]]

    @property
    def event(self) -> dict[str, Any]:
        """The only message, as JSON."""
        [body] = self.bodies
        return json.loads(body)

    @property
    def sent(self) -> bytes | None:
        """The body that the backend got."""
        body = self.said["sent"]["body"]
        return None if body is None else base64.b64decode(body)

    @property
    def returned(self) -> bytes | None:
        """The body that the caller got."""
        body = self.said["response"]["body"]
        return None if body is None else base64.b64decode(body)
