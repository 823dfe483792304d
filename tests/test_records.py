"""Records are the same from every container, and columns of any table become conversations."""

import csv
import json

import pytest

from data_pipelines.sources import Dropped, Question, columns, llmzoo, read_records
from llmzoo_jax.conversation import Conversation
from llmzoo_jax.errors import InputError

ABOUT = {"kind": "conversation", "source": "test", "license": "CC0-1.0"}
ROWS = [
    {"q": "Wie geht's?", "a": 'Gut, "sehr" gut.\nUnd dir?', "tongue": "de"},
    {"q": "你好", "a": "好", "tongue": "zh-Hans"},
]
QA = {"prompt": "q", "response": "a", "lang": "tongue"}


def turns(item):
    return [(message.role, message.content) for message in item.messages]


def write(folder, ending, rows=ROWS):
    path = folder / f"table.{ending}"
    if ending == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        dialect = "excel" if ending == "csv" else "excel-tab"
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            table = csv.DictWriter(file, rows[0], dialect=dialect)
            table.writeheader()
            table.writerows(rows)
    return str(path)


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_container_gives_the_same_conversations(tmp_path, ending):
    path = write(tmp_path, ending)
    first, second = columns.conversations(path, columns=QA, **ABOUT)
    assert turns(first) == [("user", ROWS[0]["q"]), ("assistant", ROWS[0]["a"])]
    assert turns(second) == [("user", "你好"), ("assistant", "好")]
    assert (first.id, first.lang, second.lang) == (f"table.{ending}:1", "de", "zh-Hans")
    assert (first.kind, first.source, first.license) == ("conversation", "test", "CC0-1.0")


def test_a_dataset_is_read_by_its_name(tmp_path):
    pytest.importorskip("datasets")
    record = {"id": "1", "type": "instruction", "conversations": [
        {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}  # fmt: skip
    write(tmp_path, "jsonl", [record])
    (found,) = llmzoo.conversations(f"hub:{tmp_path}", lang="fr", **ABOUT)
    assert turns(found) == [("user", "a"), ("assistant", "b")]
    assert (found.kind, found.lang) == ("multilingual_instruction", "fr")
    with pytest.raises(InputError, match=r"hub:.*@nowhere: "):
        list(llmzoo.conversations(f"hub:{tmp_path}@nowhere", **ABOUT))
    with pytest.raises(InputError, match="write hub:NAME"):
        list(read_records("hub:a:b:c:d"))


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"s": "be kind", "h": [["a", "b"]], "q": "c", "r": "d"}, "be kind/a/b/c/d"),
        ({"s": "", "h": None, "q": "c", "r": "d"}, "c/d"),
        ({"s": "", "h": '[["a", "b"]]', "q": "c", "r": "d"}, "a/b/c/d"),
    ],
)
def test_columns_for_system_and_history(tmp_path, record, expected):
    mapping = {"prompt": "q", "response": "r", "system": "s", "history": "h"}
    (found,) = columns.conversations(write(tmp_path, "json", [record]), columns=mapping, **ABOUT)
    assert "/".join(message.content for message in found.messages) == expected


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_a_column_of_messages_may_be_either_form_and_a_string(tmp_path, keys, as_text):
    talk = [dict(zip(keys, pair, strict=True)) for pair in (("user", "a"), ("assistant", "b"))]
    path = write(tmp_path, "json", [{"talk": json.dumps(talk) if as_text else talk}])
    (found,) = columns.conversations(path, columns={"messages": "talk"}, lang="en", **ABOUT)
    assert turns(found) == [("user", "a"), ("assistant", "b")] and found.lang == "en"


def test_records_without_a_response_are_questions(tmp_path):
    path = write(tmp_path, "csv")
    first, _ = columns.conversations(path, columns={"prompt": "q", "lang": "tongue"}, **ABOUT)
    assert isinstance(first, Question)
    assert (first.turns, first.lang, first.source) == (("Wie geht's?",), "de", "test")


@pytest.mark.parametrize(
    "mapping, error",
    [
        (
            {"prompt": "Q", "response": "a"},
            r"table.csv:1: no column 'Q', .* there are q, a, tongue",
        ),
        ({"prompt": "tonge", "response": "a"}, "did you mean 'tongue'"),
        ({"promt": "q", "response": "a"}, "unknown key 'promt'; did you mean 'prompt'"),
        ({"response": "a"}, "either 'messages' or 'prompt'"),
        ({"messages": "q", "system": "a"}, "replaces system"),
        ({"prompt": "q", "system": "a"}, "no response, so system cannot be used"),
    ],
)
def test_a_wrong_column_is_named_with_those_there(tmp_path, mapping, error):
    path = write(tmp_path, "csv")
    with pytest.raises(InputError, match=error):
        list(columns.conversations(path, columns=mapping, **ABOUT))


def test_a_broken_row_is_dropped_and_the_others_are_kept(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('q,a,tongue\n1,2,en\n1,2\n1,2,"not a tag"\n1,2,\n', encoding="utf-8")
    one, two, three, four = columns.conversations(str(path), columns=QA, lang="fr", **ABOUT)
    assert isinstance(one, Conversation) and one.lang == "en"
    assert two == Dropped("x.csv:2", "wrong number of cells", "2, where the header has 3")
    assert three.reason == "unknown language" and four.lang == "fr"


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.jsonl"])
def test_a_file_that_is_not_utf8_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'["\xff"]' if name == "x.json" else b'{"a\xff": 1}\n')
    with pytest.raises(InputError, match=rf"{name}: not UTF-8: byte 0xff"):
        list(read_records(str(path)))
