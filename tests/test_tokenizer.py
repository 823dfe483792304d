"""Tokens and loss masks: exact spans in every script, one text for training, serving and jinja."""

import dataclasses
import functools
import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipelines.tokenizers import train_bpe, train_sentencepiece
from llmzoo_jax.conversation import (
    FORMATS,
    Conversation,
    ConversationError,
    Message,
    chat_template,
    render,
    write_jsonl,
)
from llmzoo_jax.tokenizer import (
    Example,
    encode,
    encode_prompt,
    fingerprint,
    load_tokenizer,
    resolve_format,
    save_tokenizer,
    show,
)
from tests.test_conversation import conversations

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, 1234 times.\n\n  Indented line;\ttab.",
    "敏捷的棕色狐狸跳过了懒狗。你好，世界！今天天气怎么样？",
    "素早い茶色の狐がのろまな犬を飛び越える。",
    "다람쥐 헌 쳇바퀴에 타고파. 안녕하세요?",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Victor jagt zwölf Boxkämpfer quer über den großen Sylter Deich.",
    "👩‍👩‍👧‍👦 👍🏽 🇹🇭 e\u0301 \u200d zero\u200bwidth ﷽ 𠮷",
)
TEXTS = st.one_of(
    st.lists(st.sampled_from("".join(SENTENCES)), min_size=1, max_size=12).map("".join),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
).filter(lambda text: text.strip() and not re.search(r"</?s>|<unk>|<\|", text))


def conversation(*contents, system=None, **names):
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], content) for i, content in enumerate(contents)]
    start = [Message("system", system)] if system else []
    return Conversation(messages=(*start, *messages), **names)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    pairs = [(a, b) for a in SENTENCES for b in SENTENCES]
    write_jsonl(path, [conversation(a, b, id=str(i)) for i, (a, b) in enumerate(pairs)])
    return path


@pytest.fixture(scope="session")
def tokenizers(data, tmp_path_factory):
    """bpe: as BLOOM's. sentencepiece: as LLaMA's. Both know the tokens of every format."""
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(data, 700))
    made = {"bpe": train_bpe(data, 600), "sentencepiece": load_tokenizer(path)}
    for tokenizer in made.values():
        more = {t for f in FORMATS.values() for t in f.special_tokens} - {"<s>", "</s>"}
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in sorted(more)])
    return made


@pytest.fixture(scope="session", params=["bpe", "sentencepiece"])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


CASES = [(kind, name) for kind in ("bpe", "sentencepiece") for name in FORMATS]


# --- loading ------------------------------------------------------------------------------------


def test_a_sentencepiece_model_loads_from_its_path_and_from_a_folder_that_has_only_it(
    data, tmp_path
):
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(data, 700))
    for path in (tmp_path, str(tmp_path), tmp_path / "tokenizer.model"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
        assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id == 1
        assert tokenizer.eos_token_id == 2 and tokenizer.pad_token is None
        for text in SENTENCES:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_converted_model_gives_the_ids_of_the_sentencepiece_library(data):
    import sentencepiece

    model = train_sentencepiece(data, 900)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = _sentencepiece_tokenizer(model)

    def expected(text):  # LLaMA's: what stands between special tokens is a text of its own
        pieces = re.split("(<unk>|<s>|</s>)", text)
        ids = [[theirs.piece_to_id(p)] if i % 2 else theirs.encode(p) for i, p in enumerate(pieces)]
        return list(itertools.chain.from_iterable(ids))

    parts = st.one_of(
        TEXTS, st.sampled_from(["<s>", "</s>", "<unk>", "  ", "\n", "▁", "aaaa", "<0x41>"])
    )

    @settings(max_examples=400, deadline=None)
    @given(st.lists(parts, max_size=8).map("".join))
    def same(text):
        assert ours(text, add_special_tokens=False).input_ids == expected(text)

    same()
    for text in (*SENTENCES, "Assistant: <s>" + "</s>Human: <s>".join(SENTENCES)):
        assert ours(text, add_special_tokens=False).input_ids == expected(text)


def _sentencepiece_tokenizer(model):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model)
        return load_tokenizer(folder)


