"""Everything there is builds with one command and is accounted for; so does a user's own file."""

import dataclasses
import fnmatch
import glob
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data_pipelines.build import build, json_lines
from data_pipelines.recipes import LEFT_OUT, RECIPES, RawSource, load_recipe
from data_pipelines.sources import Question, questions, tatoeba
from llmzoo_jax.conversation import KINDS, read_jsonl
from llmzoo_jax.errors import InputError

REPOSITORY = Path(__file__).parents[1]


def lines(path):
    text = Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""
    return [json.loads(line) for line in text.split("\n") if line]


# --- everything ---------------------------------------------------------------------------------

READ = {  # records in the raw files
    "sharegpt_zh": 1000, "alpaca_en": 999, "alpaca_zh": 1000, "identity": 91, "v1_sft": 500,
    "glaive_en": 300, "glaive_zh": 300, "dpo_zh": 300, "xpersona": 2670, "fastchat_dummy": 500,
    "seeds_en": 175, "seeds_zh": 175, "seeds_fr": 175, "seeds_ru": 137, "tatoeba": 88_877,
}  # fmt: skip
ASKED = {  # those of benchmarks: LLM Zoo's 140 stand in the files twice
    "llmzoo_140": 280, "llmzoo_100": 1000, "vicuna_80": 80, "mt_bench": 80,
    "multilingual_sift": 960, "mgsm": 2750,
}  # fmt: skip


