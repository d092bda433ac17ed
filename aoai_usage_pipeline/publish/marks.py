"""Which version of each day or month a container of Cosmos DB was made equal to, remembered in the lake.

A mark is left after its day was published, so it never claims too much: a run that dies in between costs reading the day once more.
"""

import json
from collections.abc import Mapping

from aoai_usage_pipeline.storage import Changed, NotFound, ObjectStore


class Marks:
    """The marks of one container. They count for `container` only, which says which one it is: those of a container that was created again, or
    that other code made the documents of, are void.
    """

    def __init__(self, lake: ObjectStore, name: str, container: str) -> None:
        self._lake, self._name, self.container = lake, f"published/{name}.json", container

    def etags(self) -> dict[str, str]:
        """The ETag that each day or month had in the lake when it was published last."""
        return self._read()[0]

    def leave(self, etags: Mapping[str, str | None]) -> None:
        """Remember what was published; None is what the lake has not."""
        while etags:
            marked, replacing = self._read()
            merged = {name: etag for name, etag in sorted({**marked, **etags}.items()) if etag}
            content = json.dumps({"container": self.container, "etags": merged})
            try:
                self._lake.write(self._name, content.encode(), replacing=replacing)
                return
            except Changed:
                continue  # another run left its marks

    def _read(self) -> tuple[dict[str, str], str | None]:
        while True:
            try:
                content, etag = self._lake.read(self._name)
                break
            except NotFound:
                return {}, None
            except Changed:
                continue
        try:
            stored = json.loads(content)
            return dict(stored["etags"]) if stored["container"] == self.container else {}, etag
        except (ValueError, TypeError, KeyError):
            return {}, etag  # damaged marks claim nothing
