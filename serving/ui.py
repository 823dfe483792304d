"""A web page to chat at ``/ui`` of the server (Gradio). All that it loads comes from the server.

It asks the engine as the API does. Stop, or a page that is closed, ends the request there.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.app import Options, Server
from serving.http import as_api_error
from serving.protocol import ApiError, ChatRequest

PATH = "/ui"
HERE = Path(__file__).parent
# What an answer of a model may make a browser load: nothing from elsewhere.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
    "frame-ancestors 'self'; form-action 'self'"
)
THEME = gr.themes.Default(
    font=["system-ui", "Noto Sans", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
MATH = [  # not "$...$": prices are no formulas
    {"left": left, "right": right, "display": left != "\\("}
    for left, right in (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"))
]
History = list[dict[str, Any]]
Update = tuple[History, str, Any]


@dataclass(frozen=True)
class Control:
    """A slider for a parameter of the API; ``value`` is where it stands at first."""

    label: str
    low: float
    high: float
    step: float
    value: float


CONTROLS: Mapping[str, Control] = {
    "temperature": Control("Temperature", 0, 2, 0.05, 0.7),
    "top_p": Control("Top-p", 0.05, 1, 0.05, 1),
    "top_k": Control("Top-k (0: all)", 0, 200, 1, 0),
    "min_p": Control("Min-p", 0, 1, 0.01, 0),
    "repetition_penalty": Control("Repetition penalty", 1, 2, 0.05, 1),
}


def beside(server: Server, options: Options, title: str) -> ASGIApp:
    """The server's app, and the page at ``PATH``. Where the API asks for keys, the page asks for
    one of them as a password."""
    keys = options.api_keys
    page = make_page(server, options, title)
    page.max_threads = 1024  # answers at the same time: what has to wait, waits for the engine
    page.queue(api_open=False, default_concurrency_limit=None)
    outer = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page, PATH,
        auth=(lambda user, password: password in keys) if keys else None,
        auth_message="Any user name, and an API key of this server as the password.",
        theme=THEME, css=(HERE / "ui.css").read_text("utf-8"),
        js=(HERE / "ui.js").read_text("utf-8"), footer_links=[], run_history=False,
        ssr_mode=False, show_error=True, enable_monitoring=False, mcp_server=False,
    )  # fmt: skip
    started = False

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal started
        path = scope.get("path", "")
        if path == "/" and scope["type"] == "http":
            return await RedirectResponse(f"{PATH}/")(scope, receive, send)
        if path in ("/favicon.ico", "/manifest.json"):  # a page may ask for these
            return await JSONResponse({"name": title})(scope, receive, send)
        if path != PATH and not path.startswith(f"{PATH}/"):
            return await server.app(scope, receive, send)
        if not started:  # its tasks belong to this event loop
            started = True
            page.run_startup_events()
            await page.run_extra_startup_events()

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message["headers"], policy]
            await send(message)

        await outer(scope, receive, with_policy)

    return app


def make_page(server: Server, options: Options, title: str) -> gr.Blocks:
    names = list(options.names)
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True) as page:
        with gr.Sidebar(label="Settings", width=340, elem_id="settings"):
            name = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
            system = gr.Textbox(label="System prompt", lines=3, placeholder="the model's own")
            sliders = [
                gr.Slider(c.low, c.high, c.value, step=c.step, label=c.label)
                for c in CONTROLS.values()
            ]
            most = gr.Slider(
                1, options.context, min(512, options.context // 2), step=1, label="Max tokens"
            )
            seed = gr.Textbox(label="Seed", placeholder="another one for each answer")
        shown = gr.Chatbot(
            elem_id="chat", label=title, show_label=False, scale=1, height="70vh",
            editable="user", buttons=["copy", "copy_all"], feedback_options=None,
            placeholder=f"## {title}", allow_file_downloads=False, latex_delimiters=MATH,
            group_consecutive_messages=False, layout="bubble",
        )  # fmt: skip
        status = gr.HTML(elem_id="status", show_label=False)
        box = gr.Textbox(
            elem_id="message", show_label=False, lines=1, max_lines=12, autofocus=True,
            placeholder="Message (Enter sends, Shift-Enter begins a new line)", submit_btn=True,
        )  # fmt: skip
        with gr.Row(elem_id="actions"):
            clear = gr.Button("New conversation", size="sm", min_width=100)
            as_json = gr.Button("Save as JSON", size="sm", min_width=100)
            as_markdown = gr.Button("Save as Markdown", size="sm", min_width=100)

        async def reply(history: History, *values: Any, **cleared: str) -> AsyncIterator[Update]:
            """Updates of chat, status and box, until the answer is there."""
            yield history, "", gr.update(submit_btn=False, stop_btn=True, **cleared)
            async for text, note in answers(server, options, history, values):
                answer = [message("assistant", text)] if text else []
                yield history + answer, note, gr.skip()

        async def send(text: str, history: History, *values: Any) -> AsyncIterator[Update]:
            if text.strip():
                asked = [*answered(history), message("user", text)]
                async with contextlib.aclosing(reply(asked, *values, value="")) as updates:
                    async for update in updates:
                        yield update

        async def retry(
            event: gr.RetryData, history: History, *values: Any
        ) -> AsyncIterator[Update]:
            async with contextlib.aclosing(reply(history[: event.index + 1], *values)) as updates:
                async for update in updates:
                    yield update

        async def edit(event: gr.EditData, history: History, *values: Any) -> AsyncIterator[Update]:
            asked = [*history[: event.index], message("user", event.value)]
            async with contextlib.aclosing(reply(asked, *values)) as updates:
                async for update in updates:
                    yield update

        controls = [name, system, *sliders, most, seed]
        outputs = [shown, status, box]
        how = {"show_progress": "hidden", "api_visibility": "private"}
        ready = {"submit_btn": True, "stop_btn": False}
        runs = [
            # "multiple": else a message just after Stop is dropped. ui.js holds back the others.
            box.submit(send, [box, shown, *controls], outputs, trigger_mode="multiple", **how),
            shown.retry(retry, [shown, *controls], outputs, **how),
            shown.edit(edit, [shown, *controls], outputs, **how),
        ]
        for run in runs:  # after an error, too
            run.then(lambda: gr.update(**ready), None, box, queue=False, **how)
        box.stop(
            lambda: ("stopped", gr.update(**ready)), None, [status, box],
            cancels=runs, queue=False, **how,
        )  # fmt: skip
        gr.on(
            [clear.click, shown.clear], lambda: ([], "", gr.update(**ready)), None, outputs,
            cancels=runs, queue=False, **how,
        )  # fmt: skip
        for button, kind in ((as_json, "json"), (as_markdown, "md")):
            button.click(
                None, [shown, system], None, js=f"(...x) => saveConversation('{kind}', ...x)"
            )
    return page


async def answers(
    server: Server, options: Options, history: History, values: Sequence[Any]
) -> AsyncIterator[tuple[str, str]]:
    """(the text so far, a line about it), again and again."""
    name, system, *numbers, most, seed = values
    try:
        body = ChatRequest(
            model=name,
            messages=[{"role": "system", "content": system}] * bool(system.strip())
            + [{"role": one["role"], "content": text_of(one)} for one in history],
            max_tokens=int(most),
            seed=seed_of(seed),
            **{
                key: int(x) if control.step == 1 else x
                for (key, control), x in zip(CONTROLS.items(), numbers, strict=True)
            },
        )
        server.state.check()
        text, started, first = "", time.monotonic(), 0.0
        answer = await server.text.chat(body, adapter=options.names[name])
        try:
            async for delta in answer.deltas():
                first = first or time.monotonic()
                text += delta.text
                tokens, now = answer.usage["completion_tokens"], time.monotonic()
                note = [
                    f"{tokens} tokens",
                    f"{first - started:.2f} s to the first",
                    f"{tokens / (now - started):.1f} tokens/s",
                    f"seed {body.seed}",
                ]
                note += ["cut at max tokens"] * (delta.finish_reason == "length")
                note += ["no answer"] * (delta.finish_reason is not None and not text.strip())
                yield text, " · ".join(note)
        finally:
            answer.close()
    except Exception as error:
        raise gr.Error(str(as_api_error(error)), print_exception=False) from error


def seed_of(text: str) -> int:
    if not text.strip():
        return random.getrandbits(31)
    try:
        return int(text) % 2**32
    except ValueError:
        raise ApiError(f"the seed {text!r} is not a whole number", param="seed") from None


def message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}  # as it is, not dedented


def text_of(one: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in one["content"])


def answered(history: History) -> History:
    """Without a question at the end that got no answer."""
    return history[:-1] if history and history[-1]["role"] == "user" else history
