"""A JSON list is read as a stream, and gives what json.load gives, wherever the chunks end."""

import io
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.sources import json_list, read_records
from llmzoo_jax.errors import InputError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
SPACE = st.text(" \t\n\r", max_size=3)


def stream(text, chunk):
    return list(json_list.values(io.StringIO(text), name="x.json", chunk=chunk))


@settings(max_examples=150, deadline=None)
@given(st.lists(VALUES), st.booleans(), st.sampled_from([None, 1]), SPACE, st.integers(1, 40))
def test_every_list_is_read_as_json_load_reads_it(values, ascii, indent, space, chunk):
    text = space + json.dumps(values, ensure_ascii=ascii, indent=indent) + space
    assert repr(stream(text, chunk)) == repr(json.loads(text))  # repr: NaN is not NaN


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_json_load_refuses_is_refused_and_nothing_else(data):
    text = json.dumps(
        data.draw(st.lists(VALUES, max_size=3)), ensure_ascii=data.draw(st.booleans())
    )
    start = data.draw(st.integers(1, len(text)))
    stop = data.draw(st.integers(start, len(text)))
    junk = data.draw(st.text('[]{},:"\\ue1+-.0tnNI \n', max_size=3))
    text = text[:start] + junk + text[stop:]
    try:
        expected = repr(json.loads(text))
    except ValueError:
        with pytest.raises(InputError, match=r"x\.json: not JSON: record \d+, character \d+: "):
            stream(text, data.draw(st.integers(1, 30)))
    else:
        assert repr(stream(text, data.draw(st.integers(1, 30)))) == expected


@pytest.mark.parametrize(
    "text, record, character",
    [
        ('[{"a": 1}, {"a" 2}]', 2, 16),
        ('[{"a": 1}, {"a": 2}', 2, 19),
        ('[{"a": 1} {"a": 2}]', 1, 10),
        ('[{"a": 1}, {"a": "b', 2, 17),
        ('[{"a": 1}] x', 1, 11),
        ("[1, 2, 3,]", 4, 9),
    ],
)
def test_an_error_says_which_record_and_where(text, record, character):
    for chunk in (1, 7, 100):
        with pytest.raises(InputError, match=rf"record {record}, character {character}: "):
            stream(text, chunk)


def test_an_error_in_the_middle_is_found_before_the_rest_is_read():
    text = '[{"a": x}, ' + '{"a": 1}, ' * 10_000
    file = io.StringIO(text)
    with pytest.raises(InputError, match="record 1, character 7: "):
        list(json_list.values(file, name="x.json", chunk=100))
    assert file.tell() < 1000


def test_memory_is_that_of_a_chunk_and_not_of_the_file(tmp_path):
    path = tmp_path / "big.json"
    record = json.dumps({"id": "1", "text": "字" * 1000}, ensure_ascii=False)
    with open(path, "w", encoding="utf-8") as file:
        file.write("[" + ",\n".join([record] * 16_000) + "]")
    assert path.stat().st_size > 48e6
    tracemalloc.start()
    assert sum(1 for _ in read_records(str(path))) == 16_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6  # json.load needs over 100e6
