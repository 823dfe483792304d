"""TensorBoard's file: what another program's reader finds in it."""

import os
import struct

import numpy as np
import pytest

from llmzoo_jax import metrics
from llmzoo_jax.tensorboard import EventFile


def events(path):
    """The messages of a file, read by tensorboardX's protobufs; checks lengths and checksums."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def check(data, masked):
        crc = crc32c(data)
        assert struct.unpack("<I", masked)[0] == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    data, found = path.read_bytes(), []
    while data:
        size = struct.unpack("<Q", data[:8])[0]
        check(data[:8], data[8:12])
        check(data[12 : 12 + size], data[12 + size : 16 + size])
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def scalars(found):
    return {(e.step, v.tag): v.simple_value for e in found for v in e.summary.value}


def test_numbers_are_read_back_with_their_steps_and_tags(tmp_path):
    pytest.importorskip("tensorboardX")
    file = EventFile(tmp_path, start_step=1)
    file.write(1, {"loss": 2.5, "held-out/中文": np.float32(0.1)})
    file.write(70_000, {"loss": float("nan"), "tokens": 10**12, "huge": 1e300, "n": 3})
    file.close()
    found = events(file.path)
    assert found[0].file_version == "brain.Event:2"
    assert found[1].session_log.status == 1 and found[1].step == 1
    assert all(e.wall_time > 1.6e9 for e in found)
    read = scalars(found)
    assert read[1, "loss"] == 2.5 and read[1, "held-out/中文"] == np.float32(0.1)
    assert np.isnan(read[70_000, "loss"]) and read[70_000, "huge"] == np.inf
    assert read[70_000, "tokens"] == np.float32(1e12) and read[70_000, "n"] == 3


def test_a_run_that_resumes_starts_a_file_that_takes_later_steps_back(tmp_path):
    pytest.importorskip("tensorboardX")
    for start in (0, 2):
        log = metrics.MetricsLog(tmp_path, start_step=start)
        for step in range(start + 1, 5):
            log.write(step, loss=step / 2, heldout_by_language={"fr": 1.0, "th": 2.0}, none={})
        log.close()
    first, second = (events(p) for p in sorted((tmp_path / "tensorboard").iterdir()))
    assert (first[1].step, second[1].step) == (1, 3)
    assert scalars(second) == {
        (step, tag): number
        for step in (3, 4)
        for tag, number in (
            ("loss", step / 2),
            ("heldout_by_language/fr", 1.0),
            ("heldout_by_language/th", 2.0),
        )
    }


def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, capfd):
    log = metrics.MetricsLog(tmp_path, start_step=0)
    log._board._file.close()
    log._board._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for step in (1, 2):
        log.write(step, loss=1.0)
    log.close()
    said = "".join(capfd.readouterr())
    assert said.count("TensorBoard will show no more") == 1
    assert os.path.basename(log._board.path) in said and "No space left" in said
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2]
