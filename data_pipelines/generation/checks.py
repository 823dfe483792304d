"""Is an answer of use? Each check raises Unusable with a reason that is counted."""

from __future__ import annotations

import json
import re
from typing import Any

from data_pipelines.endpoint import Answer
from data_pipelines.sources import Unusable

# How refusals begin. Only the beginning counts: an answer may speak of what cannot be done.
_REFUSAL = re.compile(
    r"\W*(?:(?:i['’]?m|i am) (?:very |really )?sorry,? (?:but )?(?:i|as)\b|"
    r"sorry,? (?:but )?i (?:can['’]?t|cannot|am unable)|"
    r"i (?:can['’]?t|cannot|am unable to|am not able to|won['’]?t) (?:help|assist|comply|provide|"
    r"fulfil|answer|do that|translate)|as an ai\b|"
    r"(?:很)?(?:抱歉|对不起)[,，。 ]*(?:但)?我(?:无法|不能)|作为(?:一个)?(?:人工智能|ai)|"
    r"申し訳(?:ありません|ございません)が.{0,20}(?:でき|お答え)|죄송하지만.{0,20}(?:없습니다|어렵습니다)|"
    r"lo siento,? pero (?:no puedo|como)|je suis désolée?,? mais je ne (?:peux|puis)|"
    r"es tut mir leid,? (?:aber )?ich kann|desculpe,? mas (?:não|eu não)|"
    r"извините,? но я не могу|к сожалению,? я не могу|عذر[اً]+،? لا (?:أستطيع|يمكنني))",
    re.IGNORECASE,
)


def whole(answer: Answer) -> str:
    """The text of an answer that came to its end. Reasons: cut off, refusal, empty."""
    if answer.finish_reason == "length":
        raise Unusable("cut off", f"at {len(answer.text)} characters")
    if answer.refusal or answer.finish_reason == "content_filter":
        raise Unusable("refusal", answer.refusal or "content filter")
    text = answer.text.strip()
    check_text(text)
    if not text:
        raise Unusable("empty", f"finish_reason {answer.finish_reason!r}")
    if _REFUSAL.match(text):
        raise Unusable("refusal", f"{text:.80}")
    return text


def parse_json(text: str, kind: type) -> Any:
    """The JSON value of an answer, bare or in a fenced block. Reason: not JSON."""
    fenced = re.search(r"```(?:json)?\s*\n(.*?)\n\s*```", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise Unusable("not JSON", f"{error}: {text:.80}") from error
    if not isinstance(value, kind):
        raise Unusable("not JSON", f"{type(value).__name__}, not {kind.__name__}: {text:.80}")
    check_text(json.dumps(value, ensure_ascii=False))  # the text may have had it as an escape
    return value


_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(text: str) -> None:
    """Raises Unusable for text that is no Unicode, and cannot be sent or written."""
    if _SURROGATE.search(text):
        raise Unusable("malformed", f"half of a surrogate pair: {text!r:.80}")


def plain(text: str) -> str:
    """Text for comparing: lower case, without punctuation, single spaces."""
    return " ".join(re.sub(r"[^\w\s]+", " ", text.lower()).split())


def check_echo(text: str, *asked: str) -> None:
    """Raises Unusable where an answer repeats what was asked, or little else. Reason: echo."""
    said = plain(text)
    for one in map(plain, asked):
        if one and (said == one or (len(one) >= 20 and said.startswith(one)
                                    and len(said) < 1.3 * len(one))):  # fmt: skip
            raise Unusable("echo", f"{text:.80}")
