"""Write the project's own sample data: a small multilingual chat data set under CC0-1.0.

    python -m data_pipelines.sample.generate --out=data_pipelines/sample --stats

reads every LANG.toml beside this program (en.toml explains the form) and writes train.jsonl and
heldout.jsonl to --out. There is no randomness: choices are made by a hash of their names, so the
same TOML files give the same bytes everywhere.

Each fact can be asked in four ways. Three of them are in train.jsonl; the fourth is for some facts
in heldout.jsonl, and otherwise left out. Thus a held-out question is new, but its fact is known in
other words, and its wording from other facts.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import statistics
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from llmzoo_jax import cli
from llmzoo_jax.conversation import Conversation, Message, write_jsonl
from llmzoo_jax.errors import InputError

HERE = Path(__file__).parent
SOURCE, LICENSE = "llmzoo-sample", "CC0-1.0"

# The facts of [TYPE.facts] that every language must have.
FACTS = {
    "capital": "FR DE IT ES GR JP EG".split(),
    "opposite": "big hot long new fast easy".split(),
    "day": "monday tuesday wednesday thursday friday saturday sunday".split(),
    "legs": "dog hen spider ant".split(),
    "colour": "snow grass blood lemon coal".split(),
}
WORDS = "water bread house book sun friend".split()
TALK = "hello who thanks bye".split()
SUMS, TRANSLATIONS = 4, 5  # how many facts of these types a language has
ROLE_QUESTIONS, CONVERSATIONS = 16, 8


class SampleError(InputError):
    """A language's file is not in order; the message names the file and the key."""


class Fact(NamedTuple):
    """Something to ask in four ways: ``questions`` have one and the same answer."""

    type: str
    key: str
    questions: tuple[str, ...]
    answer: str


# --- reading ------------------------------------------------------------------------------------


def read_languages(folder: Path = HERE) -> dict[str, dict[str, Any]]:
    """The parsed and checked TOML files of ``folder``: language code -> content."""
    languages = {}
    for path in sorted(folder.glob("*.toml")):
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SampleError(f"{path.name}: not TOML in UTF-8: {error}") from error
        check_language(content, path.name)
        languages[path.stem] = content
    if len(languages) < 3:  # a translation needs two languages besides the one that asks
        raise SampleError(f"{folder}: {len(languages)} language files; at least 3 are needed")
    for code, content in languages.items():
        named = content["translate"]["languages"]
        if missing := languages.keys() - named.keys() - {code}:
            names = ", ".join(sorted(missing))
            print(f"note: {code}.toml: translate.languages does not name {names}", file=sys.stderr)
    return languages


def check_language(content: dict[str, Any], file: str) -> None:
    """Raises SampleError unless ``content`` has the form that en.toml explains."""
    sections = [*FACTS, "sum", "translate", "local", "talk"]
    _keys(content, ["scripts", "stop", "roles", *sections], file, "the top level")
    stop = content["stop"]
    if not isinstance(stop, str):
        raise SampleError(f"{file}: stop: expected a string")
    _texts(content["scripts"], None, file, "scripts")
    _texts(content["roles"], 2, file, "roles", "{}")
    for name in sections[:-2]:
        section, more = content[name], ["facts", "follow_up"] if name in FACTS else []
        more = ["words", "languages"] if name == "translate" else more
        _keys(section, ["questions", *more], file, name)
        slots = ("{word}", "{language}") if name == "translate" else ("{}",)
        _texts(section["questions"], 4, file, f"{name}.questions", *slots)
        if name in FACTS:
            _texts([section["follow_up"]], 1, file, f"{name}.follow_up", "{}")
            _keys(section["facts"], FACTS[name], file, f"{name}.facts")
            for key, fact in section["facts"].items():
                where = f"{name}.facts.{key}"
                _texts(fact, 2, file, where)
                if not fact[1].endswith(stop):
                    raise SampleError(f"{file}: {where}: {fact[1]!r} does not end with {stop!r}")
    _keys(content["translate"]["words"], WORDS, file, "translate.words")
    _texts([*content["translate"]["words"].values()], None, file, "translate.words")
    _texts([*content["translate"]["languages"].values()], None, file, "translate.languages")
    _keys(content["talk"], TALK, file, "talk")
    if len(content["local"]) != 5:
        raise SampleError(f"{file}: local: expected 5 tables, found {len(content['local'])}")
    for name in ("local", "talk"):
        for key, item in content[name].items():
            _keys(item, ["questions", "answer"], file, f"{name}.{key}")
            _texts(item["questions"], 3, file, f"{name}.{key}.questions")
            _texts([item["answer"]], 1, file, f"{name}.{key}.answer")


