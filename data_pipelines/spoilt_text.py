"""Text that was spoilt on its way: read in another encoding, or never filled in."""

from __future__ import annotations

import codecs
import re
from typing import Any

# --- never filled in ----------------------------------------------------------------------------

# "[Your name]" is none of these: so looks a letter that is written for others to send.
_PLACEHOLDER = re.compile(
    r"(?<![A-Za-z0-9{}^_\\])\{\{\s*[\w .-]{1,40}\s*\}\}(?!\})"
    r"|\[\s*insert\b[^\]\n]{0,80}\]|\blorem ipsum\b"
    r"|[\[【]\s*(?:插入|填写|填入)[^\]】\n]{0,40}[\]】]",
    re.IGNORECASE,
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)  # where braces are meant


def placeholder(text: str) -> str:
    """The first placeholder outside code, or ""."""
    found = _PLACEHOLDER.search(_CODE.sub(" ", text))
    return found[0] if found else ""


# --- mojibake -----------------------------------------------------------------------------------

_UTF8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
# "Ã", "Â", "â€": Latin letters and punctuation begin so; where little else is there, once will do.
_TELLING = (b"\xc2", b"\xc3", b"\xe2\x80")
_FAR = re.compile(r"(?<![^\x00-\x7f])[^\x00-\x7f]{6}")  # the beginning of a run
_ACCENTED = re.compile(r"[À-ÖØ-öø-ÿ]{4,}")


def _encoding(codec: str) -> Any:
    """For charmap_encode. Bytes that the codec leaves undefined are C1 controls, as in HTML."""
    return codecs.charmap_build(
        "".join(bytes([b]).decode(codec, "ignore") or chr(b) for b in range(256))
    )


_ENCODINGS = {codec: _encoding(codec) for codec in ("latin-1", "cp1252", "cp1251")}


def mojibake(text: str) -> str:
    """How ``text`` was read wrongly, or "". Found by the round trip: to bytes, and read as UTF-8.

    A line counts where most of its characters beyond ASCII make characters in this way, and more
    than one does. In real French, Ukrainian or Chinese a few can, by chance, but never most.
    """
    if text.isascii():
        return ""
    if "锟斤拷" in text:
        return "锟斤拷, which are lost characters that were read as GBK"
    for codec, encoding in _ENCODINGS.items():
        if not _UTF8.search(codecs.charmap_encode(text, "replace", encoding)[0]):
            continue
        for line in text.split("\n"):
            found = _UTF8.findall(codecs.charmap_encode(line, "replace", encoding)[0])
            beyond_ascii = sum(character > "\x7f" for character in line)
            fewest = 4 if codec == "cp1251" else 1 if any(map(_telling, found)) else 2
            if len(found) >= fewest and 2 * sum(map(len, found)) > beyond_ascii:
                meant = b"".join(found).decode("utf-8", "replace")
                return f"UTF-8 that was read as {codec}: {meant[:20]!r} in {line.strip()[:60]!r}"
    for run in _FAR.findall(text):
        try:
            meant = run.encode("gb18030").decode()
        except UnicodeError:
            continue
        if min(meant) > "\u07ff":  # shorter ones real Chinese makes by chance
            return f"UTF-8 that was read as GBK: {meant!r} in {run!r}"
    runs = [run for run in _ACCENTED.findall(text) if len(set(run)) > 2]
    if len(runs) >= 5:  # words of accented letters alone: more than somebody's list of them
        return f"another encoding that was read as latin-1: {' '.join(runs)[:40]!r}"
    return ""


def _telling(match: bytes) -> bool:
    return match.startswith(_TELLING)
