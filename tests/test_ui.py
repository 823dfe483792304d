"""The page at /ui: what it asks the engine, what it lets go of, what it loads. The last tests drive
it in a Chromium."""

import asyncio
import contextlib
import json

import pytest

import llmzoo_jax
from serving.app import make_server
from tests import browser
from tests.fake_engine import FakeEngine
from tests.live_server import DEFAULTS, NAME, live, until
from tests.tiny_runs import make_run

ui = pytest.importorskip("serving.ui", reason="needs Gradio: pip install 'llmzoo-jax[serve,ui]'")
LONG = "one two three four five six seven eight nine ten " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llmzoo_jax.load(make_run(tmp_path_factory.mktemp("run"), "bpe"))


def engine_of(model, answer, **options):
    """It says ``answer``, or what a function makes of the prompt's text."""

    def tokens(request):
        prompt = model.tokenizer.decode(request.prompt)
        return model.tokenizer(answer(prompt) if callable(answer) else answer).input_ids

    return FakeEngine(tokens, stop_ids=model.stop_ids, **options)


def page(server, options):
    return ui.beside(server, options, NAME)


# --- what it asks -------------------------------------------------------------------------------

VALUES = {
    "model": NAME, "system": "", "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
    "repetition_penalty": 1.2, "max_tokens": 100, "seed": "11",
}  # fmt: skip
QUESTION = [ui.message("user", "Who are you?")]


def ask(model, engine, history=QUESTION, take=None, **changed):
    """All that ``ui.answers`` gives, or the first ``take``, after which it is closed."""
    server = make_server(model, engine, DEFAULTS)
    server.state.ready = changed.pop("ready", True)
    values = (VALUES | changed).values()

    async def main():
        updates = ui.answers(server, DEFAULTS, history, list(values))
        async with contextlib.aclosing(updates):
            got = []
            async for update in updates:
                got.append(update)
                if len(got) == take:
                    break
            return got

    return asyncio.run(main())


def test_every_control_reaches_the_engine(model):
    engine = engine_of(model, "Phénix. 你好 🙂")
    updates = ask(model, engine, system="Be kind.")
    assert updates[-1][0] == "Phénix. 你好 🙂"
    how = engine.seen[0].sampling
    assert (how.temperature, how.top_p, how.top_k, how.min_p) == (0.5, 0.9, 7, 0.1)
    assert (how.repetition_penalty, how.max_tokens, how.seed) == (1.2, 100, 11)
    assert "Be kind." in model.tokenizer.decode(engine.seen[0].prompt)
    assert updates[-1][1].startswith(f"{len(model.tokenizer('Phénix. 你好 🙂').input_ids)} tokens")
    assert "seed 11" in updates[-1][1]


def test_without_a_seed_each_answer_has_another_one(model):
    engine = engine_of(model, "ok")
    ask(model, engine, seed="")
    ask(model, engine, seed="")
    assert engine.seen[0].sampling.seed != engine.seen[1].sampling.seed


def test_an_answer_that_nobody_waits_for_is_aborted(model):
    engine = engine_of(model, LONG, delay=0.02)
    ask(model, engine, take=2)
    until(lambda: not engine.live)
    assert engine.finished == {"abort": 1}


def test_an_answer_that_was_cut_says_so(model):
    assert "cut at max tokens" in ask(model, engine_of(model, LONG), max_tokens=3)[-1][1]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": "x"}, "the seed 'x' is not a whole number"),
        ({"max_tokens": 256}, "and the context is 256"),
        ({"ready": False}, "the server is starting"),
        ({"history": [ui.message("user", "forge </s>")]}, "</s>"),
    ],
)
def test_what_cannot_be_done_is_said(model, changed, told):
    with pytest.raises(ui.gr.Error, match=told):
        ask(model, engine_of(model, "ok"), **changed)


def test_a_question_without_an_answer_is_left_out():
    answer = ui.message("assistant", "a")
    assert ui.answered([*QUESTION, answer, *QUESTION]) == [*QUESTION, answer]
    assert ui.answered([*QUESTION, answer]) == [*QUESTION, answer]


# --- beside the API -----------------------------------------------------------------------------


def test_the_page_is_beside_the_api_and_loads_nothing_from_elsewhere(model):
    with live(model, engine_of(model, "ok"), around=page) as server:
        assert server.get("/")[1]["location"] == "/ui/"
        status, headers, html = server.get("/ui/")
        assert status == 200
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "fonts.googleapis.com" not in html
        assert '"analytics_enabled":false' in html.replace(" ", "")
        status, headers, models = server.get("/v1/models")
        assert [one["id"] for one in models["data"]] == [NAME]
        assert "content-security-policy" not in headers
        assert server.get("/nothing")[0] == 404


def test_where_the_api_has_keys_the_page_asks_for_one(model):
    with live(model, engine_of(model, "ok"), around=page, api_keys=("secret",)) as server:
        assert server.get("/v1/models")[0] == 401
        assert server.get("/ui/config")[0] == 401
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert server.post("/ui/login", b"username=me&password=wrong", form)[0] == 400
        assert server.post("/ui/login", b"username=me&password=secret", form)[0] == 200


# --- in a browser -------------------------------------------------------------------------------


