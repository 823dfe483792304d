"""Log-likelihoods and bits per byte are those of transformers, however they are batched."""

import json
import math

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import llmzoo_jax
from eval import perplexity
from eval.likelihood import bucket, likelihoods, longest, prefix_token, windows
from eval.perplexity import Text, measure, read_texts
from llmzoo_jax.errors import InputError
from llmzoo_jax.export import export
from tests.tiny_runs import make_run
from tests.tiny_tokenizers import SENTENCES

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def pair(request, tmp_path_factory):
    """Our model and transformers', of one exported folder."""
    run = make_run(tmp_path_factory.mktemp(request.param), request.param)
    folder = tmp_path_factory.mktemp("exports") / "export"
    export(run, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return llmzoo_jax.load(folder), theirs


def direct(theirs, context, continuation):
    with torch.no_grad():
        ids = torch.tensor([[*context, *continuation]])
        logprobs = theirs(ids[:, :-1]).logits.double().log_softmax(-1)[0]
    tail = logprobs[len(context) - 1 :]
    wanted = torch.tensor(continuation)
    return float(tail.gather(1, wanted[:, None]).sum()), bool((tail.argmax(-1) == wanted).all())


def test_likelihoods_are_those_of_transformers(pair):
    model, theirs = pair
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(5, 600, n).tolist()  # noqa: E731
    requests = [(draw(a), draw(b)) for a, b in ((1, 1), (1, 40), (30, 3), (5, 12), (33, 1))]
    shared = draw(9)
    requests += [(shared, [7]), (shared, [8]), (shared, [8, 9])]  # choices of a question
    greedy = direct(theirs, shared, [7])
    with torch.no_grad():
        best = int(theirs(torch.tensor([shared])).logits[0, -1].argmax())
    requests.append((shared, [best]))
    done = []
    found = likelihoods(model, requests, batch_size=3, max_length=512, on_done=done.append)
    for one, (context, continuation) in zip(found, requests, strict=True):
        logprob, is_greedy = direct(theirs, context, continuation)
        assert one.logprob == pytest.approx(logprob, abs=1e-3) and one.greedy == is_greedy
    assert found[-1].greedy and not greedy[1] and sum(done) == len(requests)
    assert likelihoods(model, requests[::-1], batch_size=4, max_length=512)[::-1] == [
        pytest.approx(one, abs=2e-4) for one in found
    ]


def test_a_context_that_is_too_long_loses_its_beginning(pair):
    model, theirs = pair
    context, continuation = list(range(10, 60)), [70, 71, 72]
    (one,) = likelihoods(model, [(context, continuation)], batch_size=2, max_length=20)
    assert one.logprob == pytest.approx(direct(theirs, context[-18:], continuation)[0], abs=1e-3)
    with pytest.raises(InputError, match="request 1: 0 tokens of context"):
        likelihoods(model, [([], [1])], batch_size=1, max_length=20)
    with pytest.raises(InputError, match="30 to score"):
        likelihoods(model, [([1], [1] * 30)], batch_size=1, max_length=20)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 40])
def test_windows_score_each_token_once_with_as_much_context_as_fits(length):
    tokens = list(range(100, 100 + length))
    pieces = list(windows(tokens, 1, 8))
    assert [t for _, piece in pieces for t in piece] == tokens
    assert pieces[0][0] == [1]
    for (context, piece), (_, before) in zip(pieces[1:], pieces[:-1], strict=True):
        assert len(context) + len(piece) == 9 and context[-1] == before[-1]


def test_buckets_are_few_and_waste_at_most_an_eighth():
    assert [bucket(n) for n in (1, 32, 33, 100, 257, 1000)] == [32, 32, 64, 128, 320, 1024]
    assert all(n <= bucket(n) <= max(n * 1.25, n + 32) for n in range(1, 5000))


# --- bits per byte ------------------------------------------------------------------------------


def bits(model, theirs, texts):
    """Directly, text by text."""
    nats = size = 0.0
    for text in texts:
        ids = model.tokenizer(text, add_special_tokens=False).input_ids
        nats -= direct(theirs, [prefix_token(model)], ids)[0]
        size += len(text.encode())
    return nats / size / math.log(2)


def test_bits_per_byte_are_those_of_transformers(pair):
    model, theirs = pair
    texts = [Text("en", text) for text in SENTENCES[:3]] + [Text("ru", SENTENCES[7])]
    found = {one.lang: one for one in measure(model, texts, batch_size=2)}
    assert found["en"].bits_per_byte == pytest.approx(bits(model, theirs, SENTENCES[:3]), abs=1e-4)
    assert found["ru"].bits_per_byte == pytest.approx(bits(model, theirs, SENTENCES[7:8]), abs=1e-4)
    assert found["en"].low <= found["en"].bits_per_byte <= found["en"].high
    assert (found["en"].texts, found["ru"].bytes) == (3, len(SENTENCES[7].encode()))
    assert found["ru"].perplexity == pytest.approx(
        2 ** (found["ru"].bits_per_byte * found["ru"].bytes / found["ru"].tokens)
    )


def test_bits_per_byte_on_real_texts_are_those_of_transformers(pair, shared_data):
    model, theirs = pair
    tatoeba = shared_data / "tatoeba/data/tatoeba/v1"
    files = [tatoeba / "tatoeba.swh-eng.swh", tatoeba / "tatoeba.ara-eng.ara",
             shared_data / "mgsm/mgsm/mgsm_th.tsv"]  # fmt: skip
    texts = [text for file in files for text in list(read_texts(str(file)))[:4]]
    assert {text.lang for text in texts} == {"sw", "ar", "th"}
    for one in measure(model, texts, batch_size=4):
        own = [text.text for text in texts if text.lang == one.lang]
        assert one.bits_per_byte == pytest.approx(bits(model, theirs, own), abs=1e-4)


def test_a_long_text_is_scored_in_pieces(pair):
    model, theirs = pair
    text = " ".join(SENTENCES[:4])
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    (one,) = measure(model, [Text("en", text)], batch_size=2, max_length=16)
    nats = sum(direct(theirs, *piece)[0] for piece in windows(ids, prefix_token(model), 16))
    assert len(ids) > 40
    assert one.bits_per_byte == pytest.approx(-nats / len(text.encode()) / math.log(2), abs=1e-4)


def test_the_length_is_the_models_own(pair):
    model, _ = pair
    assert longest(model) == (512 if model.context else 2048)


def test_texts_are_read_from_any_file(tmp_path):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "lang": "fr"}  # fmt: skip
    (tmp_path / "x.jsonl").write_text(json.dumps(chat) + "\n" + json.dumps({"text": "c"}) + "\n")
    (tmp_path / "mgsm_sw.tsv").write_text("moja\t1\nmbili\t2\n")
    (tmp_path / "de.txt").write_text("eins\n\nzwei\n")
    read = lambda name, **lang: [tuple(vars(t).values()) for t in  # noqa: E731
                                 read_texts(str(tmp_path / name), **lang)]  # fmt: skip
    assert read("x.jsonl", lang="en") == [("fr", "a\n\nb"), ("en", "c")]
    assert read("mgsm_sw.tsv") == [("sw", "moja"), ("sw", "mbili")]
    assert read("de.txt") == [("de", "eins"), ("de", "zwei")]
    (tmp_path / "x.jsonl").write_text('{"text": "c"}\n{"no": 1}\n')
    with pytest.raises(InputError, match=r"x.jsonl:2: no text"):
        read("x.jsonl")
    assert "bits/byte" in perplexity.table([])
