"""Tatoeba, as LASER has it: lines of ``tatoeba.XXX-eng.eng``, and the same in XXX beside it.

A pair becomes one instruction to translate: odd lines into English, even lines out of it. The
language of the conversation is the one that is translated into, as this is what the model writes.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator

from data_pipelines.sources import Dropped
from data_pipelines.sources.records import read_lines
from llmzoo_jax.conversation import Conversation, Message
from llmzoo_jax.errors import InputError

# ISO 639-3 (ber and ara stand for a group) -> BCP-47, where there is a shorter tag, and the name.
# A standard language of a macrolanguage has the tag of that: lvs is lv, cmn is zh, pes is fa.
_TABLE = """
afr af Afrikaans; amh am Amharic; ang ang Old English; ara ar Arabic; arq arq Algerian Arabic;
arz arz Egyptian Arabic; ast ast Asturian; awa awa Awadhi; aze az Azerbaijani; bel be Belarusian;
ben bn Bengali; ber ber Berber; bos bs Bosnian; bre br Breton; bul bg Bulgarian; cat ca Catalan;
cbk cbk Chavacano; ceb ceb Cebuano; ces cs Czech; cha ch Chamorro; cmn zh Chinese; cor kw Cornish;
csb csb Kashubian; cym cy Welsh; dan da Danish; deu de German; dsb dsb Lower Sorbian;
dtp dtp Central Dusun; ell el Greek; epo eo Esperanto; est et Estonian; eus eu Basque;
fao fo Faroese; fin fi Finnish; fra fr French; fry fy West Frisian; gla gd Scottish Gaelic;
gle ga Irish; glg gl Galician; gsw gsw Swiss German; heb he Hebrew; hin hi Hindi; hrv hr Croatian;
hsb hsb Upper Sorbian; hun hu Hungarian; hye hy Armenian; ido io Ido; ile ie Interlingue;
ina ia Interlingua; ind id Indonesian; isl is Icelandic; ita it Italian; jav jv Javanese;
jpn ja Japanese; kab kab Kabyle; kat ka Georgian; kaz kk Kazakh; khm km Khmer; kor ko Korean;
kur ku Kurdish; kzj kzj Coastal Kadazan; lat la Latin; lfn lfn Lingua Franca Nova;
lit lt Lithuanian; lvs lv Latvian; mal ml Malayalam; mar mr Marathi;
max max North Moluccan Malay; mhr mhr Meadow Mari; mkd mk Macedonian; mon mn Mongolian;
nds nds Low German; nld nl Dutch; nno nn Norwegian Nynorsk; nob nb Norwegian Bokmål;
nov nov Novial; oci oc Occitan; orv orv Old East Slavic; pam pam Kapampangan; pes fa Persian;
pms pms Piedmontese; pol pl Polish; por pt Portuguese; ron ro Romanian; rus ru Russian;
slk sk Slovak; slv sl Slovenian; spa es Spanish; sqi sq Albanian; srp sr Serbian; swe sv Swedish;
swg swg Swabian; swh sw Swahili; tam ta Tamil; tat tt Tatar; tel te Telugu; tgl tl Tagalog;
tha th Thai; tuk tk Turkmen; tur tr Turkish; tzl tzl Talossan; uig ug Uyghur; ukr uk Ukrainian;
urd ur Urdu; uzb uz Uzbek; vie vi Vietnamese; war war Waray; wuu wuu Wu Chinese; xho xh Xhosa;
yid yi Yiddish; yue yue Cantonese; zsm ms Malay
"""
_ROWS = [row.split(maxsplit=2) for row in _TABLE.split(";")]
TAGS = {code: tag for code, tag, _ in _ROWS}
NAMES = {code: name for code, _, name in _ROWS}


def conversations(path: str, **about: str) -> Iterator[Conversation | Dropped]:
    """The pairs of ``tatoeba.XXX-eng.eng`` and the file of XXX beside it.

    Raises InputError where the name is not of this form or the language unknown, or where the two
    files have not the same number of lines.
    """
    match = re.fullmatch(r"tatoeba\.([a-z]{3})-eng\.eng", os.path.basename(path))
    if not match or (code := match[1]) not in TAGS:
        raise InputError(f"{path}: the name must be tatoeba.XXX-eng.eng with a known language XXX")
    other = path.removesuffix("eng") + code
    pairs = itertools.zip_longest(read_lines(path), read_lines(other))
    for number, (english, foreign) in enumerate(pairs, 1):
        where = f"{os.path.basename(other)}:{number}"
        if english is None or foreign is None:
            raise InputError(f"{path}: not as many lines as {other}: one ends before line {number}")
        if not english.strip() or not foreign.strip():
            yield Dropped(where, "empty turn", "a sentence of the pair is empty")
            continue
        if number % 2:
            lang, task = "en", (f"from {NAMES[code]} into English:\n{foreign}", english)
        else:
            lang, task = TAGS[code], (f"from English into {NAMES[code]}:\n{english}", foreign)
        user = Message("user", f"Translate this sentence {task[0]}")
        answer = Message("assistant", task[1])
        yield Conversation(messages=(user, answer), id=where, lang=lang, **about)