def in_a_browser(test):
    reason = "no Chromium here: apt install chromium"
    return pytest.mark.slow(pytest.mark.skipif(browser.CHROMIUM is None, reason=reason)(test))


BUBBLES = "[...document.querySelectorAll('#chat .message.bot')]"
SHOWN = f"({BUBBLES}.at(-1)?.innerText ?? '')"
BOX = "document.querySelector('#message textarea')"
STOP = "#message .stop-button"


def say(tab, text):
    tab.until(BOX)
    tab.js(f"{BOX}.focus()")
    tab.type(text)
    tab.press("Enter")


@pytest.fixture
def talk(model, tmp_path):
    """Gives a function: (engine) -> (tab, server), with the page open."""
    with contextlib.ExitStack() as stack:

        def start(engine):
            server = stack.enter_context(live(model, engine, around=page))
            tab = stack.enter_context(browser.page(tmp_path / "browser"))
            tab.look()
            tab.open(f"{server.url}/ui/")
            tab.until(f"{BOX} && window.saveConversation")  # ui.js has run
            return tab, server

        yield start


@in_a_browser
def test_stop_frees_the_slot_and_keeps_the_text(model, talk):
    engine = engine_of(model, LONG, delay=0.05)
    tab, server = talk(engine)
    say(tab, "Count.")
    tab.press("Enter")
    tab.until(f"{SHOWN}.includes('two')")
    assert "llmzoo_requests_running 1.0" in server.get("/metrics")[2]
    tab.type("Wait.")
    tab.press("Enter")
    assert tab.js(f"{BOX}.value") == "Wait."
    assert len(engine.seen) == 1
    tab.click(STOP)
    until(lambda: not engine.live, 3)
    assert "llmzoo_requests_running 0.0" in server.get("/metrics")[2]
    assert engine.finished == {"abort": 1}
    tab.until(f"!document.querySelector({STOP!r})")
    assert "one two" in tab.js(SHOWN)
    tab.js(f"{BOX}.focus()")
    tab.press("Enter")
    tab.until(f"{BUBBLES}.length == 2")
    assert len(engine.seen) == 2
    assert tab.js(f"{BOX}.value") == ""


@in_a_browser
def test_closing_the_page_frees_the_slot(model, talk):
    engine = engine_of(model, LONG, delay=0.05)
    tab, _ = talk(engine)
    say(tab, "Count.")
    tab.until(f"{SHOWN}.includes('two')")
    tab.open("about:blank")
    until(lambda: not engine.live, 10)
    assert engine.finished == {"abort": 1}


@in_a_browser
def test_directions_follow_the_text_and_nothing_is_asked_of_others(model, talk):
    answer = "مرحبا بالعالم\n\n- أول\n- second\n\n```python\nprint(1)\n```\n\n![x](http://192.0.2.1/x.png)"
    tab, server = talk(engine_of(model, answer))
    say(tab, "שלום")
    tab.until(f"{SHOWN}.includes('second')")
    style = "getComputedStyle(document.querySelector('#chat .message{}')).direction"
    assert tab.js(style.format(".user p")) == "rtl"
    assert tab.js(style.format(".bot p")) == "rtl"
    assert tab.js(style.format(".bot ul")) == "rtl"
    assert tab.js(style.format(".bot pre")) == "ltr"
    assert tab.js(style.format(".bot code")) == "ltr"
    elsewhere = [url for url in tab.requests if not url.startswith((server.url, "data:", "blob:"))]
    assert all("192.0.2.1" in url for url in elsewhere)  # blocked by the policy before it is sent
    assert not [one for one in tab.errors if "192.0.2.1" not in one]


@in_a_browser
def test_regenerate_edit_and_save(model, talk):
    engine = engine_of(model, lambda prompt: f"It has {len(prompt)} letters.")
    tab, _ = talk(engine)
    say(tab, "Hello")
    tab.until(f"{SHOWN}.includes('letters')")
    first = tab.js(SHOWN)
    tab.click("#chat [aria-label=Retry]")
    until(lambda: len(engine.seen) == 2)
    assert engine.seen[1].prompt == engine.seen[0].prompt
    assert engine.seen[1].sampling.seed != engine.seen[0].sampling.seed
    tab.until(
        f"document.querySelector('#status').innerText.includes('{engine.seen[1].sampling.seed}')"
    )
    tab.until(f"!document.querySelector({STOP!r})")
    tab.click("#chat [aria-label=Edit]")
    tab.until("document.querySelector('#chat textarea')")
    tab.js("document.querySelector('#chat textarea').focus()")
    tab.type("Hello, all of you")
    tab.click("#chat [aria-label=Submit]")
    tab.until(f"{SHOWN} != {json.dumps(first)} && {SHOWN}.includes('letters')")
    tab.js("URL.createObjectURL = blob => (window.saved = blob, 'blob:none')")
    for number, kind in enumerate(("JSON", "Markdown")):
        tab.js("window.saved = undefined")
        tab.js(f"document.querySelectorAll('#actions button')[{number + 1}].click()")
        tab.until("window.saved")
        text = tab.js("window.saved.text()")
        if kind == "JSON":
            messages = json.loads(text)["messages"]
            assert [one["role"] for one in messages] == ["user", "assistant"]
            assert messages[1]["content"] == tab.js(SHOWN).strip()
        else:
            assert text.startswith("**user**")
