"""The published JSON Schemas of records and log entries, `schemas/*.json`: generated from the models.

To write them anew: `python -m flows.lineage.schema`. Of a field, the description completes the words "must be".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from flows.lineage import entries, record
from flows.lineage.entries import Entry
from flows.lineage.record import Record

__all__ = ["FOLDER", "published_schemas"]

FOLDER = Path(__file__).with_name("schemas")

_RECORD = (
    "The record of a model version, lineage.json. Beside this, copal checks that whole numbers are written without a "
    "fraction, that domains are sorted by name and each is there once, that step is one of them, that perplexity and "
    "dense_perplexity name the same domains, and that key is there where parent is."
)
_ENTRY = (
    "An entry of the log of a lineage. Beside this, number counts from 1, and previous is the SHA-256 of the canonical "
    "JSON of the entry before it."
)


class _Untitled(GenerateJsonSchema):
    """Without a title for every field, which would only repeat its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def published_schemas() -> dict[str, str]:
    """The text of each schema by the name of its file in `FOLDER`."""
    found: dict[str, tuple[str, TypeAdapter[Any]]] = {
        record.SCHEMA: (_RECORD, TypeAdapter(Record)),
        entries.SCHEMA: (_ENTRY, TypeAdapter(Entry)),
    }
    texts = {}
    for name, (comment, adapter) in found.items():
        head = {
            "$schema": GenerateJsonSchema.schema_dialect,
            "$id": f"urn:{name.replace('.', ':').replace('/', ':')}",
            "$comment": f"{comment} Of a field, the description completes the words: must be.",
        }
        made = adapter.json_schema(mode="serialization", schema_generator=_Untitled)
        texts[f"{name.replace('/', '.')}.json"] = json.dumps(head | made | {"title": name}, indent=2) + "\n"
    return texts


if __name__ == "__main__":
    for file, text in published_schemas().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
