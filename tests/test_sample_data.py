"""The sample data that is shipped: it is what the program writes, and keeps its promises."""

import collections
import functools
import itertools
import tomllib
import unicodedata

import pytest

from data_pipelines.sample import generate
from llmzoo_jax.conversation import KINDS, read_jsonl

HERE = generate.HERE
LANGUAGES = sorted(path.stem for path in HERE.glob("*.toml"))
SPLIT_TYPES = {*generate.FACTS, "sum", "translate"}  # the types of facts that are held out


@functools.cache
def shipped(name):
    return list(read_jsonl(HERE / f"{name}.jsonl"))


def both():
    return shipped("train") + shipped("heldout")


def single_facts(conversations):
    """(lang, type, fact, wording) -> conversation, of the single questions that are split."""
    ids = {tuple(c.id.split("/")): c for c in conversations}
    return {id: c for id, c in ids.items() if len(id) == 4 and id[1] in SPLIT_TYPES}


def edited(tmp_path, old, new):
    """A folder with three languages, where English has ``new`` instead of ``old``."""
    for code in ("en", "fr", "zh"):
        text = (HERE / f"{code}.toml").read_text(encoding="utf-8")
        if code == "en":
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / f"{code}.toml").write_text(text, encoding="utf-8")
    return tmp_path


# --- what is shipped ----------------------------------------------------------------------------


def test_the_program_writes_the_shipped_files(tmp_path):
    generate.generate(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (HERE / name).read_bytes()


def test_size_languages_scripts_and_kinds():
    assert 3000 <= len(both()) <= 4200
    for part in ("train", "heldout"):
        assert {c.lang for c in shipped(part)} == set(LANGUAGES)
    assert len(LANGUAGES) >= 12
    scripts = collections.Counter()
    for lang in LANGUAGES:
        scripts[letters_by_script(lang).most_common(1)[0][0]] += 1
    assert len(scripts) >= 8
    for lang in LANGUAGES:
        mine = [c for c in shipped("train") if c.lang == lang]
        assert {c.kind for c in mine} == set(KINDS)
        assert any(len(c.messages) > 4 for c in mine)


def test_turns_ids_and_licence():
    assert len({c.id for c in both()}) == len(both())
    for c in both():
        roles = [m.role for m in c.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2), c.id
        assert (c.source, c.license) == ("llmzoo-sample", "CC0-1.0")
        assert c.id.startswith(f"{c.lang}/")
        assert all(m.content == m.content.strip() and "{" not in m.content for m in c.messages)


def test_a_question_has_one_answer_in_a_language():
    answers = collections.defaultdict(set)
    for c in both():
        if len(c.messages) == 2:
            answers[c.lang, c.messages[0].content].add(c.messages[1].content)
    assert [question for question, known in answers.items() if len(known) > 1] == []


def letters_by_script(lang):
    text = "".join(m.content for c in both() if c.lang == lang for m in c.messages)
    names = (unicodedata.name(letter) for letter in text if letter.isalpha())
    return collections.Counter(name.replace("-", " ").split()[0] for name in names)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_language_is_in_its_own_script(lang):
    scripts = tomllib.loads((HERE / f"{lang}.toml").read_text(encoding="utf-8"))["scripts"]
    letters = letters_by_script(lang)
    assert sum(letters[script] for script in scripts) > 0.9 * letters.total()


# --- what is held out ---------------------------------------------------------------------------


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_fact_is_trained_in_three_wordings(lang):
    wordings = collections.Counter(id[:3] for id in single_facts(shipped("train")) if id[0] == lang)
    assert set(wordings.values()) == {3}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_held_out_question_is_new_but_its_fact_and_wording_are_known(lang):
    train = single_facts(c for c in shipped("train") if c.lang == lang)
    heldout = single_facts(c for c in shipped("heldout") if c.lang == lang)
    assert len(heldout) == sum(c.lang == lang for c in shipped("heldout"))  # nothing else is
    assert {id[1] for id in heldout} == SPLIT_TYPES
    assert 0.1 < len(heldout) / (len(heldout) + len(train)) < 0.15
    seen = [m.content for c in shipped("train") for m in c.messages]
    for id, c in heldout.items():
        question, answer = (m.content for m in c.messages)
        assert not any(question in text for text in seen), id
        same_fact = [other for other in train if other[:3] == id[:3]]
        assert len(same_fact) >= 3
        assert {train[other].messages[1].content for other in same_fact} == {answer}
        same_wording = {other[2] for other in train if (other[1], other[3]) == (id[1], id[3])}
        assert len(same_wording) >= 3


# --- the program --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('stop = "."', "", "en.toml: the top level: missing stop"),
        ('stop = "."', 'stop = "!"', "en.toml: capital.facts.FR: 'Paris.' does not end with '!'"),
        ('GR = ["Greece", "Athens."]', "", "en.toml: capital.facts: missing GR"),
        ('  "Calculate {}.",\n', "", "en.toml: sum.questions: expected 4 texts, found 3"),
        ("Calculate {}.", "Calculate it.", "en.toml: sum.questions: 'Calculate it.' must have {}"),
        ("Calculate {}.", "What is {}?", "en.toml: sum.questions: the same text twice"),
        ("[talk.bye]", "[talk.goodbye]", "en.toml: talk: missing bye"),
        ('sun = "sun"', 'moon = "moon"', "en.toml: translate.words: missing sun"),
        ('"Bye!"', '"Hi!"', "en/talk/hello/2 and en/talk/bye/2: the same question, 'Hi!'"),
        ('stop = "."', "stop = .", "en.toml: not TOML"),
    ],
)
def test_an_error_names_the_file_and_the_key(tmp_path, old, new, message):
    with pytest.raises(generate.SampleError) as error:
        generate.generate(tmp_path, edited(tmp_path, old, new))
    assert message in str(error.value)


def test_hash_order_depends_on_names_only():
    assert generate.by_hash("abcd", "x") == generate.by_hash("dcba", "x")
    orders = {tuple(generate.by_hash("abcd", salt)) for salt in "uvwxyz"}
    assert len(orders) > 1
    assert orders <= set(itertools.permutations("abcd"))
