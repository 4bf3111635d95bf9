"""The page of a running round: what it reads, what it refuses, and that a browser sees a change at once."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fanbu.errors import UsageError
from fanbu.live import Live
from fanbu.serve import watch as watching
from fanbu.serve.files import liveness, signature
from fanbu.serve.state import _STEPS, _WORDS, look
from fanbu.serve.watch import Server, make_server

KEY = "0123456789abcdef0123"
HOSTILE = "</script><img src=x onerror=alert(1)>\u202egnp.exe"


def record(number: int = 1, accepted: bool = True, **more: Any) -> dict[str, Any]:
    judged = {"incumbent": 0.7, "candidate": 0.74, "delta": 0.04, "low": 0.01, "high": 0.07, "holds": True, "n": 300}
    return {
        "name": "demo", "round": number, "key": KEY + "e" * 44, "created": f"2026-01-0{number}T00:00:00Z",
        "decision": "promoted" if accepted else "refused",
        "verdict": {
            "accepted": accepted, "reason": "because", "average": {"delta": 0.04, "low": 0.01, "high": 0.07},
            "domains": {"food": {**judged, "metric": "accuracy"}},
        },
        "domains": {"food": {}}, **more,
    }  # fmt: skip


def save(root: Path, value: dict[str, Any], key: str = KEY) -> Path:
    folder = root / "rounds" / key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    found = tmp_path / "demo"
    found.mkdir()
    return found


@contextmanager
def serving(root: Path, lang: str = "en") -> Iterator[Server]:
    with make_server(root, 0, lang) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
    thread.join(5)
    assert not thread.is_alive()


def ask(
    server: Server, path: str = "/", method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read().decode()
    connection.close()
    return found


# What the page is told


def state_of(root: Path) -> str:
    return str(look(root)["head"]["state"])


def test_states_of_a_run(root: Path) -> None:
    assert state_of(root) == "idle"
    live = Live(root, "demo", 2)
    assert state_of(root) == "running"
    live.end()
    assert state_of(root) == "finished"
    live = Live(root, "demo", 2)
    live.end("no more disk")
    assert (state_of(root), look(root)["head"]["why"]) == ("failed", "no more disk")


def test_a_run_whose_process_is_gone_is_stopped(root: Path) -> None:
    code = "import sys, time; from fanbu.live import Live; Live(sys.argv[1], 'x', 1); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert state_of(root) == "running"
        child.kill()
        time.sleep(0.2)  # killed, and not yet waited for
        assert state_of(root) == "stalled"
    assert state_of(root) == "stalled"
    assert "process is gone" in look(root)["head"]["why"]


def test_a_silent_run_is_stopped_and_a_later_process_is_not_it() -> None:
    live = {"state": "running", "pid": os.getpid(), "updated": "2099-01-01T00:00:00Z"}
    updated = 4070908800.0
    assert liveness(live, updated + 5)[0] == "running"
    assert liveness(live, updated + 120)[0] == "stalled"
    assert liveness({**live, "host": "elsewhere", "pid": 1}, updated + 5)[0] == "running"
    old = {**live, "updated": "2001-01-01T00:00:00Z"}  # the number belongs to a process that began later
    assert liveness(old, 978307205.0)[0] == "stalled"
    for broken in (None, -1, "12", True, 2**40):
        assert liveness({**live, "pid": broken}, updated + 5)[0] == "stalled"


def test_rounds_steps_and_champion(root: Path) -> None:
    save(root, record(1), "a" * 20)
    folder = save(root, record(2, False, domains={"food": {"joined": True, "new_rows": {"train": 40}}}), "b" * 20)
    save(root, record(9), "not-a-key")
    (folder / "report.html").write_text("x")
    (root / "champion.json").write_text(json.dumps({"model": "f" * 64, "path": "stages/x/model", "round": None}))
    (root / "history.jsonl").write_text(
        '{"event": "promoted", "model": "f"}\nhalf a li\n[1]\n{"event": "left", "domain": "food", "model": "f"}\n'
    )
    live = Live(root, "demo", 4)
    live.round(3)
    live.stage("shrink")
    seen = look(root)
    live.end()
    assert [step["kind"] for step in seen["steps"]] == ["promoted", "refused", "running", "waiting"]
    assert [(one["number"], one["word"]) for one in seen["rounds"]] == [(2, "Kept the old one"), (1, "Promoted")]
    newest = seen["rounds"][0]
    assert (newest["report"], seen["rounds"][1]["report"]) == (f"/rounds/{'b' * 20}/report.html", None)
    (food,) = newest["domains"]
    assert (food["change"], food["tags"]) == ("+4.0", "joined, 40 new rows")
    low, at, high = food["at"][1], food["at"][0], food["at"][2]
    assert 0 < food["zero"] < low < at < high < 100
    assert seen["champion"]["short"] == "f" * 10
    assert [event["what"] for event in seen["events"]] == ["left (food)", "promoted"]
    assert seen["head"]["round"] == "Round 3 of 4"


@pytest.mark.parametrize(
    "junk",
    [b"", b"[]", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b'{"state": "running", "stages": 7, "round": 1e999}'],
)
def test_broken_files_are_shown_as_nothing(root: Path, junk: bytes) -> None:
    folder = save(root, record())
    for name in ("live.json", "champion.json", "history.jsonl"):
        (root / name).write_bytes(junk)
    (folder / "record.json").write_bytes(junk)
    seen = look(root)
    assert seen["champion"] is None
    assert json.dumps(seen, allow_nan=False)


def test_history_says_which_rounds_are_finished(root: Path) -> None:
    for key in "abc":
        save(root, record(1), key * 20)
    (root / "champion.json").write_text(json.dumps({"model": "f" * 64}))
    ends = [
        {"event": "refused", "round": "c" * 64, "number": 1}, {"event": "promoted", "round": "a" * 64, "number": 2},
        {"event": "promoted", "round": "b" * 64, "number": None}, {"event": "refused", "round": "../..", "number": 3},
    ]  # fmt: skip
    (root / "history.jsonl").write_text("".join(json.dumps(e) + "\n" for e in ends))
    seen = look(root)
    assert [one["number"] for one in seen["rounds"]] == [2, 1]
    assert seen["champion"]
    with (root / "history.jsonl").open("a") as file:
        file.write(json.dumps({"event": "left", "domain": "food", "model": None}) + "\n")
    assert look(root)["champion"] is None


def test_hostile_texts_lose_hidden_characters(root: Path) -> None:
    live = Live(root, HOSTILE, 1)
    live.stage(HOSTILE)
    live.end(HOSTILE)
    save(root, record(name=HOSTILE, domains={HOSTILE: 3}))
    assert "\u202e" not in json.dumps(look(root), ensure_ascii=False)


def test_every_file_that_is_shown_is_looked_at(root: Path) -> None:
    folder = save(root, record())
    for path in (root / "live.json", root / "history.jsonl", root / "report.html", folder / "report.html"):
        before = signature(root)
        path.write_text("{}")
        assert signature(root) != before, path


def test_labels_in_chinese(root: Path) -> None:
    Live(root, "demo", 2).end()
    assert look(root, "zh")["head"]["word"] == "已完成"
    page = watching.render("zh", "n")
    assert 'lang="zh-CN"' in page
    template = (Path(watching.__file__).parent / "watch.html.j2").read_text()
    state = (Path(watching.__file__).parent / "state.py").read_text()
    known = json.loads((Path(watching.__file__).parents[1] / "zh" / "watch.json").read_text())
    spoken = set(re.findall(r'say\(["\'](.+?)["\']\)', template + state))
    assert len(spoken) > 15
    spoken |= set(_WORDS.values()) | {word for _, word in _STEPS.values()} | set(re.findall(r'"([^"]+)"[,)]', template))
    assert spoken <= set(known)


# What the server answers


def test_page_is_whole_and_closed(root: Path) -> None:
    with serving(root) as server:
        status, headers, page = ask(server)
        assert server.server_address[0] == "127.0.0.1"
    assert status == 200
    (nonce,) = set(re.findall(r'nonce="([^"]+)"', page))
    policy = headers["Content-Security-Policy"]
    assert f"script-src 'nonce-{nonce}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers
    assert not re.findall(r'(?:src|href)="(?!data:|/report\.html)', page)
    assert "innerHTML" not in page


def test_names_that_are_not_ours_are_refused(root: Path) -> None:
    with serving(root) as server:
        assert ask(server, Host=f"localhost:{server.port}")[0] == 200
        for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1", "127.0.0.1:1", "", "[::1]"):
            for path in ("/", "/state", "/events", "/report.html"):
                assert ask(server, path, Host=host)[0] == 403, host
        assert ask(server, "http://evil.example/state")[0] == 403


def test_scripts_of_other_sites_are_refused(root: Path) -> None:
    with serving(root) as server:
        assert ask(server, "/state", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403
        assert ask(server, "/state", Sec_Fetch_Site="same-site", Sec_Fetch_Mode="cors")[0] == 403
        assert ask(server, "/state", Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors")[0] == 200
        assert ask(server, "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200


def test_only_reading_and_only_five_places(root: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("secret")
    folder = save(root, record())
    (folder / "report.html").write_text("one round")
    (root / "report.html").write_text("all rounds")
    outside = root / "rounds" / ("b" * 20)
    outside.mkdir()
    (outside / "report.html").symlink_to(tmp_path / "report.html")
    with serving(root) as server:
        assert ask(server, "/report.html")[2] == "all rounds"
        status, headers, text = ask(server, f"/rounds/{KEY}/report.html")
        assert (status, text) == (200, "one round")
        assert "sandbox" in headers["Content-Security-Policy"]
        status, headers, text = ask(server, "/", "HEAD")
        assert (status, text) == (200, "")
        assert int(headers["Content-Length"]) > 1000
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
            assert ask(server, "/state", method)[0] == 405
        refused = [
            "/../report.html", "/rounds/../report.html", f"/rounds/{KEY}/../../../report.html",  f"/rounds/{KEY}/",
            "/rounds/..%2f..%2f/report.html", "/live.json", "/champion.json", "/report.html?x",
            f"/rounds/{KEY.upper()}/report.html", f"/rounds/{'b' * 20}/report.html", f"/rounds/{'c' * 20}/report.html",
            f"/rounds/{KEY}/record.json", "/report.html/", "/state/", "/favicon.ico", f"/rounds/{KEY}/report.html%00",
        ]  # fmt: skip
        for path in refused:
            assert ask(server, path)[0] == 404, path


def test_state_holds_hostile_texts_as_json(root: Path) -> None:
    Live(root, HOSTILE, 1).end()
    with serving(root) as server:
        status, headers, text = ask(server, "/state")
    assert status == 200
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert json.loads(text)["head"]["name"].startswith("</script>")


def events(server: Server) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("GET", "/events")
    return connection, connection.getresponse()


def next_event(answer: http.client.HTTPResponse) -> dict[str, Any]:
    while True:
        line = answer.readline().decode()
        assert line, "the events ended"
        if line.startswith("data: "):
            found: dict[str, Any] = json.loads(line[6:])
            return found


def test_events_carry_what_changed_within_a_second(root: Path) -> None:
    live = Live(root, "demo", 2)
    with serving(root) as server:
        connection, answer = events(server)
        assert set(next_event(answer)) == {"head", "now", "steps", "rounds", "champion", "stages", "events"}
        began = time.monotonic()
        live.stage("shrink food")
        while (found := next_event(answer)).get("now", {}).get("stage") != "shrink food":
            assert time.monotonic() - began < 5
        seconds = time.monotonic() - began
        print(f"event after {seconds:.2f} s")
        assert seconds < 1
        assert "rounds" not in found
        connection.close()
        live.end()


def test_followers_are_few_and_leave_with_the_server(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_FOLLOWERS", 2)
    with serving(root) as server:
        open_ones = [events(server) for _ in range(2)]
        assert ask(server, "/events")[0] == 503
        assert ask(server, "/state")[0] == 200
        began = time.monotonic()
    for connection, answer in open_ones:
        answer.read()
        connection.close()
    assert time.monotonic() - began < 3


def test_what_cannot_be_watched_is_said(root: Path) -> None:
    with pytest.raises(UsageError, match="no-workspace"):
        make_server(root / "nothing")
    with pytest.raises(UsageError, match="unknown-language"):
        make_server(root, 0, "xx")
    with pytest.raises(UsageError, match=r"\[port\]"):
        make_server(root, 70_000)
    with make_server(root) as server, pytest.raises(UsageError, match="cannot listen"):
        make_server(root, server.port)


def test_interrupt_ends_it_cleanly(root: Path) -> None:
    code = "import pathlib, sys, fanbu.serve.watch as w; w.watch(pathlib.Path(sys.argv[1])); print('over')"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        assert "http://127.0.0.1:" in child.stderr.readline()
        child.send_signal(2)
        out, problems = child.communicate(timeout=10)
    assert (child.returncode, out, problems) == (0, "over\n", "")


# In a browser


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium on the path")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def page_of(browser: Any, server: Server, width: int = 1280) -> Iterator[Any]:
    """The page, which must say nothing on the console and ask for nothing elsewhere."""
    page, said, asked = browser.new_page(viewport={"width": width, "height": 800}), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    yield page
    page.close()
    assert said == []
    assert asked
    assert [url for url in asked if not url.startswith((server.url, "data:"))] == []


def test_browser_shows_a_change_within_two_seconds(root: Path, browser: Any) -> None:
    live = Live(root, "demo", 3)
    live.stage("probe food")
    with serving(root) as server, page_of(browser, server) as page:
        page.get_by_text("probe food").wait_for()
        took = []
        for change, text in (
            (lambda: live.stage("shrink food"), "shrink food"),
            (lambda: live.progress("food", 137, 480), "137 / 480"),
            (lambda: live.stage_done("shrink food", 83.0, False), "1 min 23 s"),
            (lambda: live.round(2), "Round 2 of 3"),
            (lambda: save(root, record(1, False)), "Kept the old one"),
            (lambda: live.end("disk full"), "disk full"),
        ):
            began = time.monotonic()
            change()
            page.get_by_text(text).first.wait_for(timeout=5000)
            took.append(time.monotonic() - began)
        print("seen in the browser after", ", ".join(f"{seconds:.2f} s" for seconds in took))
        assert max(took) < 2
        assert page.locator("#head").get_attribute("class") == "verdict state failed"
        assert page.title() == "Failed · demo"


def test_browser_shows_hostile_names_as_text(root: Path, browser: Any) -> None:
    live = Live(root, HOSTILE, 1)
    live.stage(HOSTILE)
    live.stage_done(HOSTILE, 1, True)
    save(root, record(verdict={"accepted": True, "reason": HOSTILE, "domains": {HOSTILE: {"delta": 0.1}}}))
    (root / "history.jsonl").write_text(json.dumps({"event": HOSTILE, "model": HOSTILE, "reason": HOSTILE}) + "\n")
    with serving(root) as server, page_of(browser, server) as page:
        page.locator("article").wait_for()
        assert page.locator("#name").text_content().startswith("</script><img")
        assert page.locator("img").count() == 0
    live.end()


@pytest.mark.parametrize("width", [360, 1280])
def test_browser_does_not_overflow(root: Path, browser: Any, width: int) -> None:
    live = Live(root, "a-very-long-name-without-any-break-" * 4, 12)
    live.round(2)
    live.stage("shrink_" * 30)
    live.stage_done("distill_contribution_" * 10, 4000, True)
    live.stage("shrink_" * 30)
    row = {"delta": 0.1, "low": -0.2, "high": 0.3, "metric": "accuracy", "holds": False, "role": "guard"}
    verdict = {"accepted": False, "reason": "x" * 300, "domains": {"domain_" * 20: row, "b": {**row, "low": None}}}
    save(root, record(verdict=verdict))
    with serving(root) as server, page_of(browser, server, width) as page:
        page.locator("article").wait_for()
        assert page.evaluate(OVERFLOW) == 0
    live.end()


def test_browser_asks_where_events_do_not_come(root: Path, browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_FOLLOWERS", 1)
    live = Live(root, "demo", 1)
    with serving(root) as server:
        assert server.followers.acquire(blocking=False)
        page = browser.new_page()
        page.goto(server.url)
        live.stage("shrink food")
        page.get_by_text("shrink food").wait_for(timeout=4000)
        page.close()
    live.end()


def test_browser_says_when_the_line_is_lost_and_found(root: Path, browser: Any) -> None:
    with serving(root) as server:
        page, port = browser.new_page(), server.port
        page.goto(server.url)
        page.locator("#word", has_text="Not running").wait_for()
        assert page.locator("#lost").is_hidden()
    page.locator("#lost").wait_for(state="visible", timeout=8000)
    with make_server(root, port) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        page.locator("#lost").wait_for(state="hidden", timeout=10_000)
        page.close()
        server.shutdown()
