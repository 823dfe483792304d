"""Cleaning: every drop has a reason and can be read, and what is kept is kept unchanged."""

import hashlib
import json
import random
import subprocess
import sys

import pytest

from data_pipelines import decontaminate
from data_pipelines.clean import File, clean_files, find_files, table
from data_pipelines.examine import Rules
from data_pipelines.spoilt_text import mojibake, placeholder
from llmzoo_jax.conversation import Conversation, Message, read_jsonl, to_dict, write_jsonl
from llmzoo_jax.errors import InputError

ALONE = Rules(allow=frozenset({"script", "language"}))  # no language library needed
WORDS = """apple stone window garden letter market bridge winter summer basket candle mirror
thunder village island harbour feather copper silver meadow lantern orchard blanket drum""".split()


def sentence(seed, words=60):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def chat(*contents, **about):
    roles = [("user", "assistant")[i % 2] for i in range(len(contents))]
    messages = tuple(Message(r, c) for r, c in zip(roles, contents, strict=True))
    return Conversation(messages=messages, **{"lang": "en", **about})


def unlike(n, start=0):
    return [chat(sentence(f"q{i}"), sentence(f"a{i}")) for i in range(start, start + n)]


def write(path, conversations):
    """Also what is not in order, which write_jsonl would not read back."""
    lines = [json.dumps(to_dict(c) if isinstance(c, Conversation) else c) for c in conversations]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return File(str(path), heldout=".heldout." in path.name)


