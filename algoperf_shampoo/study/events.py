"""A run's curves as a file that TensorBoard reads. Standard library only.

The format: records of length, masked CRC-32C of the length, data, masked CRC-32C of the data (as
TensorFlow writes them), each an ``Event`` message of protocol buffers: wall time, step, scalars.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import struct
from collections.abc import Iterable
from pathlib import Path

from algoperf_shampoo.harness import disk

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected
_NOT_METRICS = ("global_step", "preemption_count")


def write(run_dir: Path, started: float) -> Path:
    """Write the evaluations and step losses of a run folder; the file, made anew at each call.

    Args:
        started: Unix time of the run's beginning; a row's wall time is that and its duration.

    Raises:
        DiskError: a CSV cannot be read, or the file cannot be written.
    """
    events = [_event(started, None, {})]
    durations: list[tuple[int, float]] = []
    for row in _rows(run_dir / "eval_measurements.csv"):
        step = int(row["global_step"])
        duration = row.get("total_duration", 0.0)
        durations.append((step, duration))
        values = {key: value for key, value in row.items() if key not in _NOT_METRICS}
        events.append(_event(started + duration, step, values))
    for row in _rows(run_dir / "step_losses.csv"):
        step = int(row["global_step"])
        # The time of the evaluation that follows: a step's own is not kept.
        after = next((d for s, d in durations if s >= step), durations[-1][1] if durations else 0.0)
        events.append(_event(started + after, step, {"train/step_loss": row["loss"]}))
    disk.write_atomically(path(run_dir, started), b"".join(map(_record, events)))
    return path(run_dir, started)


def path(run_dir: Path, started: float) -> Path:
    """Where :func:`write` writes to: one file a run, under a name that TensorBoard looks for."""
    return run_dir / f"events.out.tfevents.{int(started)}.curves"


def read(data: bytes) -> list[tuple[float, int, dict[str, float]]]:
    """(wall time, step, scalars) of each event in a file that :func:`write` made.

    Raises:
        ValueError: a checksum or a field is not as it should be.
    """
    found, at = [], 0
    while at < len(data):
        header, (check,) = data[at : at + 8], struct.unpack_from("<I", data, at + 8)
        (length,) = struct.unpack("<Q", header)
        body = data[at + 12 : at + 12 + length]
        (body_check,) = struct.unpack_from("<I", data, at + 12 + length)
        if masked_crc(header) != check or masked_crc(body) != body_check:
            raise ValueError(f"checksum at byte {at}")
        found.append(_decode(body))
        at += 16 + length
    return found


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and shifted, as TensorFlow stores it beside the data it is of."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """The cyclic redundancy check with Castagnoli's polynomial."""
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@functools.cache
def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


def _rows(table: Path) -> Iterable[dict[str, float]]:
    with disk.explained(table):
        text = table.read_text(encoding="utf-8") if table.exists() else ""
    for row in csv.DictReader(io.StringIO(text, newline="")):
        values = {key: _number(text) for key, text in row.items() if key}
        if not math.isnan(values.get("global_step", math.nan)):
            yield {k: v for k, v in values.items() if v is not None}


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _record(body: bytes) -> bytes:
    header = struct.pack("<Q", len(body))
    checks = struct.pack("<I", masked_crc(header)), struct.pack("<I", masked_crc(body))
    return header + checks[0] + body + checks[1]


def _event(wall_time: float, step: int | None, values: dict[str, float]) -> bytes:
    """Event { double wall_time = 1; int64 step = 2; string file_version = 3; Summary = 5 }."""
    body = b"\x09" + struct.pack("<d", wall_time)
    if step is None:
        return body + _field(3, b"brain.Event:2")
    summary = b"".join(
        _field(1, _field(1, name.encode()) + b"\x15" + struct.pack("<f", _as_float32(value)))
        for name, value in values.items()
    )
    return body + b"\x10" + _varint(step) + _field(5, summary)


def _as_float32(value: float) -> float:
    return value if abs(value) < 3.4e38 or math.isnan(value) else math.copysign(math.inf, value)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _decode(body: bytes) -> tuple[float, int, dict[str, float]]:
    wall_time, step, values = 0.0, 0, {}
    for number, content in _fields(body):
        if number == 1:
            (wall_time,) = struct.unpack("<d", content)
        elif number == 2:
            step = int.from_bytes(content, "little")
        elif number == 5:
            for _, value in _fields(content):
                parts = dict(_fields(value))
                values[parts[1].decode()] = struct.unpack("<f", parts[2])[0]
    return wall_time, step, values


def _fields(data: bytes) -> Iterable[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        kind = key & 7
        if kind == 0:
            number, at = _read_varint(data, at)
            yield key >> 3, number.to_bytes(8, "little")
            continue
        if kind == 2:
            size, at = _read_varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"field of kind {kind}")
        yield key >> 3, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1
