"""A request's tokens depend on nothing but the request; nothing leaks, nothing compiles late."""

import dataclasses
import functools
import queue
import random
import threading
import time

import jax
import numpy as np
import pytest

from llmzoo_jax import generate as decoding
from llmzoo_jax import sharding
from llmzoo_jax.errors import InputError
from llmzoo_jax.inference import Model
from serving.engine import Engine, EngineOptions
from serving.requests import Closed, Output, QueueFull, Request, Sampling
from tests import parity

BLOOM, LLAMA = parity.FAMILIES
SMALL = EngineOptions(
    max_batch=4, context=64, cache_tokens=160, page_size=8, prefill_tokens=16, window=4
)
LATE = dataclasses.replace(SMALL, compile_at="first_use")  # so a test compiles what it needs
OPTIONS = {
    "small": SMALL,  # too few pages for four long rows: some wait again
    "one page a prompt": dataclasses.replace(LATE, page_size=64, prefill_tokens=64, window=1,
                                             cache_tokens=0),
    "no shared prefixes": dataclasses.replace(LATE, prefix_cache=False, page_size=4, window=8),
    "speculative": dataclasses.replace(LATE, speculate=3, max_batch=2, cache_tokens=0),
    "deterministic": dataclasses.replace(LATE, deterministic=True, max_batch=3),
    "two devices": dataclasses.replace(LATE, speculate=3),
}  # fmt: skip


def model_of(case, dtype="float32", stop_ids=(), *, ways=1):
    config = parity.our_config(case)
    mesh = sharding.tensor_mesh(config, ways)
    params = decoding.prepare(_model(case), mesh)
    return Model(case, config, None, None, params, stop_ids, dtype, mesh)


@functools.cache
def _model(case):
    return parity.our_model(case)


@functools.cache
def engine_of(case, name="small", dtype="float32"):
    """Started once for all tests; it must be idle, and clean, after each."""
    ways = 2 if name == "two devices" else 1
    engine = Engine(model_of(case, dtype, ways=ways), OPTIONS[name])
    engine.start()
    return engine


@pytest.fixture(autouse=True)
def nothing_leaks():
    yield
    for key in ENGINES:
        engine = engine_of(*key)
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
        assert len(engine._slots) == engine.options.max_batch
        assert stats.compilations_after_ready == 0 or engine.options.compile_at == "first_use"


ENGINES: set[tuple] = set()
_ids = iter(range(10**9))


class Answer:
    """Collects what comes back."""

    def __init__(self):
        self.outputs: list[Output] = []
        self.ended = threading.Event()

    def __call__(self, output):
        assert not self.ended.is_set(), "something came after the end"
        self.outputs.append(output)
        if output.finish_reason is not None:
            self.ended.set()

    @property
    def tokens(self):
        assert self.ended.wait(60)
        return [token for output in self.outputs for token in output.tokens]

    @property
    def reason(self):
        assert self.ended.wait(60)
        return self.outputs[-1].finish_reason

    @property
    def logprobs(self):
        assert self.ended.wait(60)
        return [x for output in self.outputs for x in output.logprobs or []]


def ask(engine, prompt, *, grammar=None, deadline=None, adapter=None, **sampling):
    answer = Answer()
    options = {"temperature": 0.0, "max_tokens": 12} | sampling
    request = Request(
        id=str(next(_ids)), prompt=prompt, sampling=Sampling(**options), grammar=grammar,
        deadline=deadline, adapter=adapter,
    )  # fmt: skip
    answer.id = request.id
    engine.submit(request, answer)
    return answer


def use(case, name="small", dtype="float32"):
    ENGINES.add((case, name, dtype))
    return engine_of(case, name, dtype)


def prompts(n, seed=0, longest=40):
    rng = random.Random(seed)
    return [[rng.randrange(80) for _ in range(rng.randrange(1, longest))] for _ in range(n)]