def run(tmp_path, train, heldout=(), rules=ALONE, index=None):
    """What is kept of both, and the lines of dropped.jsonl."""
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    files = [write(folder / "x.heldout.jsonl", heldout)] if heldout else []
    files.append(write(folder / "x.train.jsonl", train))
    clean_files(files, str(tmp_path / "out"), rules, index)
    kept = {}
    for side in ("train", "heldout"):
        path = tmp_path / "out" / f"x.{side}.jsonl"
        kept[side] = list(read_jsonl(path)) if path.exists() else []
    lines = (tmp_path / "out" / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    return kept["train"], kept["heldout"], [json.loads(line) for line in lines]


# --- one conversation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dirty, reason",
    [
        ({"messages": []}, "no answer"),
        (to_dict(chat("a", " ")), "empty turn"),
        (to_dict(chat("question")), "no answer"),
        ({"messages": to_dict(chat("a", "b"))["messages"][::-1]}, "malformed"),
        ({"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]},
         "malformed"),
        ({"messages": [{"role": "user"}]}, "malformed"),
        ({"messages": "hello"}, "malformed"),
        ({"mesages": []}, "malformed"),
        (["no object"], "malformed"),
        (to_dict(chat("a", "b</s>c")), "special token"),
        (to_dict(chat("a", "b\ufffdc")), "lost character"),
        (to_dict(chat("a", "The cafÃ© is open")), "mojibake"),
        (to_dict(chat("a", "Dear {{ customer_name }},")), "placeholder"),
        (to_dict(chat("a", "b" * 300_000)), "length"),
        (to_dict(chat("", "")) | {"lang": "x"}, "empty turn"),
    ],
)  # fmt: skip
def test_each_kind_of_dirt_is_dropped_with_its_reason(tmp_path, dirty, reason):
    clean = unlike(3)
    kept, _, dropped = run(tmp_path, [clean[0], dirty, *clean[1:]])
    assert kept == clean
    (note,) = dropped
    assert (note["reason"], note["where"]) == (reason, "x.train.jsonl:2")
    assert note["detail"] and note["conversation"] == dirty


def test_lines_that_are_no_json_are_dropped_and_can_be_read(tmp_path):
    good = unlike(1)
    path = tmp_path / "x.train.jsonl"
    raw = json.dumps(to_dict(good[0])).encode()
    path.write_bytes(b"\n" + raw + b'\n{"messages": [\n\xff\xfe broken\n')
    file = File(str(path), heldout=False)
    clean_files([file], str(tmp_path / "out"), ALONE)
    assert (file.read, file.kept, dict(file.dropped)) == (3, 1, {"not JSON": 2})
    notes = [json.loads(x) for x in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert [note["conversation"] for note in notes] == ['{"messages": [\n', "\\xff\\xfe broken\n"]
    assert [note["where"] for note in notes] == ["x.train.jsonl:3", "x.train.jsonl:4"]


def test_half_a_surrogate_pair_is_dropped_and_stays_readable(tmp_path):
    dirty = to_dict(chat("a", "b \ud83d c"))
    kept, _, (note,) = run(tmp_path, [*unlike(1), dirty])
    assert len(kept) == 1 and note["reason"] == "malformed" and note["conversation"] == dirty


def test_what_is_trimmed_is_kept_and_noted(tmp_path):
    whole = chat(sentence("q"), sentence("a"), "and then?")
    kept, _, (note,) = run(tmp_path, [whole])
    assert kept[0].messages == whole.messages[:2]
    assert note["reason"] == "trimmed" and note["conversation"] == to_dict(whole)


@pytest.mark.parametrize("reason, dirty", [
    ("placeholder", chat("a", "Dear {{ customer_name }},")),
    ("mojibake", chat("a", "The cafÃ© is open")),
    ("lost character", chat("a", "b\ufffdc")),
])  # fmt: skip
def test_a_reason_can_be_allowed(tmp_path, reason, dirty):
    kept, _, dropped = run(tmp_path, [dirty], rules=Rules(allow=ALONE.allow | {reason}))
    assert kept == [dirty] and not dropped


def test_lengths_are_limits_that_may_be_reached(tmp_path):
    rules = Rules(min_chars=4, max_chars=6, allow=ALONE.allow)
    texts = [chat("ab", "c"), chat("ab", "cd"), chat("abc", "def"), chat("abc", "defg")]
    kept, _, dropped = run(tmp_path, texts, rules=rules)
    assert kept == texts[1:3] and [note["reason"] for note in dropped] == ["length"] * 2


def test_declared_and_detected_language_are_compared(tmp_path):
    pytest.importorskip("py3langid", reason="pip install py3langid")
    english = "Could you tell me how the old bridge over the river was built by the people here?"
    russian = "Расскажите, пожалуйста, как местные жители построили старый мост через эту реку?"
    right = [chat(english, english + " Yes."), chat(russian, russian + " Да.", lang="ru")]
    wrong = [chat(english, english + " No.", lang="de"), chat(russian, russian + " Нет.")]
    kept, _, dropped = run(tmp_path, right + wrong, rules=Rules(near=0))
    assert kept == right
    assert [note["reason"] for note in dropped] == ["language", "script"]
    assert "declared de, but it is en" in dropped[0]["detail"]


# --- mojibake and placeholders --------------------------------------------------------------------

REAL = {
    "fr": "« À bientôt ! » dit Zoé à l’hôtel ; le CAFÉ” était fermé… Noël, Œuvre, 25 °C",
    "de": "Größe, Übermut, „Äpfel“ – ß",
    "es": "¿Qué tal el niño? ¡Mañana será otro día!",
    "pt": "NÃO há ações, SÃO três irmãos. Ânimo!",
    "vi": "Tiếng Việt có nhiều dấu thanh, ví dụ: ả, ã, ạ, Âu, Ơn.",
    "is": "Það er gott veður í dag, þótt ég sé þreyttur.",
    "ru": "Привет! Рим, Сибирь, «Роза» — это слова. №5",
    "uk": "Рівне, Січ, Різдво, їжак, ґанок і є: «Сім’я»",
    "sr": "Ђак и Љиљана, Џеп, ћирилица; Њива.",
    "zh": "联通公司的网络很好，“今天”天气不错……我们去公园吧——好的！价格是￥25，温度25°C",
    "ja": "「こんにちは」と言いました。Ｆｕｌｌ　ｗｉｄｔｈ・全角",
    "th": "สวัสดีครับ “ขอบคุณ” …",
    "list": "Accents: áéíóúüñ and ÁÉÍÓÚÜÑ, [àâçéèêëîïôûùüÿ]+",
    "maths": "a × b ÷ c ± 2 ² ³ ½ ¼ µm £5 §3 ¶",
}


@pytest.mark.parametrize("name", REAL)
def test_real_text_of_any_language_is_no_mojibake(name):
    assert mojibake(REAL[name]) == ""
    assert mojibake("\n".join(REAL.values())) == ""


@pytest.mark.parametrize("codec", ["latin-1", "cp1252"])
@pytest.mark.parametrize("name", ["fr", "de", "es", "vi", "ru", "uk", "zh", "ja", "th"])
def test_utf8_that_was_read_as_latin1_is_found(name, codec):
    raw = REAL[name].encode()
    spoilt = "".join(bytes([b]).decode(codec, "ignore") or chr(b) for b in raw)
    assert "UTF-8 that was read as" in mojibake(spoilt)
    assert mojibake(f"A line that is in order.\n{spoilt}\n你好")  # one line of many is enough


@pytest.mark.parametrize(
    "text",
    [
        "Itâ€™s fine",
        "25Â°C",
        "Привет, как дела".encode().decode("cp1251", "replace").replace("\ufffd", "\x98"),
        "今天天气很好我们一起去公园散步吧".encode().decode("gb18030", "ignore"),
        "Сегодня хорошая погода, поэтому мы гуляем у реки".encode("cp1251").decode("latin-1"),
        "烫烫烫锟斤拷锟斤拷",
    ],
)
def test_other_wrong_readings_are_found(text):
    assert mojibake(text)


@pytest.mark.parametrize("text", [
    "Hello {{name}}", "{{ user.first_name }}", "[INSERT DATE HERE]", "[insert your company]",
    "Lorem ipsum dolor sit amet", "尊敬的【插入姓名】", "[填写日期]",
])  # fmt: skip
def test_placeholders_are_found(text):
    assert placeholder(f"Dear all, {text} and so on")


@pytest.mark.parametrize("text", [
    "Use `{{ name }}` in Vue.",
    "```html\n<p>{{ name }}</p>\n```", "f'{{{x}}}'", "{name}",
    "Sincerely, [Your Name]", "INSERT INTO t VALUES (1)", "a[insert_at] = 1",
    "\\frac{{a}}{{b}} {{}}",
])  # fmt: skip
def test_code_and_letters_for_others_have_no_placeholders(text):
    assert not placeholder(text)


# --- many conversations ---------------------------------------------------------------------------


def test_of_exact_duplicates_the_first_is_kept(tmp_path):
    a, b, c = unlike(3)
    kept, _, dropped = run(tmp_path, [a, b, a, c, b])
    assert kept == [a, b, c]
    assert [(n["where"], n["detail"]) for n in dropped] == [
        ("x.train.jsonl:3", "of x.train.jsonl:1"), ("x.train.jsonl:5", "of x.train.jsonl:2")
    ]  # fmt: skip
    assert {note["reason"] for note in dropped} == {"duplicate"}


def near_to(conversation, ending="indeed"):
    *rest, last = conversation.messages
    return Conversation(
        messages=(*rest, Message("assistant", f"{last.content} {ending}!")), lang=conversation.lang
    )


def test_near_duplicates_are_dropped_with_their_jaccard_index(tmp_path):
    texts = unlike(20)
    kept, _, dropped = run(tmp_path, [*texts, near_to(texts[4]), near_to(texts[7])])
    assert kept == texts
    assert [n["reason"] for n in dropped] == ["near duplicate"] * 2
    assert dropped[0]["detail"].startswith("of x.train.jsonl:5, Jaccard index 0.9")
    kept, _, dropped = run(
        tmp_path, [*texts, near_to(texts[4])], rules=Rules(near=0, allow=ALONE.allow)
    )
    assert len(kept) == 21 and not dropped


def test_the_same_system_message_makes_nothing_near(tmp_path):
    system = Message("system", sentence("long", 2000))
    texts = [Conversation(messages=(system, *c.messages)) for c in unlike(5)]
    kept, _, dropped = run(tmp_path, texts)
    assert kept == texts and not dropped


def test_training_conversations_near_a_held_out_one_leave_the_training_data(tmp_path):
    texts = unlike(10)
    train = [near_to(texts[0]), *texts[1:8]]
    heldout = [texts[0], texts[1], *texts[8:]]
    kept, kept_heldout, dropped = run(tmp_path, train, heldout)
    assert kept == texts[2:8] and kept_heldout == heldout
    assert [(n["where"], n["reason"]) for n in dropped] == [
        ("x.train.jsonl:1", "near duplicate"), ("x.train.jsonl:2", "duplicate")
    ]  # fmt: skip
    assert all("of x.heldout.jsonl:" in note["detail"] for note in dropped)


def test_evaluation_questions_leave_the_training_data_in_every_language(tmp_path):
    english = "A farmer plants nine rows of eleven trees. How many trees does the farmer plant?"
    chinese = "一位农民种了九排树，每排有十一棵。这位农民一共种了多少棵树？"
    for lang, text in (("en", english), ("zh", chinese)):
        path = tmp_path / f"q_{lang}.jsonl"
        path.write_text(json.dumps({"question_id": 3, "text": text}), encoding="utf-8")
    index = decontaminate.build_index(decontaminate.read_questions(str(tmp_path / "q_*.jsonl")))
    clean = unlike(3)
    asked = [chat(english, "99"), chat("请解答：" + chinese, "九十九", lang="zh")]
    kept, heldout, dropped = run(tmp_path, [*clean, *asked], [asked[0]], index=index)
    assert kept == clean and heldout == asked[:1]  # what is held out is not trained on
    assert [note["reason"] for note in dropped] == ["evaluation question"] * 2
    assert "question 3 of q_zh.jsonl" in dropped[1]["detail"]
    assert "twins: q_en.jsonl" in dropped[1]["detail"]


def test_every_conversation_is_kept_or_dropped_and_the_table_says_so(tmp_path):
    texts = unlike(30)
    files = []
    for name, start in (("a", 0), ("b", 10)):
        dirt = [chat("", "b"), texts[start], chat("a\ufffd", f"b{name}"), near_to(texts[start + 1])]
        files.append(write(tmp_path / f"{name}.train.jsonl", texts[start : start + 15] + dirt))
    clean_files(files, str(tmp_path / "out"), ALONE)
    for file in files:
        assert file.read == file.kept + file.dropped.total() == 19
    assert files[0].dropped == {
        "empty turn": 1, "duplicate": 1, "lost character": 1, "near duplicate": 1
    }  # fmt: skip
    assert files[1].dropped["duplicate"] == 6  # five of them of a
    lines = table(files).splitlines()
    assert lines[0].split()[:4] == ["file", "read", "kept", "trimmed"]
    assert lines[-1].split()[:3] == ["all", "38", str(files[0].kept + files[1].kept)]
    dropped = (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()
    assert len(dropped) == sum(file.dropped.total() for file in files)


def test_a_file_of_which_nothing_is_left_is_not_written(tmp_path):
    run(tmp_path, unlike(2))
    assert (tmp_path / "out" / "x.train.jsonl").exists()
    kept, _, dropped = run(tmp_path, [chat("a", "")])
    assert not kept and len(dropped) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dropped.jsonl"]


# --- the command ----------------------------------------------------------------------------------


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "data_pipelines.clean", *arguments, "--allow=script",
         "--allow=language"],
        capture_output=True, text=True,
    )  # fmt: skip


def test_the_command_writes_the_same_files_again(tmp_path):
    texts = unlike(8)
    write_jsonl(tmp_path / "a.train.jsonl", [*texts, texts[0], near_to(texts[1])])
    write_jsonl(tmp_path / "a.heldout.jsonl", [near_to(texts[2])])
    arguments = (f"--data={tmp_path}/*.train.jsonl", f"--heldout={tmp_path}/a.heldout.jsonl",
                 f"--out={tmp_path}/out")  # fmt: skip

    def digests():
        out = tmp_path / "out"
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir()}

    first = command(*arguments)
    assert first.returncode == 0, first.stderr
    assert "near duplicate" in first.stdout and "11 conversations in" in first.stdout
    before = digests()
    assert set(before) == {"a.train.jsonl", "a.heldout.jsonl", "dropped.jsonl"}
    assert command(*arguments).returncode == 0 and digests() == before
    assert len(list(read_jsonl(tmp_path / "out" / "a.train.jsonl"))) == 7


