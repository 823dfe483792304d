"""What was asked of an endpoint, answered and paid: a file that is only ever appended to.

A line of JSON an event, numbered by request::

    {"sent": 7, "key": "ab12...", "bound": 0.0021}      dollars that it costs at most
    {"answer": 7, "key": "ab12...", "cost": 0.0004, "text": "...", ...}
    {"free": 7, "why": "HTTP 429"}                      refused: nothing to pay
    {"lost": 7, "why": "no answer in 60 s"}             may have been billed: stays charged

A request is charged with its bound from before it is sent until it is known to cost less. So a run
that was killed counts what was under way in full, and a cap on the sum holds over all runs.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from llmzoo_jax.errors import InputError


class Ledger:
    """The file at ``path``; ``cap`` is in dollars. One process at a time may hold it."""

    def __init__(self, path: str | os.PathLike, cap: float):
        self.cap = cap
        self.spent = 0.0  # answers, and what was lost
        self.in_flight: dict[int, float] = {}  # number -> bound
        self._answers: dict[bytes, int] = {}  # key -> offset of its line
        self._numbers = 0
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115  (closed by close())
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise InputError(f"{path}: another run writes to it; wait, or use another --out") from (
                error
            )
        self._load()

    def _load(self) -> None:
        self._file.seek(0)
        offset = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):  # a kill in mid-write: what it says did not count yet
                self._file.truncate(offset)
                break
            try:
                self._replay(json.loads(line), offset)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self._file.name}:{number}: not an event of a ledger ({error!r}); restore the"
                    " file, or start with another --out"
                ) from error
            offset += len(line)
        self.spent += sum(self.in_flight.values())  # sent, and no word of it: killed meanwhile
        self.in_flight.clear()

    def _replay(self, event: dict[str, Any], offset: int) -> None:
        if "sent" in event:
            self.in_flight[event["sent"]] = event["bound"]
            self._numbers = max(self._numbers, event["sent"])
        elif "answer" in event:
            del self.in_flight[event["answer"]]
            self.spent += event["cost"]
            self._answers[bytes.fromhex(event["key"])] = offset
        elif "free" in event:
            del self.in_flight[event["free"]]
        else:
            self.spent += self.in_flight.pop(event["lost"])

    def __len__(self) -> int:
        """How many answers are stored."""
        return len(self._answers)

    def answer(self, key: str) -> dict[str, Any] | None:
        """What was stored under the key, or None."""
        if (offset := self._answers.get(bytes.fromhex(key))) is None:
            return None
        self._file.seek(offset)
        return json.loads(self._file.readline())

    @property
    def committed(self) -> float:
        """Dollars that are spent, or may be by what is under way."""
        return self.spent + sum(self.in_flight.values())

    def fits(self, bound: float) -> bool:
        return self.committed + bound <= self.cap

    def sent(self, key: str, bound: float) -> int:
        """To be called before a request goes out; returns its number."""
        self._numbers += 1
        self._append({"sent": self._numbers, "key": key, "bound": bound})
        self.in_flight[self._numbers] = bound
        return self._numbers

    def answered(self, number: int, key: str, cost: float, content: dict[str, Any]) -> None:
        """Stores an answer for good, then takes it into account."""
        offset = self._append({"answer": number, "key": key, "cost": cost, **content}, sync=True)
        del self.in_flight[number]
        self.spent += cost
        self._answers[bytes.fromhex(key)] = offset

    def free(self, number: int, why: str) -> None:
        self._append({"free": number, "why": why})
        del self.in_flight[number]

    def lost(self, number: int, why: str) -> None:
        self._append({"lost": number, "why": why})
        self.spent += self.in_flight.pop(number)

    def _append(self, event: dict[str, Any], *, sync: bool = False) -> int:
        """The offset of the new line. With ``sync`` it outlives a power cut, too."""
        offset = self._file.seek(0, os.SEEK_END)
        # ASCII: half of a surrogate pair, which models do send, is no UTF-8.
        self._file.write(json.dumps(event).encode("ascii") + b"\n")
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())
        return offset

    def close(self) -> None:
        self._file.close()
