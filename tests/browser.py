"""A headless Chromium, driven through its own protocol over two pipes (no driver is needed)."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import threading
import time

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page:
    """One tab. ``requests`` are the addresses that it asked for, ``errors`` what its console said
    was wrong."""

    def __init__(self, to_browser, from_browser):
        self._out, self._in = to_browser, from_browser
        self._numbers, self._answers = itertools.count(1), {}
        self._changed = threading.Condition()
        self._session = None
        self.requests, self.errors = [], []
        threading.Thread(target=self._listen, daemon=True).start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        with self._changed:
            assert self._changed.wait_for(lambda: number in self._answers, timeout=60), method
        answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _listen(self):
        rest = b""
        while data := os.read(self._in, 1 << 16):
            *whole, rest = (rest + data).split(b"\0")
            for one in map(json.loads, whole):
                self._take(one)

    def _take(self, one):
        params = one.get("params", {})
        match one.get("method"):
            case None:
                with self._changed:
                    self._answers[one["id"]] = one
                    self._changed.notify_all()
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.errors.append(params["exceptionDetails"]["text"])
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(f"{params['entry']['text']} {params['entry'].get('url')}")

    def open(self, url):
        self.call("Page.navigate", url=url)

    def js(self, code):
        """The value of an expression."""
        result = self.call(
            "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, (code, result["exceptionDetails"])
        return result["result"].get("value")

    def until(self, code, seconds=30):
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.js(f"!!({code})"):
            assert time.monotonic() < end, f"{code}\n{self.js('document.body.innerText')}"
            time.sleep(0.03)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, code=13):
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key,
                windowsVirtualKeyCode=code, **text,
            )  # fmt: skip

    def click(self, selector):
        found = self.js(
            f"(e => e ? (e.click(), true) : false)(document.querySelector({selector!r}))"
        )
        assert found, selector

    def screenshot(self, path):
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def look(self, *, width=1200, height=800, scheme="light"):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)


@contextlib.contextmanager
def page(folder):
    """``folder``: for the browser's files."""
    pipes = *os.pipe(), *os.pipe()
    # Far from 3 and 4, which the browser uses.
    read, to_browser, from_browser, write = (fcntl.fcntl(p, fcntl.F_DUPFD, 10) for p in pipes)
    for pipe in pipes:
        os.close(pipe)
    options = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--lang=en-US",
    ]  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$0" "$@" 3<&{read} 4>&{write}', CHROMIUM, *options],
        pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(read)
    os.close(write)
    try:
        yield Page(to_browser, from_browser)
    finally:
        process.terminate()
        process.wait(30)
        os.close(to_browser)