def _keys(table: Any, keys: list[str], file: str, where: str) -> None:
    if not isinstance(table, dict):
        raise SampleError(f"{file}: {where}: expected a table")
    if missing := [key for key in keys if key not in table]:
        raise SampleError(f"{file}: {where}: missing {', '.join(missing)}")
    if unknown := [key for key in table if key not in keys]:
        raise SampleError(f"{file}: {where}: unknown key {', '.join(unknown)}")


def _texts(texts: Any, count: int | None, file: str, where: str, *slots: str) -> None:
    """Checks for ``count`` different strings, in each of which every slot stands once."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SampleError(f"{file}: {where}: expected strings")
    if count is not None and len(texts) != count:
        raise SampleError(f"{file}: {where}: expected {count} texts, found {len(texts)}")
    if len(set(texts)) < len(texts):
        raise SampleError(f"{file}: {where}: the same text twice")
    # Else a held-out question would be a part of a trained one.
    for a, b in itertools.permutations(texts, 2) if slots else ():
        if a in b:
            raise SampleError(f"{file}: {where}: {a!r} is a part of {b!r}")
    for text in texts:
        if not text or text != text.strip():
            raise SampleError(f"{file}: {where}: {text!r} is empty or has space around it")
        if any(text.count(slot) != 1 for slot in slots) or text.count("{") != len(slots):
            wanted = " and ".join(slots) or "no slot"
            raise SampleError(f"{file}: {where}: {text!r} must have {wanted}, once")


# --- choosing -----------------------------------------------------------------------------------


def by_hash(items, *salt: str) -> list:
    """``items`` in an order that depends on nothing but their names and ``salt``."""
    return sorted(
        items, key=lambda item: hashlib.sha256("/".join([*salt, str(item)]).encode()).digest()
    )


def facts_of(code: str, languages: dict[str, dict[str, Any]]) -> dict[str, list[Fact]]:
    """All facts of a language by type, with their questions filled in."""
    content = languages[code]
    stop, translate = content["stop"], content["translate"]
    facts = {
        name: [_fact(content, name, key, *content[name]["facts"][key]) for key in keys]
        for name, keys in FACTS.items()
    }
    sums = by_hash(itertools.product(range(1, 10), repeat=2), code, "sum")[:SUMS]
    facts["sum"] = [
        _fact(content, "sum", f"{a}+{b}", f"{a} + {b}", f"{a + b}{stop}") for a, b in sums
    ]
    targets = by_hash((t for t in translate["languages"] if t in languages), code, "target")[:2]
    if len(targets) < 2:
        raise SampleError(f"{code}.toml: translate.languages: fewer than 2 have a file")
    pairs = by_hash(itertools.product(WORDS, targets), code, "translate")[:TRANSLATIONS]
    facts["translate"] = []
    for word, target in pairs:
        slots = {"{word}": translate["words"][word], "{language}": translate["languages"][target]}
        questions = translate["questions"]
        for slot, text in slots.items():
            questions = [question.replace(slot, text) for question in questions]
        answer = languages[target]["translate"]["words"][word] + stop
        facts["translate"].append(Fact("translate", f"{word}-{target}", tuple(questions), answer))
    return facts


def _fact(content: dict[str, Any], name: str, key: str, slot: str, answer: str) -> Fact:
    questions = tuple(question.replace("{}", slot) for question in content[name]["questions"])
    return Fact(name, key, questions, answer)


def split(facts: list[Fact], code: str) -> tuple[list[tuple[Fact, int]], list[tuple[Fact, int]]]:
    """(fact, wording) pairs for training, and held-out ones, of the facts of one type.

    Going through the facts, each misses the next of the four wordings in training. So a fact keeps
    three wordings and, as a type has at least four facts, a wording keeps three facts.
    """
    train, heldout = [], []
    for number, fact in enumerate(by_hash(facts, code, "split")):
        missed = number % 4
        train += [(fact, wording) for wording in range(4) if wording != missed]
        if number < len(facts) // 2:
            heldout.append((fact, missed))
    return train, heldout


# --- writing ------------------------------------------------------------------------------------


def conversations(
    code: str, languages: dict[str, dict[str, Any]]
) -> tuple[list[Conversation], list[Conversation]]:
    """The training and the held-out conversations of a language."""
    content = languages[code]
    train, heldout, asked = [], [], []

    def make(kind: str, name: str, *texts: str) -> Conversation:
        roles = itertools.cycle(("user", "assistant"))
        messages = tuple(Message(role, text) for role, text in zip(roles, texts, strict=False))
        about = {"lang": code, "kind": kind, "source": SOURCE, "license": LICENSE}
        return Conversation(id=f"{code}/{name}", messages=messages, **about)

    def single(fact: Fact, wording: int) -> Conversation:
        name = f"{fact.type}/{fact.key}/{wording + 1}"
        return make("multilingual_instruction", name, fact.questions[wording], fact.answer)

    facts = facts_of(code, languages)
    for facts_of_type in facts.values():
        pairs, held = split(facts_of_type, code)
        asked += pairs
        train += [single(*pair) for pair in pairs]
        heldout += [single(*pair) for pair in held]
    for section, kind in (("local", "language_specific_instruction"), ("talk", "conversation")):
        for key, item in content[section].items():
            for number, question in enumerate(item["questions"], 1):
                train.append(make(kind, f"{section}/{key}/{number}", question, item["answer"]))
    # Everything below asks only what is asked above, so that nothing held out gets into training.
    for number, (fact, wording) in enumerate(by_hash(asked, code, "role")[:ROLE_QUESTIONS]):
        role = number % len(content["roles"])
        name = f"role/{role + 1}/{fact.type}/{fact.key}/{wording + 1}"
        question = content["roles"][role].replace("{}", fact.questions[wording])
        train.append(make("user_centered_instruction", name, question, fact.answer))
    for name in FACTS:
        train += [make("chat_instruction", *chat) for chat in _chats(code, content, name, asked)]
    talk = content["talk"]
    for number, (fact, wording) in enumerate(by_hash(asked, code, "talk")[:CONVERSATIONS]):
        texts = [talk["hello"]["questions"][number % 3], talk["hello"]["answer"]]
        texts += [fact.questions[wording], fact.answer]
        if number % 2:
            texts += [talk["thanks"]["questions"][number % 3], talk["thanks"]["answer"]]
        train.append(make("conversation", f"conversation/{number + 1}", *texts))
    _check_answers(train + heldout, code)
    return train, heldout


def _chats(code: str, content: dict[str, Any], name: str, asked: list) -> Iterator[list[str]]:
    """Two dialogues about a type of facts: a question, and one or two more that lean on it."""
    pairs = [pair for pair in asked if pair[0].type == name]
    a, b, c, d = by_hash({pair[0].key for pair in pairs}, code, "chat")[:4]
    for first, *others in ((a, b), (c, d, a)):
        known = [pair for pair in pairs if pair[0].key == first]
        fact, wording = by_hash(known, code, "chat")[0]
        texts = [fact.questions[wording], fact.answer]
        for key in others:
            slot, answer = content[name]["facts"][key]
            texts += [content[name]["follow_up"].replace("{}", slot), answer]
        yield [f"chat/{name}/{'-'.join((first, *others))}", *texts]


def _check_answers(all_conversations: list[Conversation], code: str) -> None:
    """Raises SampleError for a question that is in two conversations of a language."""
    seen: dict[str, str] = {}
    for conversation in all_conversations:
        if len(conversation.messages) == 2:
            question = conversation.messages[0].content
            if question in seen:
                both = f"{seen[question]} and {conversation.id}"
                raise SampleError(f"{code}.toml: {both}: the same question, {question!r}")
            seen[question] = conversation.id


def generate(out: Path, folder: Path = HERE) -> tuple[list[Conversation], list[Conversation]]:
    """Writes train.jsonl and heldout.jsonl to ``out``, and returns what it wrote."""
    languages = read_languages(folder)
    made = [conversations(code, languages) for code in languages]
    train, heldout = (list(itertools.chain(*part)) for part in zip(*made, strict=True))
    write_jsonl(out / "train.jsonl", train)
    write_jsonl(out / "heldout.jsonl", heldout)
    return train, heldout


def stats(train: list[Conversation], heldout: list[Conversation]) -> str:
    """A table: for each language, conversations in all and by kind, and their median length."""
    lines = ["lang  train  heldout  characters"]
    for lang in sorted({c.lang for c in train}):
        mine = [c for c in train if c.lang == lang]
        held = sum(c.lang == lang for c in heldout)
        length = statistics.median(sum(len(m.content) for m in c.messages) for c in mine)
        lines.append(f"{lang:<4} {len(mine):>6} {held:>8} {length:>11g}")
    lines.append(f"all  {len(train):>6} {len(heldout):>8}")
    kinds = collections.Counter(c.kind for c in train)
    return "\n".join(lines + [f"{count:>6}  {kind}" for kind, count in sorted(kinds.items())])


def main(_: list[str]) -> None:
    made = generate(Path(flags.FLAGS.out))
    if flags.FLAGS.stats:
        print(stats(*made))


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "folder to write train.jsonl and heldout.jsonl to")
    flags.DEFINE_bool("stats", False, "print how much there is of each language and kind")
    flags.mark_flag_as_required("out")
    cli.run(main)
