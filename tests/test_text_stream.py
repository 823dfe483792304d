"""Streams of text: whole characters only, in any script, and no stop string."""

import itertools
import random
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmzoo_jax.byte_tokens import byte_alphabet
from llmzoo_jax.text_stream import TextStream
from tests.tiny_tokenizers import KINDS, SENTENCES, tiny

SCRIPTS = {
    "Latin": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Vietnamese": "Tất cả mọi người sinh ra đều được tự do và bình đẳng.",
    "Cyrillic": "Все люди рождаются свободными и равными в своём достоинстве.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι.",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "Persian": "تمام افراد بشر آزاد به دنیا می‌آیند.",
    "Hebrew": "כל בני האדם נולדו בני חורין ושווים בערכם.",
    "Devanagari": "सभी मनुष्य जन्म से स्वतंत्र और मर्यादा में समान हैं।",
    "Bengali": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা নিয়ে জন্মগ্রহণ করে।",
    "Tamil": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "Telugu": "మానవులందరు స్వతంత్రంగా జన్మించారు.",
    "Kannada": "ಎಲ್ಲಾ ಮಾನವರು ಸ್ವತಂತ್ರರಾಗಿಯೇ ಜನಿಸಿದ್ದಾರೆ.",
    "Malayalam": "മനുഷ്യരെല്ലാവരും തുല്യാവകാശങ്ങളോടെ ജനിച്ചവരാണ്.",
    "Gujarati": "પ્રતિષ્ઠા અને અધિકારોની દૃષ્ટિએ સર્વ માનવો સમાન છે.",
    "Gurmukhi": "ਸਾਰਾ ਮਨੁੱਖੀ ਪਰਿਵਾਰ ਆਪਣੀ ਮਹਿਮਾ ਨਾਲ ਜੰਮਦਾ ਹੈ।",
    "Sinhala": "සියලු මනුෂ්‍යයෝ නිදහස්ව උපත ලබා ඇත.",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน",
    "Lao": "ມະນຸດເກີດມາມີສິດເສລີພາບ ແລະສະເໝີໜ້າກັນ",
    "Khmer": "មនុស្សទាំងអស់កើតមកមានសេរីភាព។",
    "Burmese": "လူတိုင်းသည် တူညီလွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် မွေးဖွားသည်။",
    "Tibetan": "འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་རང་དབང་ཡོད།",
    "Georgian": "ყველა ადამიანი იბადება თავისუფალი.",
    "Armenian": "Բոլոր մարդիկ ծնվում են ազատ ու հավասար։",
    "Amharic": "የሰው ልጅ ሁሉ ሲወለድ ነጻ ነው።",
    "Han": "人人生而自由，在尊严和权利上一律平等。𠮷野家",
    "Japanese": "すべての人間は、生まれながらにして自由である。ｶﾀｶﾅ",
    "Hangul": "모든 인간은 태어날 때부터 자유롭다. 각",
    "Mongolian": "ᠬᠦᠮᠦᠨ ᠪᠦᠷ ᠲᠥᠷᠥᠵᠦ",
    "Cherokee": "ᏂᎦᏓ ᎠᏂᏴᏫ ᏂᎨᎫᏓᎸᎾ",
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🇹🇭🇫🇷 🏳️‍🌈 1️⃣ ❤️‍🔥 e\u0301 a\u200db",
}  # fmt: skip


def tokens_of(kind: str, text: str, *, bytewise: bool = False) -> list[int]:
    tokenizer = tiny(kind)
    if not bytewise:
        return tokenizer(text, add_special_tokens=False).input_ids
    if kind == "sentencepiece":
        return [tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in text.encode()]
    names = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return tokenizer.convert_tokens_to_ids([c for name, _ in names for c in name])


def run(stream: TextStream, tokens: list[int], sizes, *, whole: bool = True) -> list[str]:
    """The pieces of a text whose tokens come so many at a time."""
    pieces, at = [], 0
    for size in itertools.cycle(sizes):
        if at >= len(tokens):
            break
        pieces.append(stream.feed(tokens[at : at + size]))
        at += size
    return [*pieces, stream.finish(whole=whole)]


