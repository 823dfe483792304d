"""The languages that can be asked for: English name and script; and a check of what came back.

The check knows scripts, and English. It finds English where Swahili was asked for, and Russian
where Chinese was; it cannot tell Spanish from Portuguese.
"""

from __future__ import annotations

import re
import unicodedata

from data_pipelines.sources import Unusable
from llmzoo_jax.errors import InputError

# Scripts are first words of the Unicode names of letters.
_BY_SCRIPT = {
    "LATIN": """af Afrikaans, az Azerbaijani, bs Bosnian, ca Catalan, ceb Cebuano, cs Czech,
        cy Welsh, da Danish, de German, en English, eo Esperanto, es Spanish, et Estonian,
        eu Basque, fi Finnish, fil Filipino, fr French, ga Irish, gl Galician, ha Hausa,
        hr Croatian, ht Haitian Creole, hu Hungarian, id Indonesian, ig Igbo, is Icelandic,
        it Italian, jv Javanese, la Latin, lt Lithuanian, lv Latvian, mg Malagasy, mi Maori,
        ms Malay, mt Maltese, nb Norwegian Bokmål, nl Dutch, no Norwegian, om Oromo, pl Polish,
        pt Portuguese, qu Quechua, ro Romanian, rw Kinyarwanda, sk Slovak, sl Slovenian, sn Shona,
        so Somali, sq Albanian, st Sesotho, su Sundanese, sv Swedish, sw Swahili, tl Tagalog,
        tn Setswana, tr Turkish, tw Twi, uz Uzbek, vi Vietnamese, wo Wolof, xh Xhosa, yo Yoruba,
        zu Zulu""",
    "CYRILLIC": """be Belarusian, bg Bulgarian, kk Kazakh, ky Kyrgyz, mk Macedonian, mn Mongolian,
        ru Russian, sr Serbian, tg Tajik, tt Tatar, uk Ukrainian""",
    "ARABIC": "ar Arabic, ckb Sorani Kurdish, fa Persian, ps Pashto, sd Sindhi, ug Uyghur, ur Urdu",
    "CJK": "zh Chinese, yue Cantonese",
    "CJK HIRAGANA KATAKANA": "ja Japanese",
    "HANGUL": "ko Korean",
    "DEVANAGARI": "hi Hindi, mr Marathi, ne Nepali, sa Sanskrit",
    "BENGALI": "as Assamese, bn Bengali",
    "ETHIOPIC": "am Amharic, ti Tigrinya",
    "HEBREW": "he Hebrew, yi Yiddish",
    "GUJARATI": "gu Gujarati",
    "GURMUKHI": "pa Punjabi",
    "KANNADA": "kn Kannada",
    "MALAYALAM": "ml Malayalam",
    "ORIYA": "or Odia",
    "SINHALA": "si Sinhala",
    "TAMIL": "ta Tamil",
    "TELUGU": "te Telugu",
    "THAI": "th Thai",
    "LAO": "lo Lao",
    "KHMER": "km Khmer",
    "MYANMAR": "my Burmese",
    "TIBETAN": "bo Tibetan",
    "GEORGIAN": "ka Georgian",
    "ARMENIAN": "hy Armenian",
    "GREEK": "el Greek",
}
NAMES: dict[str, str] = {}
SCRIPTS: dict[str, frozenset[str]] = {}
for _scripts, _list in _BY_SCRIPT.items():
    for _entry in _list.split(","):
        _code, _name = _entry.split(maxsplit=1)
        NAMES[_code], SCRIPTS[_code] = _name, frozenset(_scripts.split())

_CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`|https?://\S+", re.DOTALL)
_ENGLISH = frozenset("the and of to that with you this are it which".split())


def check_known(lang: str) -> None:
    """Raises InputError for a language that is not in the table."""
    if lang not in NAMES:
        raise InputError(
            f"language {lang!r} is not known; use one of {' '.join(sorted(NAMES))}, or add it to"
            " data_pipelines/generation/languages.py"
        )


def check_language(text: str, lang: str) -> None:
    """Raises Unusable where the letters of a text, code aside, are not of the language's scripts,
    or it is English and should not be. A text of few letters passes."""
    letters = [c for c in _CODE.sub(" ", text)[:4000] if c.isalpha()]
    if len(letters) < 4:
        return
    found = [unicodedata.name(c, "?").replace("-", " ").split()[0] for c in letters]
    share = sum(script in SCRIPTS[lang] for script in found) / len(found)
    # Names, units and terms are often Latin letters in the midst of another script.
    if share < 0.4:
        raise Unusable(
            "wrong language", f"{share:.0%} of the letters are {NAMES[lang]}: {text!r:.80}"
        )
    kana = sum(script in ("HIRAGANA", "KATAKANA") for script in found) / len(found)
    if lang == "ja" and len(letters) >= 20 and kana < 0.05:
        raise Unusable("wrong language", f"Japanese without kana: {text!r:.80}")
    words = re.findall(r"[a-z]+", _CODE.sub(" ", text)[:4000].lower())
    if lang != "en" and SCRIPTS[lang] == {"LATIN"} and len(words) >= 8:
        share = sum(word in _ENGLISH for word in words) / len(words)
        if share > 0.15:
            raise Unusable("wrong language", f"English, not {NAMES[lang]}: {text!r:.80}")