# --- the same tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [BLOOM, LLAMA])
def test_greedy_tokens_equal_transformers_generate(case, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = parity.to_torch(tmp_path, parity.our_config(case), parity.our_model(case))
    theirs.generation_config.eos_token_id = None
    asked = prompts(12)
    answers = [ask(use(case), prompt, max_tokens=20) for prompt in asked]
    for prompt, answer in zip(asked, answers, strict=True):
        ids = torch.tensor([prompt])
        want = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        assert answer.tokens == want[0, len(prompt) :].tolist()


def kinds(seed, n=24):
    """Requests of all kinds, long and short, some with the same beginning."""
    rng = random.Random(seed)
    starts = [[rng.randrange(80) for _ in range(30)] for _ in range(3)]
    for i in range(n):
        start = rng.choice(starts)[: rng.randrange(31)]
        prompt = [*start, *(rng.randrange(80) for _ in range(rng.randrange(1, 15)))]
        sampling = {"max_tokens": rng.randrange(1, 64 - len(prompt) + 1)}
        if i % 3:
            sampling |= {"temperature": rng.choice([0.5, 1.0, 2.0]), "seed": rng.randrange(2**32)}
        if i % 4 == 1:
            sampling |= {"top_k": rng.randrange(1, 40), "top_p": rng.uniform(0.3, 1.0)}
        if i % 5 == 2:
            sampling |= {"repetition_penalty": 1.3, "frequency_penalty": 0.4}
        if i % 7 == 3:
            sampling |= {"logit_bias": {rng.randrange(80): 3.0}, "min_p": 0.05}
        if i % 6 == 4:
            sampling |= {"logprobs": 3}
        yield prompt, sampling


@functools.cache
def alone(case, seed=0):
    """The answers of ``kinds``, each asked alone of one engine."""
    found = []
    for prompt, sampling in kinds(seed):
        found.append(ask(use(case), prompt, **sampling).tokens)
    return found


QUICK = {(BLOOM, "small"), (LLAMA, "small"), (LLAMA, "deterministic"), (LLAMA, "two devices")}
ENGINES_OF_ALL_KINDS = [
    pytest.param(case, name, marks=() if (case, name) in QUICK else pytest.mark.slow)
    for case in (BLOOM, LLAMA)
    for name in OPTIONS
    if (case, name) != (BLOOM, "two devices")  # seven heads
]


@pytest.mark.parametrize(("case", "name"), ENGINES_OF_ALL_KINDS)
def test_tokens_are_the_same_among_any_others_whatever_the_engine(case, name):
    """250 requests an engine, in any order, a fifth of them aborted at any time."""
    engine, want, asked = use(case, name), alone(case), list(kinds(0))
    rng = random.Random(name)
    answers = []
    for n in range(250):
        i = rng.randrange(len(asked))
        prompt, sampling = asked[i]
        answer = ask(engine, prompt, **sampling)
        answers.append((i, answer))
        if rng.random() < 0.2:
            delay = rng.choice([0, 0, 0.002, 0.01])
            threading.Timer(delay, engine.abort, [answer.id]).start()
        if n % 40 == 39:
            answers[-1][1].ended.wait(60)
    whole = 0
    for i, answer in answers:
        if answer.reason == "abort":
            assert answer.tokens == want[i][: len(answer.tokens)]
        else:
            assert answer.tokens == want[i]
            whole += 1
    assert whole > 180
    if name == "small":
        assert engine.stats().preemptions > 0
        assert engine.stats().cached_tokens > 0
    if name == "speculative":
        assert 0 < engine.stats().right_tokens < engine.stats().guessed_tokens


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("case", [BLOOM, LLAMA])
def test_thousands_of_requests_give_the_tokens_that_each_gives_alone(case, seed):
    engine, want, asked = use(case), alone(case, seed + 1), list(kinds(seed + 1))
    rng = random.Random(seed)
    answers = [(i, ask(engine, asked[i][0], **asked[i][1]))
               for i in (rng.randrange(len(asked)) for _ in range(250))]  # fmt: skip
    assert all(answer.tokens == want[i] for i, answer in answers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_logits_are_the_same_to_the_last_bit(dtype):
    engine = use(LLAMA, "deterministic", dtype)
    asked = prompts(12, seed=5)
    apart = [ask(engine, prompt, logprobs=5).logprobs for prompt in asked]
    answers = [ask(engine, prompt, logprobs=5) for prompt in reversed(asked)]
    assert [answer.logprobs for answer in answers][::-1] == apart


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_logits_do_not_depend_on_what_the_cache_has(dtype):
    """What was decoded goes on, in a second turn; and rows that would be too long for the pages."""
    engine = use(LLAMA, "deterministic", dtype)

    def logprobs(asked, **options):
        return [answer.logprobs for answer in [ask(engine, one, **options) for one in asked]]

    firsts = prompts(6, seed=6, longest=20)
    answers = [ask(engine, prompt) for prompt in firsts]
    seconds = [p + answer.tokens + [3, 4] for p, answer in zip(firsts, answers, strict=True)]
    cached = logprobs(seconds, logprobs=5, max_tokens=20)
    engine.pool.forget()
    assert logprobs(seconds, logprobs=5, max_tokens=20) == cached
    long = {"logprobs": 1, "max_tokens": 44}
    assert logprobs(firsts, **long) == [logprobs([one], **long)[0] for one in firsts]
    assert engine.stats().preemptions == 0


def test_what_goes_on_from_an_end_fills_no_page(monkeypatch):
    engine, filled = use(LLAMA), []
    prompt = prompts(1, seed=21)[0] + [5, 6, 7]
    prompt = prompt[: len(prompt) // 8 * 8 - 3]  # within a page
    want = ask(engine, prompt, max_tokens=9).tokens
    fill = engine._runner.fill
    monkeypatch.setattr(engine._runner, "fill", lambda *x: filled.append(x) or fill(*x))
    one = ask(engine, prompt, max_tokens=1)
    assert one.tokens == want[:1]
    before = len(filled)
    rest = [ask(engine, prompt + want[:1], max_tokens=8) for _ in range(2)]
    assert [answer.tokens for answer in rest] == [want[1:]] * 2
    assert [answer.outputs[0].cached_tokens for answer in rest] == [len(prompt)] * 2
    assert len(filled) == before


# --- what a request can ask for -----------------------------------------------------------------


def test_logprobs_are_those_of_the_model():
    engine = use(LLAMA)
    prompt = prompts(1, seed=3)[0] + [1, 2, 3]
    answer = ask(engine, prompt, logprobs=4, prompt_logprobs=2, temperature=1.0, top_k=2, seed=3)
    whole = prompt + answer.tokens
    logits = engine.model.logits([whole])[0].astype(np.float64)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    first = answer.outputs[0]
    assert first.prompt_logprobs[0] is None
    rows = [*first.prompt_logprobs[1:], *answer.logprobs]
    for place, row in enumerate(rows, 1):
        n = 2 if place < len(prompt) else 4
        assert abs(row.logprob - want[place - 1, whole[place]]) < 1e-4
        assert [i for i, _ in row.top] == np.argsort(-want[place - 1])[:n].tolist()
        np.testing.assert_allclose(
            [x for _, x in row.top], -np.sort(-want[place - 1])[:n], atol=1e-4
        )


def test_a_prompt_can_be_scored_without_an_answer():
    answer = ask(use(LLAMA), [1, 2, 3, 4], max_tokens=0, prompt_logprobs=0)
    assert answer.tokens == []
    assert answer.reason == "length"
    assert len(answer.outputs[0].prompt_logprobs) == 4


def test_penalties_act_on_what_was_said(tmp_path):
    torch = pytest.importorskip("torch")
    engine = use(LLAMA)
    prompt = prompts(1, seed=11)[0]
    theirs = parity.to_torch(tmp_path, parity.our_config(LLAMA), parity.our_model(LLAMA))
    theirs.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    want = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
        pad_token_id=0, repetition_penalty=1.4,
    )[0, len(prompt) :].tolist()  # fmt: skip
    assert ask(engine, prompt, max_tokens=20, repetition_penalty=1.4).tokens == want
    plain = ask(engine, prompt, max_tokens=40 - len(prompt) % 8).tokens
    varied = ask(engine, prompt, max_tokens=len(plain), frequency_penalty=2.0, presence_penalty=2.0)
    assert len(set(varied.tokens)) > len(set(plain))


def test_bias_min_tokens_stop_ids_and_loops():
    engine = use(LLAMA)
    prompt = prompts(1, seed=2)[0]
    plain = ask(engine, prompt).tokens
    assert set(ask(engine, prompt, logit_bias={7: 100.0}).tokens) == {7}
    assert plain[0] not in ask(engine, prompt, logit_bias={plain[0]: -1e9}).tokens
    stopped = ask(engine, prompt, stop_token_ids=(plain[3],))
    assert stopped.tokens == plain[: plain.index(plain[3])]
    assert (stopped.reason, stopped.outputs[-1].stop_token) == ("stop", plain[3])
    later = ask(engine, prompt, stop_token_ids=(plain[3],), min_tokens=8)
    assert len(later.tokens) >= 8
    looping = ask(engine, prompt, logit_bias={7: 100.0}, repetition_stop=4)
    assert (looping.tokens, looping.reason) == ([7] * 4, "repetition")


@pytest.mark.parametrize(
    ("case", "name"), [(BLOOM, "small"), (BLOOM, "speculative"), (LLAMA, "two devices")]
)
def test_an_engine_that_starts_again_traces_nothing_and_says_the_same(case, name, monkeypatch):
    assert jax.config.jax_compilation_cache_dir  # so programs are kept

    def said():
        ways = 2 if name == "two devices" else 1
        engine = Engine(model_of(case, ways=ways), OPTIONS[name])
        engine.start()
        prompts = [[5, 6, 7], list(range(40)), [5, 6, 7] * 9]
        greedy = [ask(engine, prompt).tokens for prompt in prompts]
        drawn = [ask(engine, prompt, temperature=1.0, seed=3).tokens for prompt in prompts]
        engine.close()
        return greedy, drawn

    first = said()

    def lower(*_, **__):
        raise AssertionError("it was traced")

    monkeypatch.setattr("serving.programs.lower", lower)
    assert said() == first


def test_a_grammar_masks_every_step():
    class EvenThenOdd:
        def __init__(self):
            self.taken = []

        def mask(self):
            parity_ = len(self.taken) % 2
            bits = sum(1 << i for i in range(parity_, 32, 2))
            words = np.full(-(-parity.our_config(LLAMA).vocab_size // 32), bits, np.uint32)
            return words.view(np.int32)

        def advance(self, token):
            self.taken.append(token)

    grammar = EvenThenOdd()
    free = ask(use(LLAMA), [5, 6, 7], temperature=1.0, seed=4)  # at the same time
    answer = ask(use(LLAMA), [1, 2, 3], grammar=grammar, temperature=1.5)
    assert [token % 2 for token in answer.tokens] == [0, 1] * 6
    assert grammar.taken == answer.tokens
    assert free.tokens == ask(use(LLAMA), [5, 6, 7], temperature=1.0, seed=4).tokens


def test_a_repeated_prompt_is_in_the_cache():
    engine, prompt = use(BLOOM), list(range(40))
    first = ask(engine, prompt)
    assert first.tokens == ask(engine, prompt).tokens
    assert ask(engine, prompt).reason == "length"
    again = ask(engine, prompt)
    assert again.tokens == first.tokens
    assert again.outputs[0].cached_tokens == 32


def test_a_repeated_text_takes_fewer_steps_when_it_is_guessed(monkeypatch):
    engine = use(LLAMA, "speculative")
    taken = {"verify": [], "decode": []}  # tokens of each call

    def count(name, step):
        def counted(*args):
            window = step(*args)
            taken[name].append(int((window.tokens >= 0).sum()))
            return window

        monkeypatch.setattr(engine._runner, name, counted)

    for name in taken:
        count(name, getattr(engine._runner, name))
    before = engine.stats().right_tokens
    prompt = [5, 6, 7, 8] * 8
    answer = ask(engine, prompt, max_tokens=30, logprobs=0)
    assert answer.tokens == ask(use(LLAMA), prompt, max_tokens=30).tokens
    right = engine.stats().right_tokens - before
    assert sum(taken["verify"]) == right + len(taken["verify"])
    assert len(answer.tokens) == sum(taken["verify"]) + sum(taken["decode"])
    assert right > 8
    logits = engine.model.logits([prompt + answer.tokens])[0].astype(np.float64)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, row in enumerate(answer.logprobs):
        place = len(prompt) + i
        assert abs(row.logprob - want[place - 1, answer.tokens[i]]) < 1e-4


def test_int8_keys_and_values_are_close_to_exact_ones():
    engine = Engine(model_of(LLAMA), dataclasses.replace(SMALL, kv_dtype="int8", max_batch=1))
    engine.start()
    prompt = prompts(1, seed=6)[0]
    exact = [x.logprob for x in ask(use(LLAMA), prompt, logprobs=0, max_tokens=1).logprobs]
    rounded = [x.logprob for x in ask(engine, prompt, logprobs=0, max_tokens=1).logprobs]
    engine.close()
    assert rounded != exact
    np.testing.assert_allclose(rounded, exact, atol=0.05)


# --- limits and faults --------------------------------------------------------------------------


def test_pages_in_use_follow_the_tokens_in_use():
    engine = use(LLAMA)
    for n in (5, 30):
        seen = queue.Queue()
        request = Request(id=f"grow {n}", prompt=[1] * n, sampling=Sampling(max_tokens=30))
        engine.submit(request, lambda o, seen=seen: seen.put((o, engine.pool.used)))
        tokens = n
        while True:
            output, used = seen.get(timeout=60)
            tokens += len(output.tokens)
            if output.finish_reason is not None:
                break
            assert -(-tokens // 8) - 1 <= used <= -(-(tokens + 4) // 8) + 1


@pytest.mark.parametrize(
    ("prompt", "sampling", "match"),
    [
        ([], {}, "empty"),
        ([1] * 60, {"max_tokens": 5}, "context has 64"),
        ([1, 999], {}, "prompt: token id 999"),
        ([-1], {}, "token id -1"),
        ([1], {"logit_bias": {999: 1.0}}, "logit_bias: token id 999"),
        ([1], {"stop_token_ids": (999,)}, "stop_token_ids: token id 999"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(prompt, sampling, match):
    with pytest.raises(InputError, match=match):
        ask(use(LLAMA), prompt, **sampling)


def test_deadlines_and_aborts_end_a_request_wherever_it_is():
    engine = use(LLAMA)
    past = ask(engine, [1, 2], deadline=time.monotonic() - 1, max_tokens=60)
    assert past.reason == "deadline"
    answers = [ask(engine, [1, 2, i], max_tokens=50) for i in range(20)]
    for answer in answers:
        engine.abort(answer.id)
    assert {answer.reason for answer in answers} <= {"abort", "length"}
    engine.abort("nobody")


def test_a_full_queue_and_a_closing_engine_say_so():
    engine = Engine(model_of(LLAMA), dataclasses.replace(SMALL, max_batch=1, max_waiting=2))
    waiting = [ask(engine, [1, 2, 3]) for _ in range(2)]  # not started: nobody takes them
    with pytest.raises(QueueFull) as full:
        ask(engine, [1, 2, 3])
    assert full.value.retry_after >= 1
    engine.start()
    assert engine.drain(60)
    assert [answer.reason for answer in waiting] == ["length"] * 2
    with pytest.raises(Closed):
        ask(engine, [1])
    engine.close()


def test_an_error_on_the_device_fails_what_runs_and_nothing_later(monkeypatch):
    engine = use(LLAMA)
    want = ask(engine, [4, 5, 6]).tokens
    decode, calls = engine._runner.decode, []

    def fail_once(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return decode(*args)

    monkeypatch.setattr(engine._runner, "decode", fail_once)
    broken = ask(engine, [4, 5, 6], max_tokens=40)
    assert broken.reason == "error"
    assert "out of memory" in broken.outputs[-1].error
    assert ask(engine, [4, 5, 6]).tokens == want


def test_a_caller_that_fails_disturbs_nobody():
    engine = use(LLAMA)

    def fails(output):
        raise ValueError("gone")

    engine.submit(
        Request(id="fails", prompt=[1], sampling=Sampling(max_tokens=50, temperature=0.0)), fails
    )
    assert ask(engine, [4, 5, 6]).reason == "length"
    deadline = time.monotonic() + 30
    while engine.stats().running and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_batch", 0), ("kv_dtype", "int3"), ("prefill_tokens", 12), ("window", 0),
     ("window_seconds", 0),
     ("context", 999), ("speculate", 8)],
)  # fmt: skip
def test_an_option_out_of_range_is_named(name, value):
    with pytest.raises(InputError, match=name):
        Engine(model_of(LLAMA), dataclasses.replace(SMALL, **{name: value}))
