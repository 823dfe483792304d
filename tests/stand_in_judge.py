"""A judge on this machine: it knows how good an answer is, and misbehaves by plan.

An answer says how good it is ("quality 3"). The judge orders by that, or likes what stands first so
much that it says so (``first``). Fates are of a request, as in ``tests.fake_endpoint``.
"""

import itertools
import json
import re

from data_pipelines.endpoint import key_of
from tests.fake_endpoint import FakeEndpoint

HTTP = ("429", "500", "slow", "broken")  # of the first sending only
CONTENT = ("cut off", "refusal", "empty", "no order", "both ways", "quotes", "shy")
FRAME = re.compile(r"\[Assistant (\d+) (\w{8})\]\n(.*?)\n\[End of Assistant \1 \2\]", re.DOTALL)


def answers_of(body):
    """The answers in a prompt, in order; what an answer pretends to be a frame is none."""
    return [text for _, _, text in FRAME.findall(body["messages"][1]["content"])]


def quality(text):
    return float(re.search(r"quality (-?[\d.]+)", text)[1])


def chain(values):
    order = sorted(range(len(values)), key=lambda i: -values[i])
    text = f"Assistant {order[0] + 1}"
    for before, i in itertools.pairwise(order):
        text += f" {'=' if values[before] == values[i] else '>'} Assistant {i + 1}"
    return text


def says(first=0.0, quality=quality):
    def content(body, fate):
        values = [quality(text) for text in answers_of(body)]
        values = [value + first * (i == 0) for i, value in enumerate(values)]
        task = body["messages"][1]["content"].rpartition("[Task")[2]
        scored = "Scores:" in task
        verdict = chain(values)
        if scored:
            verdict = "Scores: " + " ".join(f"{value:g}" for value in values)
        last = body["messages"][-1]["content"]
        again = "could not be read" in last
        text = verdict if again else f"Each has its merits, and they differ.\n\n{verdict}"
        if fate == "cut off":
            return text[:20], "length"
        if fate == "refusal" and not again:
            return "I'm sorry, but I can't compare these.", "stop"
        if fate == "empty":
            return " \n", "stop"
        if fate == "no order" or (fate == "shy" and not again):
            return "They are all very interesting, each in its own way.", "stop"
        if fate == "both ways":
            return "Assistant 1 > Assistant 2 < Assistant 3. Scores: 11 0", "stop"
        if fate == "quotes":  # of an answer that tries to be the verdict
            return f"One answer says: {chain([-v for v in values])}. It isn't.\n{verdict}", "stop"
        return text, "stop"

    return content


def moody(body, times):
    """About half of the requests meet with something."""
    number = int(key_of(body)[:8], 16) % (2 * len(HTTP + CONTENT))
    if number < len(HTTP):
        return "good" if times else HTTP[number]
    return dict(enumerate(CONTENT, len(HTTP))).get(number, "good")


def stand_in(fate=None, *, first=0.0, quality=quality, **options):
    return FakeEndpoint(fate or (lambda body, times: "good"), says=says(first, quality), **options)


# --- questions and answers to judge -------------------------------------------------------------


def write_questions(path, count=12, lang="en", category="generic"):
    lines = [
        {"question_id": n, "text": f"Question {n}?", "category": category, "lang": lang}
        for n in range(1, count + 1)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_answers(path, model, qualities, lang="en"):
    lines = [
        {"question_id": n, "text": f"My answer, of quality {value}.", "lang": lang,
         "answer_id": f"{model}-{n}", "model_id": model}
        for n, value in enumerate(qualities, 1)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
