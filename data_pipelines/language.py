"""Which script and language a text is in, and whether that is what its record says.

    python -m data_pipelines.language --tatoeba=../shared/data/tatoeba --out=accuracy.json

measures it on sentences of known language. The script comes first (Unicode's names of characters)
and often settles it; else py3langid chooses among the languages that are written in that script.
The answer is "und" where there is too little text or too little confidence, and "und" never
counts against a text.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from absl import flags
from tqdm import tqdm

from llmzoo_jax import cli
from llmzoo_jax.errors import InputError

FEWEST_LETTERS = 10  # below, a text is "und"
CONFIDENT = 0.5  # below, a text is "und"
SURE = 0.9  # from here on, and with SURE_LETTERS, a text may speak against its record
SURE_LETTERS = 60
LONGEST = 1500  # characters of a text that are looked at
SHARE = 0.6  # of the letters: the script that a text is in, else it is mixed, so "und"
FOREIGN = 0.05  # of the letters: a text with fewer of its own script is in the wrong one

# --- what is known about languages --------------------------------------------------------------

# The first word of a character's Unicode name -> ISO 15924.
_SCRIPT_NAMES = {
    "LATIN": "Latn", "CYRILLIC": "Cyrl", "GREEK": "Grek", "ARMENIAN": "Armn", "HEBREW": "Hebr",
    "ARABIC": "Arab", "SYRIAC": "Syrc", "THAANA": "Thaa", "NKO": "Nkoo", "DEVANAGARI": "Deva",
    "BENGALI": "Beng", "GURMUKHI": "Guru", "GUJARATI": "Gujr", "ORIYA": "Orya", "TAMIL": "Taml",
    "TELUGU": "Telu", "KANNADA": "Knda", "MALAYALAM": "Mlym", "SINHALA": "Sinh", "THAI": "Thai",
    "LAO": "Laoo", "TIBETAN": "Tibt", "MYANMAR": "Mymr", "GEORGIAN": "Geor", "HANGUL": "Hang",
    "ETHIOPIC": "Ethi", "CHEROKEE": "Cher", "KHMER": "Khmr", "MONGOLIAN": "Mong",
    "HIRAGANA": "Kana", "KATAKANA": "Kana", "KATAKANA-HIRAGANA": "Kana", "CJK": "Hani",
    "TIFINAGH": "Tfng", "OL": "Olck", "MEETEI": "Mtei", "YI": "Yiii",
}  # fmt: skip
_WIDTHS = ("HALFWIDTH", "FULLWIDTH")  # before the name of the script
_LETTERS = {"Hani": 3, "Kana": 2, "Hang": 2}  # about as much text as so many Latin letters

# Script -> languages that are written in it. What is in no line is not judged.
_WRITTEN_IN = {
    "Latn": "ace af an ang ast az bcl br bs ca cbk ceb ch co crh cs csb cy da de dsb dtp en eo"
    " es et eu ext fi fo fr fuv fy ga gcf gcr gd gl gsw gug guw ha hr hsb ht hu ia id ie ig"
    " io is it jv kab kik ku kw la lb lfn lg li lij ln lt ltg lv max mg mi ms mt nds nl no nov"
    " nso ny oc om pam pcm pl pms pt qu rm ro rw sc se sk sl sm sn so sq sr st su sv sw swg tk tl"
    " tn to tr ts tzl ug uz vec vi vo wa war wo xh yo zu",
    "Cyrl": "ab av az ba be bg bs ce crh cv kk ku ky mhr mk mn orv os ru sr tg tk tt ug uk uz",
    "Arab": "ar arq ary arz az ckb fa kk ks ku pa prs ps sd sdh ug ur uzs",
    "Deva": "awa bho doi gom hi kok ks mai mr ne sa sd",
    "Beng": "as bn mni",
    "Grek": "el grc",
    "Hebr": "he hbo yi",
    "Ethi": "am ti",
    "Tibt": "bo dz",
    "Mymr": "ksw mnw my shn",
    "Hani": "ja wuu yue zh",
    "Jpan": "ja",
    "Kore": "ko",
    "Thai": "th", "Laoo": "lo", "Khmr": "km", "Sinh": "si", "Taml": "ta", "Telu": "te",
    "Knda": "kn", "Mlym": "ml", "Gujr": "gu", "Guru": "pa", "Orya": "or", "Geor": "ka",
    "Armn": "hy", "Thaa": "dv", "Mong": "mn", "Cher": "chr",
}  # fmt: skip
LANGUAGES = {script: frozenset(line.split()) for script, line in _WRITTEN_IN.items()}

# Commonly confused, or the same text in both: one never counts against another.
_CONFUSED = [
    frozenset(group.split())
    for group in (
        "id ms jv su ace min", "hr sr bs sh", "no da nn sv fo", "cs sk", "zh yue wuu", "ar arz ary"
        " arq", "fa prs", "ku ckb sdh", "hi mr ne sa awa bho mai doi gom kok", "xh zu st nso tn ts",
        "af nl nds li fy", "de nds gsw swg lb", "az tr crh tk", "tt ba kk ky uz", "bg mk",
        "ru be uk orv", "ru mhr cv", "gd ga", "tl ceb war bcl pam", "en pcm", "fr wa gcf gcr",
        "es gl ast ca an oc ext cbk", "pt gl", "it vec lij co pms sc la", "eo io ie ia nov lfn",
        "lv ltg", "he hbo yi", "el grc", "as bn", "rw rn", "dsb hsb pl csb cs", "is fo", "dz bo",
        "om so", "am ti", "es gug", "ha fuv", "br kw", "kab ber", "my shn mnw ksw",
    )
]  # fmt: skip

# ISO 639-3, older and narrower codes -> the code that is used here (ISO 639-1 where there is one).
_CODES = dict(
    pair.split("=")
    for pair in (
        "afr=af amh=am ara=ar aze=az bel=be ben=bn bos=bs bre=br bul=bg cat=ca ces=cs cmn=zh cor=kw"
        " cym=cy dan=da deu=de ell=el eng=en epo=eo est=et eus=eu fao=fo fin=fi fra=fr fry=fy"
        " gla=gd gle=ga glg=gl heb=he hin=hi hrv=hr hun=hu hye=hy ido=io ile=ie ina=ia ind=id"
        " isl=is ita=it jav=jv jpn=ja kat=ka kaz=kk khm=km kor=ko kur=ku kmr=ku lat=la lit=lt"
        " lvs=lv lav=lv mal=ml mar=mr mkd=mk mon=mn khk=mn nld=nl nno=nn nob=no nb=no oci=oc pes=fa"
        " fas=fa pol=pl por=pt ron=ro rus=ru slk=sk slv=sl spa=es sqi=sq srp=sr swe=sv swh=sw"
        " swa=sw tam=ta tat=tt tel=te tgl=tl fil=tl tha=th tuk=tk tur=tr uig=ug ukr=uk urd=ur"
        " uzb=uz vie=vi xho=xh yid=yi zsm=ms zho=zh iw=he in=id ji=yi mo=ro jw=jv cha=ch"
    ).split()
)
_SCRIPT_OF_TAG = {  # what a script subtag allows
    "hans": {"Hani"}, "hant": {"Hani"}, "hani": {"Hani"}, "jpan": {"Kana", "Hani"},
    "kore": {"Hang", "Hani"},
}  # fmt: skip


def canonical(tag: str) -> str:
    """The language of a BCP-47 tag or ISO 639-3 code, as it is written here: "nb-NO" -> "no"."""
    primary = tag.lower().replace("_", "-").partition("-")[0]
    return _CODES.get(primary, primary)


def scripts_of(tag: str) -> set[str]:
    """The scripts (as ``count_scripts`` names them) that a tag allows; none where not known."""
    for subtag in tag.replace("_", "-").split("-")[1:]:
        if len(subtag) == 4 and subtag.isalpha():
            return _SCRIPT_OF_TAG.get(subtag.lower(), {subtag.title()})
    scripts = {script for script, languages in LANGUAGES.items() if canonical(tag) in languages}
    for script, parts in (("Jpan", {"Kana", "Hani"}), ("Kore", {"Hang", "Hani"})):
        if script in scripts:
            scripts = scripts - {script} | parts
    return scripts


def confused(a: str, b: str) -> bool:
    return any(a in group and b in group for group in _CONFUSED)


# --- scripts ------------------------------------------------------------------------------------

# Code, addresses and markup, which are in no language.
_NO_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|(?:https?://|www\.)[!-~]+|[A-Za-z0-9._+-]{1,64}@[A-Za-z0-9.-]+"
    r"|<[^<>\n]{1,200}>",
    re.DOTALL,
)


def prose(text: str) -> str:
    """The beginning of ``text`` without code, addresses and markup."""
    return _NO_LANGUAGE.sub(" ", text[: 4 * LONGEST])[:LONGEST]


@functools.cache
def _script(character: str) -> str:
    """ "" for what belongs to no script: digits, punctuation, accents, emoji."""
    if unicodedata.category(character)[0] not in "LM":
        return ""
    words = unicodedata.name(character, "").split()
    first = next((word for word in words if word not in _WIDTHS), "")
    return _SCRIPT_NAMES.get(first, "")


def count_scripts(text: str) -> Counter[str]:
    """How many letters of each script; ideographs and syllables count as two or three."""
    counts: Counter[str] = Counter()
    for character, n in Counter(text).items():
        if script := _script(character):
            counts[script] += n * _LETTERS.get(script, 1)
    return counts


def main_script(counts: Counter[str]) -> tuple[str, float]:
    """The script of most letters, and its share of them. Kana with Han is "Jpan", Hangul "Kore"."""
    total = counts.total()
    counts = Counter(counts)
    han = counts["Hani"]
    if counts["Kana"] > 0.1 * han:
        counts["Jpan"] = counts.pop("Kana") + counts.pop("Hani", 0)
    elif counts["Hang"] > 0.3 * han:
        counts["Kore"] = counts.pop("Hang") + counts.pop("Hani", 0)
    # Of equal ones the first by name, so that the order of the text does not matter.
    script, letters = max(sorted(counts.items()), key=lambda item: item[1])
    return script, letters / max(total, 1)


# --- languages ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detected:
    lang: str  # as ``canonical`` writes it, or "und"
    confidence: float  # 0 to 1
    script: str  # of most letters; "" where there is none
    letters: int


@functools.cache
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise InputError(
            "language identification needs the package py3langid: pip install 'py3langid>=0.4,<0.5'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@functools.cache
def known() -> frozenset[str]:
    """The languages that ``identify`` can return."""
    library = {lang for lang, _ in _identifier().rank("")}
    several = frozenset().union(*(x for x in LANGUAGES.values() if len(x) > 1))
    single = frozenset().union(*(x for x in LANGUAGES.values() if len(x) == 1))
    return single | (several & library)


def identify(text: str) -> Detected:
    text = prose(text)
    counts = count_scripts(text)
    letters = counts.total()
    if not letters:
        return Detected("und", 0.0, "", 0)
    script, share = main_script(counts)
    if letters < FEWEST_LETTERS or share < SHARE or script not in LANGUAGES:
        return Detected("und", 0.0, script, letters)
    possible = LANGUAGES[script]
    if len(possible) == 1:
        return Detected(*possible, share, script, letters)
    ranked = _identifier().rank(text)
    if ranked[0][0] == "zxx":  # the library's word for what is no language
        return Detected("und", 0.0, script, letters)
    ranked = [(lang, p) for lang, p in ranked if lang in possible]
    total = sum(p for _, p in ranked)
    if not total:
        return Detected("und", 0.0, script, letters)
    lang, confidence = ranked[0][0], ranked[0][1] / total
    return Detected(lang if confidence >= CONFIDENT else "und", confidence, script, letters)


@dataclass(frozen=True)
class Mismatch:
    reason: str  # "script" or "language"
    detail: str


def mismatch(declared: str, texts: Iterable[str]) -> Mismatch | None:
    """What speaks against texts (the turns of a conversation) being in the language ``declared``.

    A script does where next to no letter is in one that the language is written in. A language does
    where turns with at least half of the letters are surely in others, none of them commonly
    confused with the declared one, and no turn is in that. A translation exercise thus fits both of
    its languages. A language that is not known here is never judged.
    """
    lang, allowed, texts = canonical(declared), scripts_of(declared), list(texts)
    counts = sum((count_scripts(prose(text)) for text in texts), Counter())
    if not allowed or counts.total() < SURE_LETTERS:
        return None
    own = sum(counts[script] for script in allowed) / counts.total()
    if own < FOREIGN:
        script, share = main_script(counts)
        return Mismatch(
            "script", f"declared {declared}, but {share:.0%} of the letters are {script}"
        )
    if lang not in known():
        return None
    others: Counter[str] = Counter()
    for text in texts:
        found = identify(text)
        if found.lang == "und":
            continue
        if found.lang == lang or confused(found.lang, lang):
            return None
        if found.confidence >= SURE and found.letters >= SURE_LETTERS:
            others[found.lang] += found.letters
    if 2 * others.total() < counts.total():
        return None
    return Mismatch("language", f"declared {declared}, but it is {others.most_common(1)[0][0]}")


# --- accuracy -----------------------------------------------------------------------------------

JOINED = 5  # sentences that are joined to be as long as a short turn


@dataclass(frozen=True)
class Accuracy:
    """Of a language, in sentences and (the last two) in groups of JOINED sentences; shares."""

    lang: str
    known: bool  # to the detector
    sentences: int
    right: float
    confused: float  # with a language that is commonly confused with it
    und: float
    wrong: float
    most_wrong: str  # what the wrong ones are most often taken for
    right_joined: float
    dropped: float  # wrongly, if declared as what it is
    caught: float  # rightly, if declared as English (English: as French)


def measure(lang: str, sentences: list[str]) -> Accuracy:
    found = Counter(identify(sentence).lang for sentence in sentences)
    near = {other: n for other, n in found.items() if other != lang and confused(other, lang)}
    wrong = Counter({x: n for x, n in found.items() if x not in {lang, "und", *near}})
    starts = range(0, len(sentences) - JOINED + 1, JOINED)
    groups = [" ".join(sentences[i : i + JOINED]) for i in starts]
    false = "fr" if lang == "en" else "en"

    def share(n: int, of: list[str]) -> float:
        return round(n / max(len(of), 1), 4)

    return Accuracy(
        lang=lang,
        known=lang in known(),
        sentences=len(sentences),
        right=share(found[lang], sentences),
        confused=share(sum(near.values()), sentences),
        und=share(found["und"], sentences),
        wrong=share(wrong.total(), sentences),
        most_wrong=wrong.most_common(1)[0][0] if wrong else "",
        right_joined=share(sum(identify(group).lang == lang for group in groups), groups),
        dropped=share(sum(mismatch(lang, [group]) is not None for group in groups), groups),
        caught=share(sum(mismatch(false, [group]) is not None for group in groups), groups),
    )


def tatoeba(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Language and sentences of each file ``tatoeba.XXX-eng.XXX``, and of English a thousand."""
    files = sorted(glob.glob(os.path.join(folder, "**", "tatoeba.*-eng.*"), recursive=True))
    if not files:
        raise InputError(f"--tatoeba={folder}: there is no file tatoeba.*-eng.* below it")
    english: dict[str, None] = {}
    for file in tqdm(files, desc="languages", unit="file", disable=None):
        code = file.rpartition(".")[2]
        with open(file, encoding="utf-8") as lines:
            sentences = [line.strip() for line in lines if line.strip()]
        if code == "eng":
            english |= dict.fromkeys(sentences)
        else:
            yield canonical(code), sentences
    yield "en", list(english)[:1000]


