"""TensorBoard's file of a run, as far as numbers go.

The package that writes such files imports torch where it is installed, which takes longer than
the rest of a command's start, and its thread dies of a full disk. The format is small: records of
TFRecord (length, masked CRC-32C, data, masked CRC-32C), each a protobuf message ``Event``
(tensorboard/compat/proto/event.proto and summary.proto have the numbers of its fields).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
_LENGTH, _FIXED32, _FIXED64, _VARINT = 2, 5, 1, 0  # protobuf's wire types


def _table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0) for crc in table]
    return table


_TABLE = _table()


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


def _field(number: int, wire_type: int, value: bytes) -> bytes:
    length = _varint(len(value)) if wire_type == _LENGTH else b""
    return _varint(number << 3 | wire_type) + length + value


def _event(step: int, what: bytes) -> bytes:
    """A whole record: an ``Event`` of now, at ``step``."""
    now = _field(1, _FIXED64, struct.pack("<d", time.time()))
    data = now + _field(2, _VARINT, _varint(step)) + what
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def _summary(scalars: Mapping[str, float]) -> bytes:
    with np.errstate(over="ignore"):
        numbers = np.array([*scalars.values()], float).astype("<f4")
    values = b""
    for tag, number in zip(scalars, numbers, strict=True):
        value = _field(1, _LENGTH, tag.encode()) + _field(2, _FIXED32, number.tobytes())
        values += _field(1, _LENGTH, value)
    return _field(5, _LENGTH, values)


class EventFile:
    """Appends scalars to a new file in ``folder``.

    TensorBoard then forgets what the folder's older files say of ``start_step`` and later: a run
    that resumes computes those steps again.

    A write that fails (a full disk) is told to ``say``, and no more is written: these are
    pictures, for which no run should end.
    """

    def __init__(self, folder: str | Path, *, start_step: int, say: Callable[[str], None] = print):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self.path, self._say, self._whole = folder / name, say, True
        self._file = self.path.open("wb", buffering=0)  # a failed write leaves nothing to flush
        self._append(_event(0, _field(3, _LENGTH, b"brain.Event:2")))
        session_start = _field(7, _LENGTH, _field(1, _VARINT, _varint(1)))
        self._append(_event(start_step, session_start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._append(_event(step, _summary(scalars)))

    def close(self) -> None:
        self._file.close()

    def _append(self, record: bytes) -> None:
        try:
            if self._whole and self._file.write(record) < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._whole = False
            self._say(f"{self.path}: can't be written: {error}; TensorBoard will show no more")
