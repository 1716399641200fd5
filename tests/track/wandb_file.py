"""Reads back what W&B writes offline, without W&B's server: a LevelDB log of protobuf records."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FULL, FIRST, LAST = 1, 2, 4
BLOCK, HEADER = 32768, 7


class Offline:
    """The records of the only run below a folder, by their types."""

    def __init__(self, folder: Path) -> None:
        import wandb
        from wandb.proto import wandb_internal_pb2

        wandb.teardown()  # or the end of the file may still be on its way
        (file,) = folder.rglob("*.wandb")
        self.folder = file.parent
        self._records: dict[str, list[Any]] = {}
        for data in _records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            self._records.setdefault(kind, []).append(getattr(record, kind))

    @property
    def run(self) -> Any:
        return self._records["run"][0]

    def config(self) -> dict[str, Any]:
        """The settings, without what W&B adds about itself."""
        items = ((_key(item), json.loads(item.value_json)) for item in self.run.config.update)
        return {key: value for key, value in items if key != "_wandb"}

    def rows(self) -> list[dict[str, Any]]:
        """The history, a row for each record."""
        records = self._records["history"]
        return [{_key(i): json.loads(i.value_json) for i in record.item} for record in records]

    def metrics(self) -> dict[str, str]:
        """The step metric of each defined name."""
        return {m.name or m.glob_name: m.step_metric for m in self._records["metric"]}

    def exit_codes(self) -> list[int]:
        return [record.exit_code for record in self._records.get("exit", [])]


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    at, record = HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        record = part if kind in (FULL, FIRST) else record + part
        if kind in (FULL, LAST):
            yield record