@pytest.mark.parametrize("bytewise", (False, True), ids=("tokens", "bytes"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_pieces_join_to_the_text_in_every_script(script, kind, bytewise):
    text = SCRIPTS[script]
    tokens = tokens_of(kind, text, bytewise=bytewise)
    assert not bytewise or len(tokens) == len(text.encode())
    for sizes in ([1], [2, 3, 1], [len(tokens)]):
        stream = TextStream(tiny(kind))
        pieces = run(stream, tokens, sizes)
        assert "".join(pieces) == stream.text == text == tiny(kind).decode(tokens)
        assert not any("\ufffd" in piece for piece in pieces)
    prefix = TextStream(tiny(kind))  # every piece is shown as soon as its characters are whole
    for n, token in enumerate(tokens, 1):
        prefix.feed([token])
        if bytewise:
            assert prefix.text == text.encode()[:n].decode("utf-8", "ignore")
        elif kind == "bpe":  # the other reads all bytes of a row as \ufffd if one is missing
            assert prefix.text == tiny(kind).decode(tokens[:n]).rstrip("\ufffd")


TEXTS = st.lists(
    st.sampled_from([*SENTENCES, *SCRIPTS.values(), "a", " ", "  b", "\n", "中", "👍🏽"]),
    max_size=4,
)
SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(TEXTS, SIZES, st.integers(0, 300), st.booleans(), st.booleans())
def test_stop_strings_never_leak(kind, texts, sizes, where, keep, bytewise):
    text = "x" + "".join(texts)
    tokens = tokens_of(kind, text, bytewise=bytewise)
    stop = text[where % len(text) :][:3]
    stream = TextStream(tiny(kind), (), ("never in it", stop), keep_stop=keep)
    pieces = run(stream, tokens, sizes)
    want = text.partition(stop)[0] + stop * keep
    assert "".join(pieces) == stream.text == want
    shown = "".join(itertools.accumulate(pieces))
    assert want.startswith(pieces[0]) and len(shown) >= len(want)
    assert stream.stopped_by == stop
    assert stop in tiny(kind).decode(tokens[: stream.count])
    assert stop not in tiny(kind).decode(tokens[: stream.count - 1])


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=30), SIZES)
@example(b"\xed\xa0", [1])
def test_bytes_that_are_no_text_read_as_the_tokenizer_reads_them(data, sizes):
    """Whatever the cut: a stream of broken bytes is neither held for ever nor read twice."""
    tokenizer = tiny("bpe")
    tokens = [tokenizer.convert_tokens_to_ids(c) for c in map(byte_alphabet().get, data)]
    stream = TextStream(tokenizer)
    shown = "".join(run(stream, tokens, sizes, whole=False))
    assert shown == data.decode("utf-8", "replace")[: len(shown)]
    assert tokenizer.decode(tokens).startswith(shown)
    # A part of a character at the end: one sign, or two where Python waits for a surrogate's third
    # byte, since UTF-8 has none of those.
    surrogate = data[-2:-1] == b"\xed" and 0xA0 <= data[-1] <= 0xBF
    assert len(tokenizer.decode(tokens)) - len(shown) <= 1 + surrogate


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_is_never_shown(kind):
    tokens = tokens_of(kind, "a ☃")
    assert len(tokens) > 3  # the snowman is bytes to both tokenizers
    stream = TextStream(tiny(kind))
    assert stream.feed(tokens[:-1]) + stream.finish(whole=False) == "a "
    broken = [tokens[-1]] * 9 + tokens + [tokens[-2]] * 9
    stream = TextStream(tiny(kind))
    shown = stream.feed(broken) + stream.finish(whole=False)
    assert shown.lstrip("\ufffd ").rstrip("\ufffd") == "a ☃"
    rest = TextStream(tiny(kind), tokens[:-1])  # a prompt that ends in the middle of one
    assert rest.feed(tokens[-1:]) == "☃"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_text_on_request_only(kind):
    tokenizer = tiny(kind)
    tokens = [*tokens_of(kind, "a"), tokenizer.convert_tokens_to_ids("</s>"), 10**6]
    assert TextStream(tokenizer).feed(tokens) == "a"
    assert TextStream(tokenizer, special=True).feed(tokens) == "a</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_keeps_the_space_that_a_text_would_lose(kind):
    tokens = tokens_of(kind, "one two")
    cut = next(n for n in range(1, len(tokens)) if tiny(kind).decode(tokens[:n]) == "one")
    assert TextStream(tiny(kind), tokens[:cut]).feed(tokens[cut:]) == " two"
    start = tiny(kind).convert_tokens_to_ids("<s>")
    assert TextStream(tiny(kind), [start]).feed(tokens) == "one two"


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_format_writes_around_an_answer_is_no_text(kind):
    tokens = tokens_of(kind, "\n\nyes. ")

    def shown(*, whole, after=" "):
        return run(TextStream(tiny(kind), (), (), "\n\n", after), tokens, [1], whole=whole)

    assert "".join(shown(whole=True)) == "yes."
    assert "".join(shown(whole=False)) == "yes. "
    assert not any(piece.endswith(" ") for piece in shown(whole=True))


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_wait_for_min_tokens(kind):
    tokens = tokens_of(kind, "a.b.c", bytewise=True)
    stream = TextStream(tiny(kind), (), (".",), min_tokens=2)
    assert "".join(run(stream, tokens, [1])) == "a.b"
    assert stream.count == 4


def test_of_several_stop_strings_the_first_in_the_text_ends_it():
    tokens = tokens_of("bpe", "one two three")
    stream = TextStream(tiny("bpe"), (), ("three", "two", "two three"))
    assert "".join(run(stream, tokens, [99])) == "one "
    assert stream.stopped_by == "two"


def test_a_long_text_costs_no_more_a_token_than_a_short_one():
    """Broken bytes, stop strings that almost come, and no spaces: all at their worst."""
    rng = random.Random(0)
    tokens = [rng.randrange(5, 300) for _ in range(40_000)]

    def seconds(count: int) -> float:
        stream = TextStream(tiny("bpe"), (), ("ab" * 50, "aa" * 50))
        start = time.thread_time()
        for i in range(0, count, 4):
            stream.feed(tokens[i : i + 4])
        return time.thread_time() - start

    seconds(100)
    short = min(seconds(4_000) for _ in range(3))
    assert seconds(40_000) < 40 * short  # 10 times the tokens; quadratic would be 100
