"""The page at ``/``, driven in Debian's Chromium; its parts without a browser in page.test.mjs."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tinyllm

pytest.importorskip("fastapi", reason="the server needs the extra [server]")
uvicorn = pytest.importorskip("uvicorn")

from tinyllm.server import Settings, create_app  # noqa: E402

HERE = Path(__file__).resolve().parent
AXE = Path(sys.prefix) / "axe" / "package" / "axe.min.js"
NODE = shutil.which("node")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
PLAIN = {"temperature": 0, "max_tokens": 24, "choices": 5}
ASKED = "Tell me a story."
browsed = pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromium-driver")


@pytest.mark.skipif(NODE is None, reason="node runs the page's own tests")
def test_the_parts_of_the_page() -> None:
    done = subprocess.run(
        [str(NODE), "--test", HERE / "page.test.mjs"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Door:
    """Stands before the application: keeps what is asked of it, or answers in its place."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.instead: list[tuple[int, dict[bytes, bytes]]] = []
        self.asked: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/chat"):
            await self.app(scope, receive, send)
            return
        if self.instead:
            status, headers = self.instead.pop(0)
            await send(
                {"type": "http.response.start", "status": status, "headers": [*headers.items()]}
            )
            await send({"type": "http.response.body", "body": b'{"error":{"message":"not now"}}'})
            return

        async def keep() -> Any:
            message = await receive()
            if message.get("body"):
                self.asked.append(json.loads(message["body"]))
            return message

        await self.app(scope, keep, send)


