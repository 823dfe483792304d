"""A mixture has the shares that were asked for, or says which it could not have."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.mixture import describe, mix, read_copies, read_entries, rows, warnings
from data_pipelines.mixture_spec import Axis, Spec, read_spec
from data_pipelines.shares import Grouping, balance, fill, shares
from llmzoo_jax.conversation import Conversation, Message, read_jsonl, write_jsonl
from llmzoo_jax.errors import InputError

# --- water-filling ------------------------------------------------------------------------------


@st.composite
def bounded(draw):
    """Weights, and floors and caps that some shares can keep."""
    count = draw(st.integers(1, 12))
    weights = draw(st.lists(st.floats(1e-3, 1e3), min_size=count, max_size=count))
    inside = np.array(draw(st.lists(st.floats(0.01, 1), min_size=count, max_size=count)))
    inside /= inside.sum()  # a solution that the bounds leave room for
    less = np.array(draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)))
    more = np.array(draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)))
    return np.array(weights), inside * less, inside + (1 - inside) * more


@given(bounded())
@settings(max_examples=300, deadline=None)
def test_shares_add_up_keep_their_bounds_and_are_otherwise_in_proportion(case):
    weights, low, high = case
    result = fill(weights, low, high, 1.0)
    assert result.sum() == pytest.approx(1, abs=1e-9)
    assert (result >= low).all()
    assert (result <= high).all()
    # One level explains all of them: only floors lift a share above it, only caps hold it below.
    level = result / weights
    above_floor, below_cap = result > low + 1e-12, result < high - 1e-12
    if above_floor.any() and below_cap.any():
        assert level[above_floor].max() <= level[below_cap].min() * (1 + 1e-6)


@given(bounded(), st.floats(0.001, 1000))
@settings(max_examples=50, deadline=None)
def test_shares_depend_on_the_proportion_of_weights_alone(case, factor):
    weights, low, high = case
    assert fill(weights * factor, low, high, 1.0) == pytest.approx(
        fill(weights, low, high, 1.0), abs=1e-9
    )


def test_known_shares():
    assert shares({"a": 6, "b": 3, "c": 1}) == pytest.approx({"a": 0.6, "b": 0.3, "c": 0.1})
    capped = shares({"a": 6, "b": 3, "c": 1}, caps={"a": 0.4})
    assert capped == pytest.approx({"a": 0.4, "b": 0.45, "c": 0.15})
    both = shares({"a": 6, "b": 3, "c": 1}, caps={"a": 0.4}, floors={"c": 0.3})
    assert both == pytest.approx({"a": 0.4, "b": 0.3, "c": 0.3})
    assert shares({"a": 1, "b": 0}) == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"caps": {"a": 0.2, "b": 0.2}}, "leave room for 0.4"),
        ({"floors": {"a": 0.7, "b": 0.7}}, "add up to 1.4"),
        ({"floors": {"a": 0.7}, "caps": {"a": 0.5}}, "a: the floor 0.7"),
    ],
)
def test_bounds_that_contradict_each_other_are_an_error(bounds, message):
    with pytest.raises(InputError, match=message):
        shares({"a": 1, "b": 1}, **bounds)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_balance_keeps_all_bounds_where_that_can_be(data):
    """The bounds are around the sums of hidden amounts, so some amounts do keep them."""
    cells = data.draw(st.integers(2, 12))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    hidden, amounts = draw.uniform(0.1, 1, cells), draw.uniform(0.1, 1, cells)
    hidden /= hidden.sum()
    groupings = []
    for spread in (0.0, data.draw(st.floats(0, 0.5))):  # exact shares, and bounds
        group = np.unique(draw.integers(0, 3, cells), return_inverse=True)[1]
        sums = np.bincount(group, hidden)
        groupings.append(Grouping(group, sums * (1 - spread), sums * (1 + spread)))
    groupings.append(Grouping(np.arange(cells), np.zeros(cells), hidden * 2))
    result, settled = balance(amounts, groupings, total=1.0)
    assert settled
    assert result.sum() == pytest.approx(1)
    for grouping in groupings:
        sums = np.bincount(grouping.group, result, len(grouping.low))
        assert (sums >= grouping.low - 1e-5).all()
        assert (sums <= grouping.high + 1e-5).all()


def test_balance_is_raking_where_shares_are_exact():
    """Two margins of a 2 x 2 table: the odds ratio of the data stays."""
    amounts = np.array([4.0, 1.0, 2.0, 3.0])
    groupings = [
        Grouping(np.array([0, 0, 1, 1]), np.array([0.3, 0.7]), np.array([0.3, 0.7])),
        Grouping(np.array([0, 1, 0, 1]), np.array([0.5, 0.5]), np.array([0.5, 0.5])),
    ]
    (a, b, c, d), settled = balance(amounts, groupings, total=1.0)
    assert settled
    assert (a + b, a + c) == pytest.approx((0.3, 0.5))
    assert a * d / (b * c) == pytest.approx(4 * 3 / (1 * 2), rel=1e-6)


# --- mixtures -----------------------------------------------------------------------------------


def make(folder, **counts):
    """Files NAME.jsonl of conversations, by ``NAME={(kind, lang): how many}``."""
    kinds = {"chat": "conversation", "user": "user_centered_instruction"}
    for name, cells in counts.items():
        items = [
            Conversation(
                messages=(
                    Message("user", f"question {number}"),
                    Message("assistant", "a" * (1 + number % 7)),
                ),
                id=f"{kind}-{lang}-{number}",
                lang=lang,
                kind=kinds[kind],
            )
            for (kind, lang), count in cells.items()
            for number in range(count)
        ]
        write_jsonl(folder / f"{name}.jsonl", items)
    return {name: str(folder / f"{name}.jsonl") for name in counts}


def run(spec):
    entries = read_entries(spec)
    mixture = mix(spec, entries)
    return mixture, rows(spec, entries, mixture)


def got(tables, axis):
    return {row.value: row.got for row in tables[axis]}


@pytest.fixture
def files(tmp_path):
    return make(
        tmp_path,
        web={("chat", "en"): 600, ("chat", "zh"): 300, ("chat", "sw"): 20},
        own={("user", "en"): 100, ("user", "zh"): 100, ("user", "sw"): 60},
    )


def test_without_wishes_the_mixture_is_as_the_data_is(files):
    mixture, tables = run(Spec(files=files, conversations=1180))
    assert len(mixture.copies) == len({entry.id for entry, _ in mixture.copies}) == 1180
    assert not warnings(mixture, tables)


def test_exact_shares_on_three_axes_at_once(files):
    spec = Spec(
        files=files,
        conversations=500,
        epochs=2,
        source=Axis(weights={"own": 2.0}),
        language=Axis(alpha=0.0),
    )
    mixture, tables = run(spec)
    assert len(mixture.copies) == 500
    # own: 260 conversations of weight 2 to web's 920; sw has 80 conversations, twice at most.
    assert got(tables, "source") == pytest.approx({"own": 520 / 1440, "web": 920 / 1440}, abs=0.004)
    sizes = {"en": (500 - 160) / 2 / 500, "zh": (500 - 160) / 2 / 500, "sw": 160 / 500}
    assert got(tables, "language") == pytest.approx(sizes, abs=0.004)
    [note] = warnings(mixture, tables)
    assert note.startswith("language sw: too little data for the share")


def test_alpha_is_the_exponent_of_the_amount_of_data(files):
    _, tables = run(Spec(files=files, conversations=300, language=Axis(alpha=0.5)))
    weights = {"en": 700**0.5, "zh": 400**0.5, "sw": 80**0.5}
    expected = {lang: w / sum(weights.values()) for lang, w in weights.items()}
    assert got(tables, "language") == pytest.approx(expected, abs=0.004)


def test_a_weight_of_0_leaves_conversations_out(files):
    mixture, tables = run(Spec(files=files, conversations=300, language=Axis(weights={"zh": 0})))
    assert got(tables, "language")["zh"] == 0
    assert {entry.cell[2] for entry, _ in mixture.copies} == {"en", "sw"}


def test_bounds_alone_leave_what_is_within_them_as_it_is(files):
    spec = Spec(files=files, conversations=400, language=Axis(caps={"en": 0.4}, floors={"sw": 0.1}))
    _, tables = run(spec)
    assert got(tables, "language") == pytest.approx({"en": 0.4, "zh": 0.5, "sw": 0.1}, abs=0.004)
    loose = Spec(files=files, conversations=400, language=Axis(cap=0.9))
    assert got(run(loose)[1], "language")["en"] == pytest.approx(700 / 1180, abs=0.004)


def test_a_floor_that_the_data_cannot_meet_is_a_warning(files):
    spec = Spec(files=files, conversations=800, language=Axis(floors={"sw": 0.3}))
    mixture, tables = run(spec)
    [warning] = warnings(mixture, tables)
    assert "language sw: the floor of 30.0% could not be met for lack of data" in warning
    assert got(tables, "language")["sw"] == pytest.approx(80 / 800)
    assert "warning: language sw" in describe(spec, mixture, tables)


def test_wishes_that_contradict_each_other_are_a_warning(tmp_path):
    files = make(tmp_path, a={("chat", "zh"): 100}, b={("chat", "en"): 100, ("chat", "zh"): 100})
    spec = Spec(
        files=files,
        conversations=100,
        source=Axis(weights={"a": 3.0, "b": 1.0}),
        language=Axis(weights={"en": 7.0, "zh": 1.5}),
    )
    mixture, tables = run(spec)
    assert len(mixture.copies) == 100
    assert not mixture.settled
    assert "no mixture of this data has all of these shares at once" in warnings(mixture, tables)[0]


@given(
    total=st.integers(1, 400),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 5),
    alpha=st.sampled_from([None, 0.0, 0.3, 1.0]),
    weight=st.sampled_from([0.2, 1.0, 5.0]),
)
@settings(max_examples=40, deadline=None)
def test_the_total_and_the_epochs_are_kept_and_copies_numbered(
    tmp_path_factory, total, epochs, seed, alpha, weight
):
    files = {
        "web": str(tmp_path_factory.getbasetemp() / "property-web.jsonl"),
        "own": str(tmp_path_factory.getbasetemp() / "property-own.jsonl"),
    }
    if not (tmp_path_factory.getbasetemp() / "property-own.jsonl").exists():
        counts = {"property-web": {("chat", "en"): 60, ("chat", "zh"): 7},
                  "property-own": {("user", "sw"): 5, ("user", "zh"): 30}}  # fmt: skip
        make(tmp_path_factory.getbasetemp(), **counts)
    spec = Spec(files=files, conversations=total, epochs=epochs, seed=seed,
                language=Axis(alpha=alpha), source=Axis(weights={"own": weight}))  # fmt: skip
    entries = read_entries(spec)
    if total > epochs * len(entries):
        with pytest.raises(
            InputError, match=f"is {epochs * len(entries):,} of the {total:,} asked"
        ):
            mix(spec, entries)
        return
    copies = mix(spec, entries).copies
    assert len(copies) == total
    numbers = {}
    for entry, copy in copies:
        numbers.setdefault(entry.key, []).append(copy)
    for found in numbers.values():  # the second copy is there if the third is
        assert sorted(found) == list(range(1, len(found) + 1))
        assert len(found) <= epochs
    # Nothing comes again before all of its source, kind and language came.
    often = Counter(entry.key for entry, _ in copies)
    by_cell = {}
    for entry in entries:
        by_cell.setdefault(entry.cell, []).append(often[entry.key])
    assert all(max(times) - min(times) <= 1 for times in by_cell.values())


def test_loss_characters_are_met_to_within_a_conversation(files):
    spec = Spec(files=files, loss_characters=1500, epochs=2, language=Axis(alpha=0.0))
    mixture, tables = run(spec)
    size = sum(entry.loss_characters for entry, _ in mixture.copies)
    assert abs(size - 1500) <= 7
    assert got(tables, "language") == pytest.approx(
        dict.fromkeys(("en", "zh", "sw"), 1 / 3), abs=0.02
    )
    assert sum(row.loss_characters for row in tables["kind"]) == size


def test_more_than_there_is_says_how_much_there_is(files):
    spec = Spec(
        files=files, conversations=2000, epochs=2, language=Axis(caps={"en": 0.5, "zh": 0.2})
    )
    # 160 of sw are 30 % or more of the whole: 533 at most.
    with pytest.raises(
        InputError, match=r"\[language\] the data within the caps .* is 533 of the 2,000"
    ):
        run(spec)


def test_names_that_no_conversation_has_are_errors_with_a_suggestion(files):
    with pytest.raises(InputError, match=r"kind.caps.conversatoin: .* did you mean 'conversation'"):
        run(Spec(files=files, conversations=10, kind=Axis(caps={"conversatoin": 0.5})))
    with pytest.raises(InputError, match=r"language.floors.th: .* there are en, sw, zh"):
        run(Spec(files=files, conversations=10, language=Axis(floors={"th": 0.5})))


def test_another_source_does_not_change_what_is_drawn_of_the_first(tmp_path, files):
    def drawn(spec):
        return {e.key for e, _ in mix(spec, read_entries(spec)).copies if e.cell[0] == "web"}

    alone = Spec(files={"web": files["web"]}, conversations=92)
    both = Spec(files=files, conversations=118)
    assert len(drawn(alone) & drawn(both)) >= 90  # but for rounding
    assert len(drawn(alone) & drawn(Spec(files=alone.files, conversations=92, seed=1))) < 30


def test_ids_are_unique_and_contents_are_those_of_the_files(tmp_path):
    def item(name, text):
        return Conversation(messages=(Message("user", text), Message("assistant", "好")), id=name)

    write_jsonl(tmp_path / "a.jsonl", [item("x", "1"), item("x", "2"), item("", "3")])
    blank = (tmp_path / "a.jsonl").read_text("utf-8").replace("\n", "\n\n", 1)
    (tmp_path / "a.jsonl").write_text("\ufeff" + blank, "utf-8")
    write_jsonl(tmp_path / "b.jsonl", [item("x", "4"), item("x#2", "5")])
    files = {"a": str(tmp_path / "a.jsonl"), "b": str(tmp_path / "b.jsonl")}
    spec = Spec(files=files, conversations=15, epochs=3)
    copies = list(read_copies(mix(spec, read_entries(spec)).copies))
    assert len({c.id for c in copies}) == 15
    assert Counter(c.messages[0].content for c in copies) == dict.fromkeys("12345", 3)
    assert {c.id for c in copies if c.messages[0].content == "1"} == {"x", "x#2", "x#3"}
    assert {c.id for c in copies if c.messages[0].content == "3"} == {"a:4", "a:4#2", "a:4#3"}


def test_speakers_take_the_place_of_the_amount_of_data(tmp_path, files):
    table = tmp_path / "languages.tsv"
    head = ("bcp_47_code", "english_name", "estimated_number_of_speakers",
            "macrolanguage_bcp_47_code", "deprecated_bcp_47_code")  # fmt: skip
    counts = (("en", "500"), ("zh", "400"), ("sw", "100"))
    lines = [head, *((code, code, count, "", "") for code, count in counts)]
    table.write_text("".join("\t".join(line) + "\n" for line in lines), "utf-8")
    _, tables = run(Spec(files=files, conversations=200, language=Axis(speakers=str(table))))
    assert got(tables, "language") == pytest.approx({"en": 0.5, "zh": 0.4, "sw": 0.1}, abs=0.006)


# --- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conversations = 1", r"\[files\] names no source"),
        ("[files]\na = 'x'", "give conversations or loss_characters"),
        ("conversations = 1\nloss_characters = 1\n[files]\na = 'x'", "one of the two"),
        ("conversation = 1\n[files]\na = 'x'", "unknown key; did you mean 'conversations'"),
        ("conversations = 0\n[files]\na = 'x'", "conversations = 0 is not a whole number above 0"),
        ("conversations = 1\n[files]\na = 1", "files.a = 1 is not a path"),
        ("conversations = 1\n[files]\na='x'\n[language]\nalpa = 1", "language.alpa: unknown key"),
        ("conversations = 1\n[files]\na='x'\n[language]\ncap = 30", "not a share from 0 to 1"),
        ("conversations = 1\n[files]\na='x'\n[kind]\nweights = 3", "is not a table"),
        ("conversations = 1\n[files]\na='x'\n[kind]\nspeakers = 'x'", r"belongs to \[language\]"),
        ("conversations = ", "not TOML"),
    ],
)
def test_a_wrong_spec_is_an_error_that_names_the_key(tmp_path, text, message):
    path = tmp_path / "spec.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        read_spec(str(path))
    assert str(error.value).startswith(str(path))


def test_the_command_writes_the_same_bytes_again(tmp_path, files, repository):
    spec = tmp_path / "spec.toml"
    names = "\n".join(f"{name} = {json.dumps(path)}" for name, path in files.items())
    spec.write_text(
        f"conversations = 100\nepochs = 3\n[files]\n{names}\n[language]\nfloors = {{sw = 0.2}}\n",
        encoding="utf-8",
    )
    results = []
    for out in (tmp_path / "out", tmp_path / "again"):
        command = [sys.executable, "-m", "data_pipelines.mixture", f"--spec={spec}", f"--out={out}"]
        run = subprocess.run(command, cwd=repository, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        results.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert results[0] == results[1]
    assert set(results[0]) == {"mixture.jsonl", "mixture.json", "mixture.txt"}
    found = list(read_jsonl(tmp_path / "out" / "mixture.jsonl"))
    assert Counter(c.lang for c in found)["sw"] == 20
    [sw] = [row for row in json.loads(results[0]["mixture.json"])["axes"]["language"]
            if row["value"] == "sw"]  # fmt: skip
    assert (sw["got"], sw["conversations"], sw["distinct"], sw["times"]) == (0.2, 20, 20, 1)
    assert results[0]["mixture.txt"].decode() in run.stdout