def table(rows: list[Accuracy]) -> str:
    head = ("right", "confused", "und", "wrong", "as", "joined", "dropped", "caught")
    lines = [
        "{:<14}{:>6}{:>9}{:>10}{:>9}{:>9}  {:<5}{:>8}{:>9}{:>9}".format("language", "n", *head)
    ]
    for r in rows:
        name = r.lang + ("" if r.known else " (unknown)")
        lines.append(
            f"{name:<14}{r.sentences:>6}{r.right:>9.1%}{r.confused:>10.1%}{r.und:>9.1%}"
            f"{r.wrong:>9.1%}  {r.most_wrong:<5}{r.right_joined:>8.1%}{r.dropped:>9.1%}"
            f"{r.caught:>9.1%}"
        )
    return "\n".join(lines)


def summary(rows: list[Accuracy]) -> dict[str, float]:
    """Means over languages, each counting the same."""

    def mean(name: str, of: list[Accuracy]) -> float:
        return round(sum(getattr(row, name) for row in of) / max(len(of), 1), 4)

    judged = [row for row in rows if row.known]
    return {
        "languages": len(rows),
        "known": len(judged),
        "right_of_known": mean("right", judged),
        "right_joined_of_known": mean("right_joined", judged),
        "right_of_all": mean("right", rows),
        "dropped_of_all": mean("dropped", rows),
        "caught_of_all": mean("caught", rows),
    }


def main(_: list[str]) -> None:
    args = flags.FLAGS
    rows = [measure(lang, sentences) for lang, sentences in tatoeba(args.tatoeba)]
    rows.sort(key=lambda row: (-row.known, -row.right, row.lang))
    result = {"summary": summary(rows), "languages": [asdict(row) for row in rows]}
    with open(f"{args.out}.tmp", "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
    os.replace(f"{args.out}.tmp", args.out)
    print(table(rows))
    print("\n" + "\n".join(f"{name}: {value}" for name, value in result["summary"].items()))
    print(f"\njoined, dropped, caught: {JOINED} sentences at a time; written to {args.out}")


if __name__ == "__main__":
    flags.DEFINE_string("tatoeba", "../shared/data/tatoeba", "folder of tatoeba.XXX-eng.XXX")
    flags.DEFINE_string("out", "language_accuracy.json", "JSON file to write")
    cli.run(main)