def test_a_saved_tokenizer_is_the_same_for_us_and_for_auto_tokenizer(tokenizer, tmp_path):
    chat_format = resolve_format("phoenix", tokenizer)
    save_tokenizer(tokenizer, tmp_path, chat_format=chat_format)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template is None
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == chat_template(chat_format) == theirs.chat_template
    for text in (*SENTENCES, "<s>" + "</s><s> ".join(SENTENCES)):
        expected = tokenizer(text).input_ids
        assert ours(text).input_ids == theirs(text).input_ids == expected
    assert fingerprint(ours, chat_format) == fingerprint(tokenizer, chat_format)


def test_a_tokenizer_that_cannot_be_loaded_says_what_was_looked_for(data, tmp_path):
    def fails(path, *says):
        with pytest.raises(ValueError) as error:
            load_tokenizer(path)
        assert all(word in str(error.value) for word in (str(path), *says)), str(error.value)

    fails(tmp_path / "none", "no folder or file", "tokenizer.json", "tokenizer.model")
    fails(tmp_path, "no tokenizer.json and no tokenizer.model", "it has nothing")
    (tmp_path / "vocab.txt").write_text("a")
    fails(tmp_path, "it has vocab.txt", "convert a slow tokenizer first")
    model = tmp_path / "tokenizer.model"
    model.write_text("IQ== 0\nIg== 1\n")  # Llama 3's form
    fails(model, "SentencePiece", "tokenizer.json")
    model.write_bytes(_train_other(model_type="unigram"))
    fails(model, "is no BPE model with byte fallback")
    model.write_bytes(_train_other(normalization_rule_name="nmt_nfkc"))
    fails(model, "normalises text (nmt_nfkc)")
    model.write_bytes(_train_other(bos_id=2, eos_id=1))
    fails(model, "begins with ['<unk>', '</s>', '<s>']")
    model.write_bytes(_train_other(user_defined_symbols=["<x>"]))
    fails(model, "user-defined")
    (tmp_path / "tokenizer.json").write_text("{")
    fails(tmp_path, "cannot read")


def _train_other(**options):
    import sentencepiece

    options = {
        "model_type": "bpe",
        "byte_fallback": True,
        "vocab_size": 300,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 4,
    } | options
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES[:1] * 9), model_writer=model, **options
    )
    return model.getvalue()


# --- formats on a tokenizer ---------------------------------------------------------------------


def test_bos_comes_first_where_the_tokenizer_puts_it_first(tokenizers):
    for name in FORMATS:
        assert resolve_format(name, tokenizers["bpe"]).begin == ""
        begin = resolve_format(name, tokenizers["sentencepiece"]).begin
        assert begin == ("" if name == "llama-2" else "<s>")  # llama-2 writes it itself


def test_an_unknown_format_suggests_one_and_a_missing_token_is_named(tokenizers, data):
    with pytest.raises(ValueError, match="unknown chat format 'phenix'; did you mean 'phoenix'"):
        resolve_format("phenix", tokenizers["bpe"])
    with pytest.raises(ValueError, match=r"There are phoenix, alpaca.*, tokenizer"):
        resolve_format("zzzz", tokenizers["bpe"])
    plain = train_bpe(data, 300)
    for name, token in (("chatml", "<|im_start|>"), ("llama-3", "<|start_header_id|>")):
        with pytest.raises(ValueError, match=f"{name}.*needs '{re.escape(token)}' as one token"):
            resolve_format(name, plain)
    with pytest.raises(ValueError, match="it has none; use one of phoenix"):
        resolve_format("tokenizer", plain)