class Served:
    """A server of the bundled model with a door before it."""

    def __init__(self, model: tinyllm.Model, settings: Settings | None = None) -> None:
        self.app = create_app({"tales": model}, settings)
        self.door = Door(self.app)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        config = uvicorn.Config(self.door, log_config=None, timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    @property
    def entry(self) -> Any:
        """The one model among those of the application."""
        (found,) = self.app.pool
        return found

    def slow(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        """Have each token take so long, and texts never end by themselves."""
        engine, eog = self.entry.engine, list(self.entry.model.tokenizer.eog)

        def wait(ids: Any, logits: Any) -> Any:
            time.sleep(seconds)
            logits[eog] = -1e30
            return logits

        submit = engine.submit
        slowly = lambda *given, **how: submit(*given, **how, logits_processor=wait)  # noqa: E731
        monkeypatch.setattr(engine, "submit", slowly)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


@pytest.fixture(scope="module")
def served(model: tinyllm.Model) -> Iterator[Served]:
    found = Served(model)
    yield found
    found.close()


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield found
    found.quit()


class Page:
    """The page in the browser, and what a test does with it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, settings: dict[str, Any] = PLAIN, **preferences: Any) -> None:
        """Load the page as for the first time."""
        self.driver.get(self.url)
        kept = json.dumps({"settings": settings, **preferences})
        script = "localStorage.clear(); localStorage.setItem('tinyllm.preferences', arguments[0])"
        self.driver.execute_script(script + "; sessionStorage.clear(); location.hash = ''", kept)
        self.reload()

    def reload(self) -> None:
        self.driver.refresh()
        self.until(lambda: self.all("#model option"), "the models are listed")

    def width(self, width: int, height: int = 800) -> None:
        """Be a screen of this size, a phone's below 600."""
        command = "Emulation.setDeviceMetricsOverride"
        how = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd(command, how)

    def until(self, holds: Callable[[], Any], what: str, seconds: float = 20) -> Any:
        """Wait until something holds, which it does soon."""
        from selenium.common.exceptions import NoSuchElementException as Absent
        from selenium.common.exceptions import StaleElementReferenceException as Stale

        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            try:
                if found := holds():
                    return found
            except (Absent, Stale):
                pass
            time.sleep(0.02)
        raise AssertionError(f"it did not come about that {what}")

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def button(self, label: str, inside: str = "body") -> Any:
        return self.one(f'{inside} button[aria-label="{label}"]')

    def press(self, *keys: str) -> None:
        """Press keys at whatever has the focus: modifiers, then the last one."""
        from selenium.webdriver import ActionChains, Keys

        *held, last = [getattr(Keys, k.upper(), k) for k in keys]
        actions = ActionChains(self.driver)
        for key in held:
            actions.key_down(key)
        actions.send_keys(last)
        for key in held:
            actions.key_up(key)
        actions.perform()

    def send(self, text: str = ASKED) -> None:
        self.one("#prompt").send_keys(text)
        self.button("Send").click()

    def done(self) -> str:
        """Wait for the end of the answer that is being written; its text."""
        self.until(lambda: not self.all(".writing") and self.all(".stats"), "the answer ends")
        return self.answer()

    def answer(self) -> str:
        texts: list[str] = self.driver.execute_script(
            "return [...document.querySelectorAll('.answer .text')].map((e) => e.innerText)"
        )
        return texts[-1] if texts else ""

    def tokens(self) -> list[Any]:
        return self.all(".message:last-child .text .token")

    def focused(self, what: str = "id") -> str:
        found: str = self.driver.execute_script(
            f"return document.activeElement.getAttribute('{what}') ?? ''"
        )
        return found

    def problems(self) -> list[str]:
        """What the browser complained of: errors, and what the policy of contents forbids."""
        logs = self.driver.get_log("browser")
        return [e["message"] for e in logs if e["source"] != "network" or "favicon" in e["message"]]

    def sideways(self) -> int:
        """Pixels by which the page is wider than the screen."""
        script = "return document.documentElement.scrollWidth - innerWidth"
        found: int = self.driver.execute_script(script)
        return found

    def barriers(self) -> list[str]:
        """What axe-core calls serious or critical."""
        if not AXE.exists():
            pytest.skip("axe-core: npm pack axe-core into .venv/axe")
        self.driver.execute_script(AXE.read_text("utf-8"))
        found = self.driver.execute_async_script(  # colours that still change would be misread
            "const done = arguments[0];"
            "const changing = document.getAnimations().filter((a) => a instanceof CSSTransition);"
            "Promise.allSettled(changing.map((a) => a.finished))"
            ".then(() => axe.run({resultTypes: ['violations']})).then((r) => done(r.violations))"
        )
        return [
            f"{v['id']}: {v['nodes'][0]['html'][:200]}"
            for v in found
            if v["impact"] in ("serious", "critical")
        ]


@pytest.fixture
def page(driver: Any, served: Served) -> Iterator[Page]:
    served.door.instead.clear()
    served.door.asked.clear()
    found = Page(driver, served.url)
    found.width(1280)
    found.open()
    yield found
    assert found.problems() == []


def words(text: str) -> str:
    return " ".join(text.split())


@browsed
def test_an_answer_streams_and_is_that_of_the_model(
    page: Page, served: Served, model: tinyllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.slow(monkeypatch, 0.02)
    page.send()
    lengths = set()
    while page.all(".writing") or not page.all(".stats"):
        lengths.add(len(page.answer()))
    assert len(lengths) > 3, "it comes in pieces"
    monkeypatch.undo()
    never = dict.fromkeys(model.tokenizer.eog, float("-inf"))
    asked = [{"role": "user", "content": ASKED}]
    expected = model.chat(asked, max_tokens=24, temperature=0, logit_bias=never).text
    assert words(page.done()) == words(expected)
    assert "24 tokens" in page.one(".stats").text
    assert "tokens/s" in page.one(".stats").text
    assert "tokens" in page.one("#context").text
    page.button("Go on writing").click()
    page.until(lambda: words(page.answer()) != words(expected), "it goes on")
    assert words(page.done()).startswith(words(expected))


@browsed
def test_stop_ends_the_work(page: Page, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.slow(monkeypatch, 0.02)
    page.open({**PLAIN, "max_tokens": 200})
    page.send()
    page.until(page.answer, "it begins")
    page.button("Stop").click()
    page.done()
    assert "stopped" in page.one(".stats").text
    page.until(lambda: served.entry.n_texts == 0, "the slot is free")
    page.press("alt", "r")
    page.until(lambda: page.all(".writing") and page.answer(), "another begins")
    page.press("escape")
    page.done()
    assert page.one(".assistant .count").text == "2 / 2"


@browsed
def test_a_branch_at_a_token(page: Page, model: tinyllm.Model) -> None:
    page.send()
    first = page.done()
    page.tokens()[5].click()
    listed = page.until(lambda: page.all("#choices .choice"), "the choices are shown")
    assert len(listed) == 5
    shares = [float(e.text.rstrip(" %").lstrip("< ")) for e in page.all("#choices .percent")]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.5
    assert listed[0].get_attribute("aria-current") == "true"  # temperature 0 takes the first
    other = page.one("#choices li:nth-child(2) .what").text.replace("␣", " ")
    kept = "".join(
        page.driver.execute_script("return arguments[0].textContent", t) for t in page.tokens()[:5]
    )
    listed[1].click()
    page.until(lambda: page.all(".assistant .count"), "there is another version")
    second = page.done()
    assert words(second).startswith(words(kept + other))
    assert second != first
    assert page.one(".assistant .count").text == "2 / 2"
    assert page.all(".token.branched")
    page.button("Earlier version").click()
    assert page.answer() == first
    page.tokens()[3].click()
    page.one("#choices input").send_keys("dragon")
    page.one("#choices form button").click()
    page.until(lambda: page.one(".assistant .count").text == "3 / 3", "there is a third version")
    assert "dragon" in page.done()


@browsed
def test_heat_colours_tokens(page: Page) -> None:
    page.send()
    page.done()
    colour = "return getComputedStyle(document.querySelectorAll('.text .token')[1]).backgroundColor"
    before = page.driver.execute_script(colour)
    page.button("Colour tokens by probability").click()
    shown = {
        page.driver.execute_script(colour.replace("[1]", f"[{k}]"))
        for k in range(len(page.tokens()))
    }
    assert before not in shown
    assert len(shown) > 3
    page.reload()
    assert page.button("Colour tokens by probability").get_attribute("aria-pressed") == "true"


@browsed
def test_an_edit_is_another_branch_and_all_outlives_a_reload(page: Page, served: Served) -> None:
    page.send()
    first = page.done()
    page.button("Edit", ".user").click()
    box = page.one(".edit textarea")
    box.clear()
    box.send_keys("Tell me of a bear.")
    page.one(".edit [type=submit]").click()
    page.until(lambda: page.one(".user .words").text == "Tell me of a bear.", "it is edited")
    second = page.done()
    assert served.door.asked[-1]["messages"] == [{"role": "user", "content": "Tell me of a bear."}]
    page.reload()
    assert page.answer() == second
    assert page.one(".user .count").text == "2 / 2"
    page.button("Earlier version", ".user").click()
    assert page.answer() == first
    page.send("And then?")
    page.until(lambda: len(page.all(".assistant")) == 2, "it answers")
    page.done()
    roles = [m["role"] for m in served.door.asked[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]


@browsed
def test_conversations_are_renamed_exported_imported_and_deleted(
    page: Page, tmp_path: Path
) -> None:
    page.send()
    answer = page.done()
    page.button(f"Rename {ASKED}").click()
    page.press("control", "a")
    page.one("#conversations input").send_keys("Mine\n")
    assert page.one("#conversations .open").text == "Mine"
    script = "const {Store} = await import('/page/store.mjs'); return new Store().exported()"
    kept = page.driver.execute_script(f"return (async () => {{{script}}})()")
    page.button("Delete Mine").click()
    page.one("#conversations .danger-button").click()
    assert not page.all("#conversations li")
    assert not page.all(".message")
    file = tmp_path / "kept.json"
    file.write_text(kept, "utf-8")
    page.one("#import-file").send_keys(str(file))
    page.until(lambda: page.all("#conversations .open"), "it is back")[0].click()
    assert page.answer() == answer
    file.write_text("no", "utf-8")
    page.one("#import-file").send_keys(str(file))
    page.until(lambda: "no JSON" in page.one("#notice").text, "it says what is wrong")


@browsed
def test_settings_and_files_go_into_the_request(page: Page, served: Served, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("The bear is blue.", "utf-8")
    (tmp_path / "picture.bin").write_bytes(b"\0\xff")
    page.button("Settings").click()
    page.one("#settings textarea").send_keys("Be brief.")
    page.driver.execute_script(
        "const e = document.querySelector('#settings [type=range]');"
        "e.value = 0.5; e.dispatchEvent(new Event('input'))"
    )
    tick = page.one("#settings [type=checkbox]")
    tick.click()
    assert not tick.is_selected()
    tick.click()
    assert tick.is_selected()
    page.press("escape")
    page.one("#attach-file").send_keys(str(tmp_path / "picture.bin"))
    page.until(lambda: "not a text file" in page.one("#notice").text, "it is refused")
    page.one("#attach-file").send_keys(str(tmp_path / "notes.txt"))
    page.until(lambda: page.all("#files .chip"), "it is attached")
    page.send("What colour?")
    page.done()
    (asked,) = served.door.asked
    assert asked["temperature"] == 0.5
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "File notes.txt:\n```\nThe bear is blue.\n```\n\nWhat colour?"},
    ]


HOSTILE = (
    """# <script>window.hurt = 1</script>
<img src=x onerror="window.hurt = 1"> [x](javascript:window.hurt=1) ![y](https://example.org/y.png)
<iframe srcdoc="<script>parent.hurt = 1</script>"></iframe><style>body{display:none}</style>

| <b>a</b> | b |
|---|---|
| `<svg onload=hurt=1>` | [ok](https://example.org) |

```html
<script>window.hurt = 1</script> """
    + "wide " * 60
    + """
```
"""
    + "unbroken" * 60
)


def put(page: Page, text: str, **more: Any) -> None:
    """Show a conversation whose answer is this text."""
    nodes = {
        "u": {"id": "u", "parent": None, "role": "user", "text": text, "created": 0},
        "a": {"id": "a", "parent": "u", "role": "assistant", "text": text, "created": 0, **more},
    }
    kept = {"id": "x", "title": text, "created": 0, "updated": 0, "nodes": nodes}
    kept["chosen"] = {"": "u", "u": "a"}
    script = "localStorage.setItem('tinyllm.conversation.x', arguments[0]); location.hash = 'x'"
    page.driver.execute_script(script, json.dumps({**kept, "settings": {}}))
    page.reload()


@browsed
@pytest.mark.parametrize("known", [False, True])
def test_hostile_text_stays_text(page: Page, known: bool) -> None:
    spelled = "So.\n" + HOSTILE
    tokens = [{"i": 7, "t": spelled[i : i + 5], "p": -1} for i in range(0, len(spelled), 5)]
    put(page, HOSTILE, tokens=tokens if known else None, reasoning="So.\n")
    assert "<script>window.hurt = 1</script>" in page.answer()
    tags = page.driver.execute_script(
        "return [...new Set([...document.querySelectorAll('.message .prose *')].map((e) => e.localName))]"
    )
    assert {"table", "pre", "a", "h3"} <= set(tags)
    assert not {"script", "img", "iframe", "style", "b", "object"} & set(tags)
    links = {e.get_attribute("href") for e in page.all(".text a")}
    assert links == {"https://example.org/", "https://example.org/y.png"}
    assert page.driver.execute_script("return window.hurt") is None
    assert bool(page.tokens()) == known


@browsed
@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_scrolls_in_one_direction(page: Page, width: int) -> None:
    page.width(width, 640)
    assert page.sideways() <= 0
    put(page, HOSTILE)
    assert page.sideways() <= 0
    page.button("Conversations").click()
    page.until(lambda: page.one("#new").is_displayed(), "the list slides in")
    page.until(lambda: page.one("#sidebar").location["x"] == 0, "it has arrived")
    page.one("#new").click()
    page.send()
    page.done()
    page.tokens()[4].click()
    box = page.one("#choices").rect
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert box["y"] + box["height"] <= 640
    assert page.sideways() <= 0


@browsed
def test_the_keyboard_alone(page: Page) -> None:
    for _ in range(20):  # backwards to the page's first stop
        if page.focused("class") != "skip":
            page.press("shift", "tab")
    assert page.focused("class") == "skip"
    page.press("enter")
    page.until(lambda: page.focused() == "prompt", "the box has the focus")
    for letter in "Hi.":
        page.press(letter)
    page.press("enter")
    page.until(lambda: page.all(".message"), "it is sent")
    first = page.done()
    page.until(
        lambda: (
            "Answer:"
            in page.driver.execute_script("return document.querySelector('#status').textContent")
        ),
        "it is announced",
    )
    page.press("alt", "t")
    assert page.focused("data-token") == "0"
    page.press("right")
    page.press("right")
    assert page.focused("data-token") == "2"
    assert page.focused("role") == "button"
    assert "percent" in page.focused("aria-label")
    page.press("enter")
    assert page.focused("class") == "choice"
    page.press("right")
    assert page.one("#choices .count").text.startswith("4 of")
    page.press("escape")
    assert page.focused("data-token") == "3"
    page.press("enter")
    page.press("down")
    page.press("enter")
    page.until(lambda: page.all(".assistant .count"), "it branches")
    assert page.done() != first
    page.press("alt", "/")
    assert page.one("#shortcuts").is_displayed()
    page.press("escape")
    assert not page.one("#shortcuts").is_displayed()
    page.press("alt", "n")
    assert page.focused() == "prompt"
    assert not page.all(".message")
    seen = set()
    for _ in range(20):
        page.press("tab")
        seen.add(page.focused() or page.focused("aria-label"))
    assert {"new", "export", "import", "model", "heat", "settings-open", "theme", "send"} <= seen


@browsed
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Page, theme: str) -> None:
    page.open(theme=theme, heat=True)
    assert page.barriers() == []
    put(page, HOSTILE, reasoning="So.", finish="length", error="It broke.")
    assert page.barriers() == []
    page.button("Edit", ".user").click()
    assert page.barriers() == []
    page.press("escape")
    page.one("#new").click()
    page.send()
    page.done()
    page.tokens()[4].click()
    assert page.barriers() == []
    page.press("escape")
    page.button("Settings").click()
    assert page.barriers() == []
    page.press("escape")
    page.width(390)
    assert page.barriers() == []


@browsed
def test_a_busy_server_is_asked_again(page: Page, served: Served) -> None:
    served.door.instead += [(429, {b"retry-after": b"1"})]
    page.send()
    page.until(lambda: "Trying again in 1 s" in page.one("#notice").text, "it says that it waits")
    assert page.done()
    assert not page.one("#notice").is_displayed()
    served.door.instead += [(500, {})]
    page.press("alt", "r")
    page.until(lambda: page.all(".error:not([hidden])"), "the error is shown")
    assert page.one(".error").text == "Not now."


@browsed
def test_a_key_is_asked_for_and_a_server_that_is_gone_is_named(
    driver: Any, model: tinyllm.Model
) -> None:
    served = Served(model, Settings(api_keys=("secret",)))
    page = Page(driver, served.url)
    try:
        driver.get(served.url)
        for given, message in (("wrong", "asks for a key"), ("secret", "key is wrong")):
            page.until(lambda m=message: m in page.one("#key-dialog").text, message)
            page.one("#key-dialog input").send_keys(given + "\n")
        page.until(lambda: page.all("#model option"), "the models are listed")
        page.send("Hi.")
        assert page.done()
        kept = driver.execute_script("return JSON.stringify(localStorage)")
        assert "secret" not in kept
    finally:
        served.close()
    page.send("Are you there?")
    page.until(lambda: page.all(".error:not([hidden])"), "the error is shown")
    assert "Is tinyllm serve still running?" in page.all(".error:not([hidden])")[-1].text
    assert page.problems() == []


@browsed
def test_an_answer_shows_the_documents_that_it_rests_on(
    driver: Any, model: tinyllm.Model, tmp_path: Path
) -> None:
    from tinyllm.localdocs import LocalDocs
    from tinyllm.localdocs.answering import Quoting

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "tea.md").write_text(
        "# Tea\n\nGreen tea <img src=x onerror=boom()> is hot.\n"
    )
    with LocalDocs(tmp_path / "store.sqlite", model) as docs:
        docs.add("kitchen", tmp_path / "notes")
        served = Served(model, Settings(documents=Quoting(docs, nearest=-1)))
        page = Page(driver, served.url)
        try:
            page.open()
            page.send("How hot is green tea?")
            page.done()
            box = page.one(".references")
            assert box.text == "From a document"
            page.one(".references summary").click()
            assert "tea.md, lines 1 to 3" in box.text
            assert "<img src=x onerror=boom()>" in box.text
            page.reload()
            assert page.until(lambda: page.one(".references").text, "they are kept")
            assert page.problems() == []
        finally:
            served.close()
