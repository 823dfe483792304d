"""Scripts and languages: right where it is sure, "und" where not, and no drop on a doubt."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from data_pipelines.language import (
    LANGUAGES,
    canonical,
    confused,
    count_scripts,
    identify,
    known,
    main_script,
    mismatch,
    prose,
    scripts_of,
)  # fmt: skip

needs_library = pytest.mark.usefixtures("library")

# Of the project's own: a few sentences each.
TEXTS = {
    "en": "The weather is lovely today, so we went down to the river with our neighbours and their"
    " children, and we stayed there until the evening.",
    "de": "Das Wetter ist heute sehr schön, deshalb sind wir mit unseren Nachbarn und ihren Kindern"
    " an den Fluss gegangen und bis zum Abend geblieben.",
    "fr": "Il fait très beau aujourd'hui, alors nous sommes descendus à la rivière avec nos voisins"
    " et leurs enfants, et nous y sommes restés jusqu'au soir.",
    "es": "Hoy hace muy buen tiempo, así que bajamos al río con nuestros vecinos y sus hijos, y nos"
    " quedamos allí hasta la noche.",
    "ru": "Сегодня прекрасная погода, поэтому мы пошли к реке вместе с соседями и их детьми и"
    " оставались там до самого вечера.",
    "uk": "Сьогодні чудова погода, тому ми пішли до річки разом із сусідами та їхніми дітьми і"
    " залишалися там аж до вечора.",
    "zh": "今天天气很好，所以我们和邻居以及他们的孩子们一起去了河边，一直待到晚上才回家。",
    "ja": "今日はとても天気がいいので、近所の人たちとその子供たちと一緒に川へ"
    "行って、夕方までそこにいました。",
    "ko": "오늘은 날씨가 아주 좋아서 이웃들과 그 아이들과 함께 강가에 가서 저녁까지 있었습니다.",
    "th": "วันนี้อากาศดีมาก เราจึงไปที่แม่น้ำกับเพื่อนบ้านและลูก ๆ ของพวกเขา และอยู่ที่นั่นจนถึงเย็น",
    "ar": "الطقس جميل جدا اليوم، لذلك ذهبنا إلى النهر مع جيراننا وأطفالهم وبقينا هناك حتى المساء.",
    "hi": "आज मौसम बहुत अच्छा है, इसलिए हम अपने पड़ोसियों और उनके बच्चों के साथ नदी पर गए और शाम तक वहीं रहे।",
    "el": "Ο καιρός είναι πολύ ωραίος σήμερα, γι' αυτό πήγαμε στο ποτάμι με τους γείτονές μας και"
    " τα παιδιά τους και μείναμε εκεί ως το βράδυ.",
    "he": "מזג האוויר יפה מאוד היום, ולכן ירדנו אל הנהר עם השכנים שלנו והילדים שלהם"
    " ונשארנו שם עד הערב.",
    "vi": "Hôm nay thời tiết rất đẹp nên chúng tôi ra bờ sông cùng những người hàng xóm và con cái"
    " của họ, rồi ở lại đó đến tận chiều tối.",
    "bn": "আজ আবহাওয়া খুব সুন্দর, তাই আমরা আমাদের প্রতিবেশী ও তাদের ছেলেমেয়েদের সঙ্গে নদীর ধারে গিয়েছিলাম"
    " এবং সন্ধ্যা পর্যন্ত সেখানে ছিলাম।",
    "ta": "இன்று வானிலை மிகவும் நன்றாக இருந்ததால் நாங்கள் அண்டை வீட்டாருடன் ஆற்றுக்குச் சென்றோம்.",
}  # fmt: skip
CODE = "\n```python\nfor number in range(10):\n    print(number, end=' ')\n```\n"


@pytest.fixture(scope="module")
def library():
    pytest.importorskip("py3langid", reason="pip install py3langid")


# --- scripts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, script",
    [
        ("Привет, world", "Cyrl"),
        ("使用Python和Java编程", "Hani"),  # a Han character is about three letters
        ("日本語を勉強する", "Jpan"),
        ("カタカナ", "Jpan"),
        ("ﾊﾝｶｸ", "Jpan"),
        ("大韓民國은 나라", "Kore"),
        ("สวัสดี", "Thai"),
        ("é́à ñ", "Latn"),
    ],
)
def test_the_script_of_most_letters_is_named(text, script):
    assert main_script(count_scripts(text))[0] == script


def test_digits_punctuation_and_emoji_are_of_no_script():
    assert not count_scripts("12 + 7 = 19 !? ，。… 😀 \u0301 \ue000")


def test_code_addresses_and_markup_are_no_prose():
    text = (
        "See `x = 1` at https://a.example/b?c=d，好 <b class='x'>or</b> write to me@b.example."
        + CODE
    )
    assert " ".join(prose(text).split()) == "See at ，好 or write to"
    assert len(prose("word " * 10_000)) <= 1500
    assert not prose("```\nnever closed").strip()


@pytest.mark.parametrize(
    "tag, lang, scripts",
    [
        ("en", "en", {"Latn"}),
        ("nb-NO", "no", {"Latn"}),
        ("zh-Hant-TW", "zh", {"Hani"}),
        ("cmn", "zh", {"Hani"}),
        ("sr", "sr", {"Latn", "Cyrl"}),
        ("sr-Cyrl", "sr", {"Cyrl"}),
        ("hi_Latn", "hi", {"Latn"}),
        ("ja", "ja", {"Kana", "Hani"}),
        ("ko", "ko", {"Hang", "Hani"}),
        ("fil", "tl", {"Latn"}),
        ("und", "und", set()),
        ("qqq", "qqq", set()),
    ],
)
def test_tags_are_read_with_their_script(tag, lang, scripts):
    assert canonical(tag) == lang and scripts_of(tag) == scripts


def test_no_language_stands_twice_in_a_script_and_confusion_goes_both_ways():
    from data_pipelines import language

    for script, line in language._WRITTEN_IN.items():
        assert max(Counter(line.split()).values()) == 1, script
        assert all(canonical(lang) == lang for lang in LANGUAGES[script] - {"fil"}), script
    for pair in (("id", "ms"), ("hr", "sr"), ("no", "da"), ("cs", "sk"), ("gl", "pt")):
        assert confused(*pair) and confused(*pair[::-1])
    assert not confused("en", "de") and not confused("es", "pt")


# --- languages ----------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("lang", TEXTS)
def test_a_few_sentences_are_identified(lang):
    found = identify(TEXTS[lang])
    assert found.lang == lang and found.confidence >= 0.9


@needs_library
@pytest.mark.parametrize("text", ["", "12345", "ok", "哈哈", "😀" * 50, CODE, "Да", "x=1; y=2"])
def test_too_little_text_is_undetermined(text):
    assert identify(text).lang == "und"


@needs_library
def test_half_and_half_is_undetermined():
    assert identify(TEXTS["en"][:60] + TEXTS["ru"][:60]).lang == "und"


@needs_library
@pytest.mark.parametrize("lang", TEXTS)
def test_what_is_declared_rightly_is_never_dropped(lang):
    texts = [TEXTS[lang], "OK", CODE, TEXTS[lang] + CODE]
    assert mismatch(lang, texts) is None
    assert mismatch(f"{lang}-XX", texts) is None


@needs_library
@pytest.mark.parametrize("lang", TEXTS)
def test_what_is_declared_wrongly_is_found(lang):
    false = "de" if lang != "de" else "en"
    found = mismatch(false, [TEXTS[lang], TEXTS[lang]])
    written = main_script(count_scripts(TEXTS[lang]))[0]
    assert found.reason == ("language" if written == "Latn" else "script")
    assert found.detail.startswith(f"declared {false}, but ")


@needs_library
@pytest.mark.parametrize(
    "declared, texts",
    [
        ("fr", ["Translate into French: " + TEXTS["en"], TEXTS["fr"]]),  # both fit
        ("en", ["Translate into French: " + TEXTS["en"], TEXTS["fr"]]),
        ("zh", ["把下面这段话翻译成英文：" + "今天天气很好，我们去了河边。", TEXTS["en"] * 3]),
        ("zh", ["写一个打印数字的程序，用英文注释", CODE * 5]),
        ("en", ["OK", "好"]),  # too short to say
        ("und", [TEXTS["ru"]]),
        ("mul", [TEXTS["ru"]]),
        ("qqq", [TEXTS["ru"]]),  # no such language here: not judged
        ("ce", [TEXTS["ru"]]),  # not known to the library; the script fits
        ("be", [TEXTS["uk"]]),  # commonly confused
        ("sr-Latn", ["Danas je lijepo vrijeme, pa smo otišli do rijeke sa susjedima i djecom, i"
                     " ostali smo tamo do večeri."]),
    ],
)  # fmt: skip
def test_no_drop_on_a_doubt(declared, texts):
    assert mismatch(declared, texts) is None


@needs_library
def test_a_script_that_a_tag_names_is_held_against_the_text():
    assert mismatch("sr-Latn", [TEXTS["ru"]]).reason == "script"
    romanised = "Aaj mausam bahut achha hai, isliye hum nadi par gaye aur shaam tak wahin rahe."
    assert mismatch("hi", [romanised]).reason == "script"


@needs_library
def test_a_long_turn_in_another_language_drops_unless_one_turn_fits():
    assert mismatch("de", ["Ja.", TEXTS["fr"]]).detail == "declared de, but it is fr"
    assert mismatch("de", [TEXTS["de"], TEXTS["fr"]]) is None


# --- accuracy -----------------------------------------------------------------------------------


@needs_library
def test_the_command_measures_accuracy_by_the_names_of_the_files(tmp_path):
    folder = tmp_path / "data" / "v1"
    folder.mkdir(parents=True)
    for code, lang in (("deu", "de"), ("rus", "ru"), ("tzl", "fr"), ("cmn", "zh")):
        sentences = [TEXTS[lang]] * 9 + ["OK"]
        (folder / f"tatoeba.{code}-eng.{code}").write_text("\n".join(sentences), encoding="utf-8")
        (folder / f"tatoeba.{code}-eng.eng").write_text(TEXTS["en"], encoding="utf-8")
    out = tmp_path / "accuracy.json"
    command = ["-m", "data_pipelines.language", f"--tatoeba={tmp_path}", f"--out={out}"]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    rows = {row["lang"]: row for row in result["languages"]}
    assert set(rows) == {"de", "ru", "tzl", "zh", "en"}
    assert (rows["de"]["right"], rows["de"]["und"], rows["de"]["wrong"]) == (0.9, 0.1, 0.0)
    assert (rows["de"]["dropped"], rows["de"]["caught"]) == (0.0, 1.0)
    # Unknown to the library: never right, taken for another, and never dropped for it.
    assert (rows["tzl"]["known"], rows["tzl"]["right"]) == (False, 0.0)
    assert (rows["tzl"]["most_wrong"], rows["tzl"]["dropped"]) == ("fr", 0.0)
    assert result["summary"]["languages"] == 5 and result["summary"]["known"] == 4
    assert "tzl (unknown)" in run.stdout


@needs_library
def test_accuracy_on_real_sentences_is_what_the_readme_may_promise(shared_data):
    """A sample of fifteen scripts and languages; the whole is the command's."""
    folder = shared_data / "tatoeba" / "data" / "tatoeba" / "v1"
    for code in "ara ben cmn deu ell fra heb hin jpn kor rus spa tam tha vie".split():
        text = (folder / f"tatoeba.{code}-eng.{code}").read_text(encoding="utf-8")
        sentences = text.splitlines()[:200]
        groups = [" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5)]
        right = sum(identify(group).lang == canonical(code) for group in groups)
        assert right >= 0.9 * len(groups), code
        assert not any(mismatch(code, [group]) for group in groups), code


@needs_library
def test_what_can_be_returned_is_in_the_table_of_scripts():
    assert known() <= frozenset().union(*LANGUAGES.values())
    assert {"en", "zh", "ar", "sw", "th", "yo"} <= known()