def dicts(messages):
    return [{"role": m.role, "content": m.content} for m in messages]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_apply_chat_template_gives_the_same_text_and_the_same_ids(tokenizers, kind, name):
    tokenizer = tokenizers[kind]
    chat_format = resolve_format(name, tokenizer)
    apply = functools.partial(
        tokenizer.apply_chat_template, chat_template=chat_template(chat_format)
    )

    @settings(max_examples=40, deadline=None)
    @given(conversations(tools=chat_format.tool is not None))
    def same(conversation):
        messages = conversation.messages
        for history, prompt in ((messages, False), (messages[:-1], True)):
            text = "".join(s.text for s in render(history, chat_format, generation_prompt=prompt))
            theirs = apply(dicts(history), tokenize=False, add_generation_prompt=prompt)
            assert theirs == text

    same()
    for system in (None, "Sei still.", " \n'quoted' \\n {{ x }} {% if %} "):
        example = conversation(*SENTENCES, system=system)
        ours = encode(example, tokenizer=tokenizer, chat_format=chat_format).tokens.tolist()
        theirs = apply(dicts(example.messages), tokenize=True, return_dict=True).input_ids
        assert theirs == ours
        history = example.messages[:-1]
        ours = encode_prompt(history, tokenizer=tokenizer, chat_format=chat_format)
        theirs = apply(dicts(history), add_generation_prompt=True, return_dict=True).input_ids
        assert theirs == ours


def test_the_template_refuses_what_the_format_cannot_write(tokenizers):
    import jinja2

    tool = [Message("user", "x"), Message("assistant", "y"), Message("tool", "z")]
    odd = [Message("system", "s"), Message("assistant", "y")]
    for name, messages in (("phoenix", tool), ("llama-2", tool), ("llama-2", odd)):
        with pytest.raises(ConversationError, match="cannot write a turn of the"):
            render(messages, FORMATS[name])
        with pytest.raises(jinja2.TemplateError, match="cannot write a turn of the"):
            tokenizers["bpe"].apply_chat_template(
                dicts(messages), chat_template=chat_template(FORMATS[name])
            )


# --- the tokenizer's own template ---------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_checkpoints_own_template_gives_the_same_tokens_and_masks(tokenizers, kind, name):
    tokenizer = tokenizers[kind]
    ours = resolve_format(name, tokenizer)
    if name == "phoenix":  # a template cannot say that the end of its prompt is trained
        ours = dataclasses.replace(ours, trained=("", "</s>"))
    tokenizer.chat_template = chat_template(ours)
    try:
        own = resolve_format("tokenizer", tokenizer)
    finally:
        tokenizer.chat_template = None
    assert own.stop == ours.stop and chat_template(own) == chat_template(ours)
    example = conversation(*SENTENCES, system="Be kind.")
    example = dataclasses.replace(
        example,
        messages=tuple(
            dataclasses.replace(m, train=False) if m.content == SENTENCES[3] else m
            for m in example.messages
        ),
    )
    expected = encode(example, tokenizer=tokenizer, chat_format=ours)
    actual = encode(example, tokenizer=tokenizer, chat_format=own)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.loss_mask, expected.loss_mask)
    prompts = [
        encode_prompt(example.messages[:2], tokenizer=tokenizer, chat_format=f) for f in (ours, own)
    ]
    assert prompts[0] == prompts[1]


TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        # thinking is dropped from all answers but the last
        (
            TEMPLATE.replace(
                "m.content }}", "(m.content if loop.last or m.role == 'user' else '') }}"
            ),
            r"turn 2 \(assistant\): the tokenizer's chat template writes the text up to it diff",
        ),
        # the prompt opens a thought that the history does not have
        (
            TEMPLATE + "{% if add_generation_prompt %}<s>assistant: <think>{% endif %}",
            r"turn 2 \(assistant\): the tokenizer's chat template writes the prompt before it diff",
        ),
        (
            "{% if messages[2] %}{{ raise_exception('one turn!') }}{% endif %}" + TEMPLATE,
            "the tokenizer's chat template refuses: one turn!",
        ),
    ],
)
def test_a_template_that_rewrites_history_is_refused(tokenizers, template, says):
    tokenizer = tokenizers["bpe"]
    tokenizer.chat_template = template
    try:
        own = resolve_format("tokenizer", tokenizer)
    finally:
        tokenizer.chat_template = None
    with pytest.raises(ConversationError, match="^d:1: " + says):
        encode(conversation("a", "b", "c", "d"), tokenizer=tokenizer, chat_format=own, where="d:1")


