"""Microsoft's Bicep types, which the npm package @azure/mcp has in it: asked once per type, offline, and kept beside it.

The package names some types that it does not have. Those that infra/ needs are written by hand in data/bicep_types.json.
"""

import json
import os
import subprocess
from pathlib import Path

from aoai_usage_pipeline_tests.bicep import ResourceType, own_type, resource_type

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
                return content["message"].partition(" To mitigate")[0]
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
