"""Checks over capture dates: do files balance, can they be read, are the hub's sequence numbers complete."""

import datetime as dt
from collections.abc import Iterable, Iterator, Sequence

from aoai_usage_pipeline.lake.manifest import FileEntry, Manifest

Row = dict[str, object]


def unbalanced_files(manifests: Iterable[Manifest], dates: Sequence[dt.date]) -> list[Row]:
    """Files whose events are not exactly their parsed and quarantined ones."""
    return [
        {"capture_date": str(date), "blob": f.blob, "captured": f.events, "parsed": f.parsed, "quarantined": f.quarantined}
        for date, f in _files(manifests, dates)
        if f.events != f.parsed + f.quarantined or f.events < f.records
    ]


def unreadable_files(manifests: Iterable[Manifest], dates: Sequence[dt.date]) -> list[Row]:
    """Files that contribute nothing until they are replaced."""
    return [
        {"capture_date": str(date), "blob": f.blob, "bytes": f.bytes, "reason": f.reason} for date, f in _files(manifests, dates) if not f.readable
    ]


def sequence_gaps(manifests: Sequence[Manifest], dates: Sequence[dt.date]) -> list[Row]:
    """Sequence numbers of a partition that no file holds, shown with the file behind the gap."""
    return [
        {"capture_date": str(date), "hub": f.hub, "partition_id": f.partition_id, "missing_from": expected, "missing_to": first - 1, "blob": f.blob}
        for date, f, expected, first in _joints(manifests, dates)
        if first > expected
    ]


def overlaps(manifests: Sequence[Manifest], dates: Sequence[dt.date]) -> list[Row]:
    """Sequence numbers of a partition that more than one file holds, shown with the later file."""
    return [
        {
            "capture_date": str(date),
            "hub": f.hub,
            "partition_id": f.partition_id,
            "repeated_from": first,
            "repeated_to": min(expected - 1, f.last_sequence_number or first),
            "blob": f.blob,
        }
        for date, f, expected, first in _joints(manifests, dates)
        if first < expected
    ]


def new_fields(manifests: Sequence[Manifest], dates: Sequence[dt.date]) -> list[Row]:
    """Fields of events that neither their contract nor any earlier capture date knows."""
    wanted, seen = set(dates), set()
    rows: list[Row] = []
    for manifest in manifests:
        found = {(contract, field) for segment in manifest.segments for contract, fields in segment.unknown_fields.items() for field in fields}
        if manifest.capture_date in wanted:
            rows += [{"capture_date": str(manifest.capture_date), "contract": contract, "field": field} for contract, field in sorted(found - seen)]
        seen |= found
    return rows


def _files(manifests: Iterable[Manifest], dates: Sequence[dt.date]) -> Iterator[tuple[dt.date, FileEntry]]:
    wanted = set(dates)
    return ((m.capture_date, f) for m in manifests if m.capture_date in wanted for f in m.files)


def _joints(manifests: Sequence[Manifest], dates: Sequence[dt.date]) -> Iterator[tuple[dt.date, FileEntry, int, int]]:
    """Each file of the dates with the sequence number its partition should go on with, and the one the file starts with."""
    wanted = set(dates)
    partitions: dict[tuple[str, str], list[tuple[int, int, dt.date, FileEntry]]] = {}
    for manifest in manifests:
        for f in manifest.files:
            if f.first_sequence_number is not None and f.last_sequence_number is not None:
                span = (f.first_sequence_number, f.last_sequence_number, manifest.capture_date, f)
                partitions.setdefault((f.hub, f.partition_id), []).append(span)
    for spans in partitions.values():
        spans.sort(key=lambda span: (span[0], span[1], span[3].blob))
        expected = spans[0][0]
        for first, last, date, f in spans:
            if date in wanted:
                yield date, f, expected, first
                yield from ((date, f, missing_from, missing_to + 1) for missing_from, missing_to in f.gaps)
            expected = max(expected, last + 1)