def test_a_template_that_ends_no_answer_is_refused(tokenizers):
    tokenizer = tokenizers["bpe"]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    try:
        with pytest.raises(ValueError, match="writes nothing after an answer"):
            resolve_format("tokenizer", tokenizer)
    finally:
        tokenizer.chat_template = None


# --- encoding -----------------------------------------------------------------------------------


VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's names of the bytes
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = {chr(b): b for b in VISIBLE} | {chr(256 + i): b for i, b in enumerate(HIDDEN)}


def mask_by_bytes(tokenizer, kind, segments, tokens):
    """The loss mask, from the bytes that each token stands for, without offsets."""
    specials = "|".join(map(re.escape, tokenizer.added_tokens_encoder))
    text = "".join(s.text for s in segments)
    trained = [s.train for s in segments for _ in s.text]
    stream = []  # (byte, trained)
    for part in re.finditer(f"{specials}|(?:(?!{specials}).)+", text, re.DOTALL):
        characters = list(zip(part.group(), trained[slice(*part.span())], strict=True))
        if kind == "sentencepiece" and not re.fullmatch(specials, part.group()):
            characters.insert(0, (" ", characters[0][1]))  # LLaMA puts a space before each text
        stream += [(byte, train) for c, train in characters for byte in c.encode()]
    mask, at = [], 0
    for piece in tokenizer.convert_ids_to_tokens(tokens):
        if re.fullmatch(specials, piece):
            raw = piece.encode()
        elif kind == "bpe":
            raw = bytes(BYTES[c] for c in piece)
        elif byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            raw = bytes.fromhex(byte[1])
        else:
            raw = piece.replace("▁", " ").encode()
        part = stream[at : at + len(raw)]
        assert bytes(byte for byte, _ in part) == raw
        mask.append(any(train for _, train in part))
        at += len(raw)
    assert at == len(stream)
    return mask


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_token_is_trained_when_one_of_its_bytes_is(tokenizers, kind, name):
    tokenizer = tokenizers[kind]
    chat_format = resolve_format(name, tokenizer)

    def right(example):
        coded = encode(example, tokenizer=tokenizer, chat_format=chat_format)
        segments = render(example.messages, chat_format)
        expected = mask_by_bytes(tokenizer, kind, segments, coded.tokens)
        assert coded.loss_mask.tolist() == expected
        assert coded.tokens.dtype == np.int32 and coded.loss_mask.dtype == np.bool_

    @settings(max_examples=60, deadline=None)
    @given(st.lists(TEXTS.filter(lambda text: "▁" not in text), min_size=2, max_size=6))
    def always_right(contents):
        right(conversation(*contents[: len(contents) // 2 * 2]))

    always_right()
    right(conversation(*SENTENCES, *reversed(SENTENCES), system=SENTENCES[1]))
    right(conversation(*[f"  {s} \n " for s in SENTENCES]))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_tokens_before_every_answer_are_the_tokens_that_are_served(tokenizers, kind, name):
    tokenizer = tokenizers[kind]
    chat_format = resolve_format(name, tokenizer)
    messages = conversation(*SENTENCES, *reversed(SENTENCES), system=SENTENCES[4]).messages
    whole = encode(Conversation(messages=messages), tokenizer=tokenizer, chat_format=chat_format)
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            prompt = encode_prompt(messages[:turn], tokenizer=tokenizer, chat_format=chat_format)
            assert whole.tokens[: len(prompt)].tolist() == prompt
            # All that the model is to write from here is trained, up to what stops it.
            rest = tokenizer.convert_ids_to_tokens(whole.tokens[len(prompt) :])
            stop = len(prompt) + rest.index(chat_format.stop[0])
            assert whole.loss_mask[len(prompt) : stop + 1].all()
            assert not whole.loss_mask[stop + 1 : stop + 2].any()


def test_text_that_contains_a_special_token_is_refused_by_name(tokenizers):
    for tokenizer in tokenizers.values():
        chat_format = resolve_format("phoenix", tokenizer)
        call = functools.partial(encode, tokenizer=tokenizer, chat_format=chat_format)
        for token in ("</s>", "<s>", "<unk>", "<|im_end|>"):
            for turn, role in ((0, "system"), (1, "user"), (2, "assistant")):
                contents = ["sys", "hi", "hello"]
                contents[turn] = f"well{token}Assistant: "
                example = conversation(*contents[1:], system=contents[0], id="abc")
                says = rf"turn {turn + 1} \({role}\): the text contains '{re.escape(token)}'"
                with pytest.raises(ConversationError, match=f"^abc: {says}"):
                    call(example)
                with pytest.raises(ConversationError, match=f"^f.jsonl:3: {says}"):
                    call(example, where="f.jsonl:3")
                if role != "assistant":
                    with pytest.raises(ConversationError, match=f"^{says}"):
                        encode_prompt(
                            example.messages[:2], tokenizer=tokenizer, chat_format=chat_format
                        )
        call(conversation("a < b, <S> and </ s>", "fine"))  # none of these is a token


def words_tokenizer(unk=True, **names):
    """A tokenizer that knows the letters a-z and phoenix's special tokens, and no more."""
    letters = sorted({*"abcdefghijklmnopqrstuvwxyzACHT:.,'▁"})
    vocab = {c: i for i, c in enumerate([*(["<unk>"] if unk else []), *letters])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>" if unk else None, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    backend.add_special_tokens(["<s>", "</s>"])
    if unk:
        names |= {"unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **names
    )


@pytest.mark.parametrize("unk", [True, False])
def test_text_that_the_tokenizer_cannot_represent_is_refused_by_name(unk):
    tokenizer = words_tokenizer(unk)
    chat_format = resolve_format("phoenix", tokenizer)
    call = functools.partial(encode, tokenizer=tokenizer, chat_format=chat_format)
    call(conversation("plain words.", "more words"), where="x")
    lost = "é世" if unk else "é"
    says = f"^f:1: turn 3: the tokenizer cannot represent '{lost}'; remove it"
    with pytest.raises(ConversationError, match=says):
        call(conversation("a", "b", "caf é世  \n ", "d"), where="f:1")
    with pytest.raises(ConversationError, match=r"^turn 1: the tokenizer cannot represent 'Z'"):
        encode_prompt([Message("user", "Z")], tokenizer=tokenizer, chat_format=chat_format)


def test_a_byte_level_tokenizer_that_lacks_bytes_is_found_out(data):
    tokenizer = train_bpe(data, 400)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    missing = next(c for c, byte in BYTES.items() if byte == 0xBC)  # of "ü", the second byte
    merges = [m for m in state["model"]["merges"] if missing not in "".join(m)]
    vocab = [t for t in state["model"]["vocab"] if missing not in t]
    state["model"] |= {"vocab": {t: i for i, t in enumerate(vocab)}, "merges": merges}
    broken = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
    )
    chat_format = resolve_format("phoenix", broken)
    with pytest.raises(ConversationError, match=r"^turn 2: the tokenizer cannot represent 'ü'"):
        encode(conversation("a", "für"), tokenizer=broken, chat_format=chat_format)


def test_an_end_token_that_is_also_unk_is_not_taken_for_lost_text():
    tokenizer = words_tokenizer()
    tokenizer.unk_token = "</s>"  # as GPT-2's
    chat_format = resolve_format("phoenix", tokenizer)
    coded = encode(conversation("a", "b"), tokenizer=tokenizer, chat_format=chat_format)
    assert coded.tokens[-1] == tokenizer.eos_token_id and coded.loss_mask[-1]


def test_white_space_that_spans_leave_out_goes_with_the_token_after_it(data):
    tokenizer = train_bpe(data, 400)
    trimming = train_bpe(data, 400)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    example = conversation("  a  b ", "  x \n\n y ", " c", " d  ")
    for name in ("phoenix", "vicuna", "alpaca"):
        chat_format = resolve_format(name, tokenizer)
        expected = encode(example, tokenizer=tokenizer, chat_format=chat_format)
        actual = encode(example, tokenizer=trimming, chat_format=chat_format)
        np.testing.assert_array_equal(actual.tokens, expected.tokens)
        np.testing.assert_array_equal(actual.loss_mask, expected.loss_mask)


def test_malformed_messages_are_refused_with_their_place(tokenizers):
    tokenizer = tokenizers["bpe"]
    chat_format = resolve_format("phoenix", tokenizer)
    with pytest.raises(ConversationError, match=r"^f:9: turn 1 \(user\): the conversation ends"):
        encode(conversation("a"), tokenizer=tokenizer, chat_format=chat_format, where="f:9")
    with pytest.raises(ConversationError, match=r"^turn 2 \(assistant\): the last message"):
        encode_prompt(conversation("a", "b").messages, tokenizer=tokenizer, chat_format=chat_format)


# --- fingerprint --------------------------------------------------------------------------------


def test_the_fingerprint_is_the_same_in_another_process_and_after_calls(tokenizer, tmp_path):
    chat_format = resolve_format("llama-3", tokenizer)
    ours = fingerprint(tokenizer, chat_format)
    tokenizer("b c d", truncation=True, max_length=2)
    if tokenizer.pad_token:
        tokenizer(["a", "b c d"], padding="max_length", truncation=True, max_length=2)
    assert fingerprint(tokenizer, chat_format) == ours
    tokenizer("a")
    save_tokenizer(tokenizer, tmp_path, chat_format=chat_format)
    code = (
        "import sys; from llmzoo_jax.tokenizer import *; t = load_tokenizer(sys.argv[1]);"
        "print(fingerprint(t, resolve_format('llama-3', t)))"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == ours


def test_the_fingerprint_changes_with_any_part_of_the_tokenizer_or_the_format(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    phoenix = resolve_format("phoenix", tokenizer)
    base = tokenizer.backend_tokenizer.to_str()

    def changed(change):
        state = json.loads(base)
        change(state)
        backend = Tokenizer.from_str(json.dumps(state))
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    def swap(state):
        vocab = state["model"]["vocab"]
        vocab["e"], vocab["t"] = vocab["t"], vocab["e"]

    def token(state):
        state["added_tokens"].append(
            {"id": 5000, "content": "<new>", "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": False, "special": True}
        )

    changes = (
        lambda state: None,
        swap,
        token,
        lambda state: state["model"]["merges"].pop(),
        lambda state: state["model"]["merges"].reverse(),
        lambda state: state.update(normalizer=state["normalizer"]["normalizers"][1]),
        lambda state: state["model"].update(byte_fallback=False),
    )
    prints = [fingerprint(changed(change), phoenix) for change in changes]
    assert prints[0] == fingerprint(tokenizer, phoenix)
    formats = [resolve_format(name, tokenizer) for name in FORMATS]
    formats += [dataclasses.replace(phoenix, begin=""), dataclasses.replace(phoenix, strip=True)]
    formats += [dataclasses.replace(phoenix, trained=("", "</s>"))]
    prints += [fingerprint(tokenizer, f) for f in formats if f != phoenix]
    assert len(set(prints)) == len(prints)


# --- looking ------------------------------------------------------------------------------------


def test_show_marks_the_trained_text_in_whole_characters(tokenizer):
    chat_format = dataclasses.replace(FORMATS["chatml"], strip=True)
    example = conversation(*SENTENCES)
    coded = encode(example, tokenizer=tokenizer, chat_format=chat_format)
    shown = show(coded, tokenizer=tokenizer, color=False)
    segments = render(example.messages, chat_format)
    expected = "".join(f"⟦{s.text}⟧" if s.train else s.text for s in segments).replace("⟧⟦", "")
    space = " ?" if "▁" in tokenizer.get_vocab() else ""  # LLaMA's, after a special token

    def loose(text):
        return re.sub(rf"(⟦|⟧|<\|im_\w+\|>){space}", r"\1", text)

    assert loose(shown) == loose(expected)
    colored = show(coded, tokenizer=tokenizer)
    assert colored.count("\033[32m") == expected.count("⟦")
    assert re.sub("\033\\[[0-9]+m", "", colored) == re.sub("[⟦⟧]", "", shown)
    assert colored.endswith("\033[0m")
    empty = Example(np.zeros(0, np.int32), np.zeros(0, np.bool_))
    assert show(empty, tokenizer=tokenizer) == ""


# --- training a tokenizer -----------------------------------------------------------------------


def run(*flags):
    command = [sys.executable, "-m", "data_pipelines.tokenizers", *flags]
    root = Path(__file__).parent.parent
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def test_a_trained_tokenizer_is_blooms_or_llamas_and_the_same_bytes_each_time(data, tmp_path):
    for kind, size in (("bpe", 500), ("sentencepiece", 700)):
        out = tmp_path / kind
        flags = (f"--data={data}", f"--out={out}", f"--kind={kind}", f"--vocab_size={size}")
        done = run(*flags)
        assert done.returncode == 0 and f"{size} tokens ({kind})" in done.stdout, done.stderr
        files = {path.name: path.read_bytes() for path in out.iterdir()}
        assert run(*flags).returncode == 0
        assert {path.name: path.read_bytes() for path in out.iterdir()} == files
        other = "sentencepiece" if kind == "bpe" else "bpe"
        done = run(*flags[:2], f"--kind={other}")
        assert done.returncode == 1 and "is a tokenizer of another kind" in done.stderr
    assert sorted(files) == ["tokenizer.model"]


def test_a_trained_bpe_has_blooms_tokens_loses_nothing_and_knows_the_format(data):
    tokenizer = train_bpe(data, 800)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<unk>", "<s>", "</s>", "<pad>"]
    assert tokenizer.pad_token_id == 3 and tokenizer("x").input_ids[0] != 1

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def round_trip(text):
        ids = tokenizer(text).input_ids
        assert 0 not in ids or "<unk>" in text
        assert tokenizer.decode(ids) == text

    round_trip()
    for words in (" artificial", " intelligence", "Human", "Assistant"):
        assert len(tokenizer(words).input_ids) == 1


def test_a_tokenizer_that_cannot_be_trained_says_why(data, tmp_path):
    with pytest.raises(ConversationError, match=r"none\.jsonl"):
        train_bpe(tmp_path / "none.jsonl", 500)
    with pytest.raises(ValueError, match=r"--vocab_size=100: .*260"):
        train_bpe(data, 100)
    with pytest.raises(ValueError, match=r"99999 does not fit .*train\.jsonl"):
        train_sentencepiece(data, 99999)
    for size in (264, 330):  # hardly a character: the rest are bytes
        tokenizer = _sentencepiece_tokenizer(train_sentencepiece(data, size))
        assert tokenizer.decode(tokenizer(SENTENCES[2]).input_ids, True) == SENTENCES[2]
    done = run(f"--data={tmp_path / 'none.jsonl'}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