@pytest.fixture(scope="module")
def everything(shared_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("everything")
    result = build(RECIPES["everything"], shared=str(shared_data), out=str(out), heldout=0.1)
    return {built.name: built for built in result}, out


def test_everything_is_read_and_nothing_vanishes(everything):
    built_of, out = everything
    assert {name: built.read for name, built in built_of.items()} == READ | ASKED
    dropped = Counter()
    for built in built_of.values():
        kept = len(built.train) + len(built.heldout)
        assert built.read == kept + built.questions + built.dropped.total()
        assert built.questions == ASKED.get(built.name, 0)
        dropped += built.dropped + Counter({"trimmed": built.trimmed})
    notes = lines(out / "dropped.jsonl")
    assert Counter(note["reason"] for note in notes) == +dropped


def test_what_is_written_is_what_was_counted_and_can_be_read(everything):
    built_of, out = everything
    for name, built in built_of.items():
        for side in ("train", "heldout"):
            path = out / f"{name}.{side}.jsonl"
            assert path.exists() == bool(getattr(built, side))
            if path.exists():
                assert sum(1 for _ in read_jsonl(path)) == len(getattr(built, side))
        assert len(lines(out / f"{name}.questions.jsonl")) == built.questions


def test_the_known_dirt_is_counted(everything):
    built_of, _ = everything
    assert built_of["alpaca_en"].dropped == {"duplicate": 14}
    assert built_of["alpaca_zh"].dropped == {"duplicate": 8}
    assert built_of["sharegpt_zh"].trimmed >= 7  # those that end with the user
    assert built_of["identity"].dropped["placeholder"] > 80


def test_every_record_says_language_kind_source_and_licence(everything, shared_data):
    built_of, out = everything
    for row in RECIPES["everything"]:
        folder = row.files.split("/")[0]
        said = (shared_data / folder / "SOURCE.txt").read_text(encoding="utf-8")
        repository, commit = row.about["source"].split("@")
        assert f"https://{repository}\n" in said and f"commit: {commit}" in said
        assert row.about["license"].split(" (")[0] in said
        first = []
        for side in ("train", "questions"):
            path = out / f"{row.name}.{side}.jsonl"
            first += [json.loads(path.open(encoding="utf-8").readline())] if path.exists() else []
        for record in first:
            assert record["kind"] in KINDS and record["lang"] != "und"
            assert record["source"] == row.about["source"]
            assert record["license"] == row.about["license"]
        assert first and "und" not in built_of[row.name].languages()
    assert set(built_of["tatoeba"].languages()) == set(tatoeba.TAGS.values()) | {"en"}


def test_every_file_is_read_or_left_out_for_a_reason(shared_data):
    files = [str(p.relative_to(shared_data)) for p in shared_data.rglob("*") if p.is_file()]
    rows = RECIPES["everything"]
    read = {file for row in rows for file in glob.glob(row.files, root_dir=shared_data)}
    left = {file for file in files if any(fnmatch.fnmatch(file, p) for p in LEFT_OUT)}
    left -= {file for file in read if file.endswith("-eng.eng")}
    assert not read & left
    assert read | left == set(files)


def test_a_translated_question_has_the_same_id_in_all_languages(everything):
    _, out = everything
    languages = {}
    for name in ASKED:
        for record in lines(out / f"{name}.questions.jsonl"):
            languages.setdefault(record["question_id"], set()).add(record["lang"])
    assert languages["llmzoo-70:70"] == {"en", "zh"}
    assert len(languages["llmzoo-100:1"]) == 10 and len(languages["mgsm:250"]) == 11
    assert len(languages["vicuna-80:80"]) == 12


# --- questions, names, files --------------------------------------------------------------------


def test_an_empty_question_is_dropped_and_half_a_character_survives(tmp_path):
    records = [{"id": 1, "query": " "}, {"id": 2, "query": "a\ud800"}]
    (tmp_path / "en.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    about = {"benchmark": "b", "kind": "conversation", "source": "s", "license": "l"}
    row = RawSource("b", questions.conversations, "en.jsonl", about)
    (built,) = build((row,), shared=str(tmp_path), out=str(tmp_path / "out"), heldout=0)
    assert (built.read, built.questions, built.dropped) == (2, 1, {"empty turn": 1})
    (found,) = lines(tmp_path / "out/b.questions.jsonl")
    asked = Question(id="en.jsonl:2", question_id="b:2", turns=("a\ud800",), lang="en",
                     kind="conversation", source="s", license="l")  # fmt: skip
    assert found == json.loads(json.dumps(dataclasses.asdict(asked)))
    with pytest.raises(InputError, match="two sources have the name b"):
        build((row, row), shared=str(tmp_path), out=str(tmp_path), heldout=0)


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "x.jsonl"
    with json_lines(str(path)) as write:
        write({"a": 1})
    with pytest.raises(ZeroDivisionError), json_lines(str(path)) as write:
        write({"a": 2})
        write(1 / 0)
    assert lines(path) == [{"a": 1}] and [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]
    with json_lines(str(path)):
        pass
    assert not list(tmp_path.iterdir())


# --- a dataset of one's own ---------------------------------------------------------------------


def test_a_user_adds_a_dataset_with_the_file_that_the_readme_shows(tmp_path):
    (tmp_path / "raw/riddles").mkdir(parents=True)
    (tmp_path / "raw/riddles/sw.txt").write_text(
        "Nyumba yangu haina mlango = Yai\nHaina jibu\n", encoding="utf-8"
    )
    (tmp_path / "raw/riddles/fr.txt").write_text("Toujours devant toi = L'avenir\n", "utf-8")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (mine,) = re.findall(r"```python\n(.*?RECIPE.*?)```", readme, re.DOTALL)
    assert len(mine.splitlines()) <= 40
    (tmp_path / "riddles.py").write_text(mine, encoding="utf-8")
    command = [sys.executable, "-m", "data_pipelines.build", f"--recipe={tmp_path}/riddles.py",
               f"--shared={tmp_path}/raw", f"--out={tmp_path}/out", "--heldout=0"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == 0, run.stderr
    french, swahili = read_jsonl(tmp_path / "out/riddles.train.jsonl")
    assert (french.lang, swahili.lang) == ("fr", "sw") and swahili.messages[1].content == "Yai"
    assert swahili.license == "CC0-1.0" and swahili.id == "sw.txt:1"
    (note,) = lines(tmp_path / "out/dropped.jsonl")
    assert note == {"where": "sw.txt:2", "reason": "no answer", "detail": "Haina jibu"}
    assert run.stdout.splitlines()[1].split()[:3] == ["riddles", "3", "2"]


def test_a_recipe_that_is_none_is_named(tmp_path):
    (tmp_path / "empty.py").write_text("RECIPE = ()", encoding="utf-8")
    with pytest.raises(InputError, match="did you mean everything"):
        load_recipe("everythin")
    with pytest.raises(InputError, match=r"nowhere\.py: no such file"):
        load_recipe("nowhere.py")
    with pytest.raises(InputError, match=r"empty\.py: it needs RECIPE = "):
        load_recipe(str(tmp_path / "empty.py"))