def test_any_number_of_processes_writes_the_same_files(tmp_path):
    texts = unlike(90)  # more than a process takes at once
    dirty = [texts[0], near_to(texts[1]), chat("a", ""), chat("a", "b\ufffdc")]
    for workers in (1, 2):
        files = [write(tmp_path / "x.heldout.jsonl", [near_to(texts[2])]),
                 write(tmp_path / "x.train.jsonl", [*texts, *dirty])]  # fmt: skip
        clean_files(files, str(tmp_path / str(workers)), ALONE, workers=workers)
        assert [(file.read, file.kept) for file in files] == [(1, 1), (94, 89)]
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


@pytest.mark.parametrize(
    "data, heldout, message",
    [
        (["none.jsonl"], [], "--data=.*none.jsonl: there is no such file"),
        ([], [], "--data: give the JSON Lines file"),
        (["a.jsonl", "b/a.jsonl"], [], "two files are called a.jsonl"),
        (["a.jsonl"], ["a.jsonl"], "two files are called a.jsonl"),
        (["out/c.jsonl"], [], "c.jsonl is in it; give another folder"),
        (["x.heldout.jsonl"], [], "give held-out files with --heldout"),
    ],
)
def test_files_that_cannot_be_are_refused_by_name(tmp_path, data, heldout, message):
    for name in ("a.jsonl", "b/a.jsonl", "out/c.jsonl", "x.heldout.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=message):
        find_files(
            [str(tmp_path / name) for name in data],
            [str(tmp_path / name) for name in heldout],
            str(tmp_path / "out"),
        )


def test_a_mistake_is_one_line_and_no_traceback(tmp_path):
    run = command(f"--data={tmp_path}/no.jsonl", f"--out={tmp_path}/out")
    assert run.returncode == 1 and run.stderr.startswith("error: --data=")
    assert "Traceback" not in run.stderr
