"""log.jsonl: one line of JSON per logged step, appended; cut back to its checkpoint when a run is resumed."""

import json
import os
from pathlib import Path
from typing import Any


class Log:
    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        """`keep_bytes`: what was written up to the checkpoint; later lines belong to steps that will be run again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        with path.open("ab") as stream:
            if stream.tell() < keep_bytes:
                raise ValueError(f"{path} has {stream.tell()} bytes; its checkpoint was made when it had {keep_bytes}.")
            stream.truncate(keep_bytes)

    def append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def flushed_bytes(self) -> int:
        """Its length, once it is on the disk."""
        with self.path.open("rb") as stream:
            os.fsync(stream.fileno())
            return stream.seek(0, os.SEEK_END)


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
