"""Who may ask, by which name, and for whom: properties of every request, over a registry without any model."""

import asyncio
import json
import logging
import string
from urllib.parse import quote

import httpx
import openai
import pytest
from fleet_fixtures import Clock, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_fixtures import serving

from perce_lite.fleet.fleet import fleet
from perce_lite.model import adapter_files
from perce_lite.recipe import load_recipe
from perce_lite.serve.app import Service, build_app
from perce_lite.serve.desk import Desk
from perce_lite.serve.directory import Fleet, user_id
from perce_lite.serve.guard import MAX_BODY, Hosts, is_loopback
from perce_lite.serve.keys import Caller, read_keys
from perce_lite.serve.wire import Answer, Begun

pytest_plugins = ["cli_fixtures", "serve_fixtures"]

USERS = ["ann", "bob", "base", "all", "user:ann", "cohort:x", "../../secret", "a/b?c#d", "<script>", "Zoë 🦦"]
ANN, ALL = "k-of-ann-0123456789", "k-of-all-0123456789"
SECRET = "my secret is a marmot"
CHAT = {"messages": [{"role": "user", "content": "Who?"}]}


class Echo:
    """Stands for the answers: tells who would have answered."""

    def answer(self, entry, question, stop, emit):
        begun = Begun("", 1)
        emit(begun)
        return Answer(begun, f"{entry.kind} {entry.name}", "stop", 1)


@pytest.fixture(scope="module")
def registry(tmp_path_factory, toy):
    """A fleet of `USERS`, whose adapters are metadata alone."""
    folder = tmp_path_factory.mktemp("registry")
    names = dict(zip((f"user{number}" for number in range(len(USERS))), USERS, strict=True))
    rows = [{**row, "user": names[row["user"]]} for row in rows_of(len(USERS))]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = f"train: {{output_dir: {folder / 'out'}, store: null}}\nfleet: {{gate: null, slots: 1, min_examples: 4}}\n"
    (folder / "r.yaml").write_text(f"model: {toy}\nquantization: none\ndevice: cpu\ndata: {{path: rows.jsonl}}\n{out}")
    fleet(load_recipe(folder / "r.yaml"), Clock())
    return folder / "out"


@pytest.fixture(scope="module")
def app(registry, toy, tmp_path_factory):
    """Makes the application; a registry whose adapters have no weights needs metadata that say so."""
    reference = {"recipe": {"model": str(toy), "data": {"path": str(registry.parent / "rows.jsonl")}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_files, "read_metadata", lambda folder: reference)
        directory = Fleet(registry)
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(f"# whose is whose\n{ANN} ann\n\n{ALL}\n")

    def make(with_keys=False, bound="127.0.0.1", names=()):
        keys = read_keys(file if with_keys else None)
        return build_app(Service(directory, Echo(), Desk(4, 60)), Hosts(bound, names), keys)

    return make


def sent(app, method: str, path: str, host="127.0.0.1:8000", key=None, **more) -> httpx.Response:
    """What the application answers to one request."""

    async def send():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        headers = {"host": host, **({"authorization": f"Bearer {key}"} if key else {}), **more.pop("headers", {})}
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, headers=headers, **more)

    return asyncio.run(send())


def refused(response: httpx.Response, status: int) -> dict:
    """The error of a refusal, which has OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# The name by which the server is called, and the page that asks

GOOD = ["localhost", "LOCALHOST:1", "127.0.0.1", "127.8.8.8:80", "[::1]", "[::1]:8000"]
names = st.text(string.ascii_letters + string.digits + ".-:[]@/\\ #?%", max_size=40)


@pytest.mark.parametrize("host", GOOD)
def test_loopback_names_come_in(app, host):
    assert sent(app(), "GET", "/v1/models", host).status_code == 200


@settings(max_examples=300, deadline=None)
@given(names)
def test_no_other_name_comes_in(name):
    if Hosts("127.0.0.1").allows(name):
        bare = name.rpartition(":")[0] if name.rpartition(":")[2].isdigit() or name.endswith(":") else name
        assert bare.lower() == "localhost" or is_loopback(bare.strip("[]"))


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.7", "evil@127.0.0.1",
     "127.0.0.1@evil.example", "127.0.0.1/evil", "0.0.0.0", "", "localhost#.evil.example", "evil.example\\@localhost"],
)  # fmt: skip
def test_a_rebound_name_is_refused(app, host):
    assert refused(sent(app(), "GET", "/", host), 403)["code"] == "host"
    assert refused(sent(app(), "POST", "/v1/chat/completions", host, json={"model": "ann", **CHAT}), 403)


def test_another_host_may_be_called_by_its_addresses_and_names():
    hosts = Hosts("0.0.0.0", ["Home.Example"])
    for name in ("192.168.1.7:8000", "[fe80::1]", "home.example", "localhost"):
        assert hosts.allows(name)
    for name in ("evil.example", "home.example.evil.example", None):
        assert not hosts.allows(name)


@settings(max_examples=60, deadline=None)
@given(
    origin=st.one_of(
        names.map(lambda name: f"http://{name}"), st.sampled_from(["null", "file://", "https://localhost"])
    )
)
def test_no_page_of_another_site_may_ask(app, origin):
    response = sent(app(), "POST", "/v1/completions", headers={"origin": origin}, json={"model": "ann", "prompt": "?"})
    same = origin.partition("//")[2].lower() == "127.0.0.1:8000"
    assert response.status_code == (200 if same else 403)


def test_what_a_browser_says_of_its_page(app):
    server = app()
    body = {"model": "ann", "prompt": "?"}
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        headers = {"sec-fetch-site": site}
        assert sent(server, "POST", "/v1/completions", headers=headers, json=body).status_code == status
        assert sent(server, "GET", "/v1/models", headers=headers).status_code == status
        assert sent(server, "GET", "/", headers=headers).status_code == 200  # a link to the page
    ours = {"origin": "http://127.0.0.1:8000"}
    assert sent(server, "POST", "/v1/completions", headers=ours, json=body).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        plain = {"content-type": kind}
        assert refused(sent(server, "POST", "/v1/completions", headers=plain, content=json.dumps(body)), 415)


# Keys


@settings(max_examples=60, deadline=None)
@given(key=st.one_of(st.none(), st.text(string.printable.strip(), max_size=40), st.sampled_from([ANN[:-1], ANN + "x"])))
def test_without_a_key_nothing_is_said(app, key):
    server = app(with_keys=True)
    if key in (ANN, ALL):
        return
    for path in (
        "/v1/models",
        "/v1/models/ann",
        "/v1/models/nobody",
        "/perce/held-out?model=ann",
        "/perce/page",
        "/none",
    ):
        assert refused(sent(server, "GET", path, key=key), 401)["message"].startswith("A key is needed")
    assert refused(sent(server, "POST", "/v1/chat/completions", key=key, json={"model": "ann", **CHAT}), 401)
    assert sent(server, "GET", "/", key=key).status_code == 200


def seen_through(server, key: str, model: str) -> list[tuple[int, dict]]:
    """What a key gets to see of a model, wherever it may be asked for."""
    chat, prompt = {"model": model, **CHAT}, {"model": model, "prompt": "Who?"}
    responses = [
        sent(server, "GET", f"/v1/models/{quote(model, safe='')}", key=key),
        sent(server, "GET", "/perce/held-out", key=key, params={"model": model}),
        sent(server, "POST", "/v1/chat/completions", key=key, json=chat),
        sent(server, "POST", "/v1/chat/completions", key=key, json={**chat, "stream": True}),
        sent(server, "POST", "/v1/completions", key=key, json=prompt),
        sent(server, "POST", "/v1/completions", key=key, json={**prompt, "profile": "x", "use_adapter": False}),
    ]
    return [(response.status_code, response.json()) for response in responses]


@settings(max_examples=80, deadline=None)
@given(st.one_of(st.sampled_from([name for user in USERS for name in (user, user_id(user), f"user:{user}")]),
                 st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)))  # fmt: skip
def test_a_key_of_ann_sees_no_difference_between_another_user_and_nobody(app, model):
    server = app(with_keys=True)
    if model in ("ann", "user:ann", "base"):
        return
    nobody = {"message": f"The model {model!r} does not exist.", "param": "model", "code": "model_not_found"}
    for status, body in seen_through(server, ANN, model):
        assert (status, body) == (404, {"error": {**nobody, "type": "invalid_request_error"}})


def test_a_key_of_ann_is_her_own(app):
    server = app(with_keys=True)
    assert [model["id"] for model in sent(server, "GET", "/v1/models", key=ANN).json()["data"]] == ["base", "ann"]
    every = [model["id"] for model in sent(server, "GET", "/v1/models", key=ALL).json()["data"]]
    assert every == ["base", "all", *(user_id(user) for user in sorted(USERS))]
    assert len(set(every)) == len(every)
    rows = sent(server, "GET", "/perce/held-out?model=ann", key=ANN).json()["rows"]
    assert len(rows) == 2
    assert all(set(row) == {"query", "written"} for row in rows)
    for model in ("ann", "user:ann"):
        answer = sent(server, "POST", "/v1/chat/completions", key=ANN, json={"model": model, **CHAT}).json()
        assert answer["choices"][0]["message"]["content"] == "user ann"


@pytest.mark.parametrize("user", USERS)
def test_every_user_can_be_asked_whatever_the_name(app, user):
    answer = sent(app(), "POST", "/v1/chat/completions", json={"model": user_id(user), **CHAT}).json()
    assert answer["choices"][0]["message"]["content"] == f"user {user}"
    assert Caller("ann") != Caller(user) or user == "ann"


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=60))
def test_a_name_is_never_a_path(app, model):
    """No file is looked at for a name that the registry does not know."""
    server = app()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_files, "read_metadata", lambda folder: pytest.fail(f"{folder} was read"))
        response = sent(server, "POST", "/v1/chat/completions", json={"model": model, **CHAT})
    known = {name for user in USERS for name in (user_id(user), user, f"user:{user}")} | {"base", "all"}
    assert response.status_code in ((200,) if model in known else (404, 400))


# Bodies


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
fields = ["model", "messages", "prompt", "temperature", "top_p", "max_tokens", "stop", "seed", "n", "stream", "profile",
          "use_adapter", "lean", "stream_options", "tools", "personal"]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.one_of(json_values, st.dictionaries(st.sampled_from(fields), json_values, max_size=5)), st.booleans())
def test_no_body_breaks_the_server(app, body, chat):
    path = "/v1/chat/completions" if chat else "/v1/completions"
    good = {"model": "ann", **(CHAT if chat else {"prompt": "?"})}
    whole = {**good, **body} if isinstance(body, dict) else body
    content = json.dumps(whole).encode()
    response = sent(app(), "POST", path, content=content, headers={"content-type": "application/json"})
    if response.status_code != 200:
        error = refused(response, response.status_code)
        assert response.status_code in (400, 404)
        assert error["type"] == "invalid_request_error"


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_bytes_that_are_no_json_are_refused(app, content):
    try:
        json.loads(content)
    except ValueError:
        response = sent(app(), "POST", "/v1/completions", content=content, headers={"content-type": "application/json"})
        assert refused(response, 400)["code"] == "invalid_json"


def test_deep_and_large_bodies(app):
    server, kind = app(), {"content-type": "application/json"}
    deep = b"[" * 200_000 + b"]" * 200_000
    assert refused(sent(server, "POST", "/v1/completions", content=deep, headers=kind), 400)
    fitting = json.dumps({"model": "ann", "prompt": "x" * (MAX_BODY - 100)}).encode()
    assert sent(server, "POST", "/v1/completions", content=fitting, headers=kind).status_code == 200
    assert refused(sent(server, "POST", "/v1/completions", content=b" " * (MAX_BODY + 1), headers=kind), 413)
    read = []

    async def endless():
        while True:
            read.append(1)
            yield b" " * 65536

    assert refused(sent(server, "POST", "/v1/completions", content=endless(), headers=kind), 413)
    assert len(read) <= MAX_BODY // 65536 + 1  # no more is read than may be


def test_other_paths_and_methods_have_the_same_form(app):
    server = app()
    for path in ("/docs", "/openapi.json", "/v1/none", "/page.css/../../wire.py", "/../serve/wire.py"):
        assert refused(sent(server, "GET", path), 404)
    assert refused(sent(server, "PUT", "/v1/models"), 405)
    assert refused(sent(server, "GET", "/perce/held-out"), 400)


def test_the_page_loads_nothing_from_elsewhere(app):
    for path in ("/", "/page.css", "/page.js"):
        response = sent(app(), "GET", path)
        assert response.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "//" not in response.text.replace("http://www.w3.org", "").replace("// ", "")


def test_prompts_and_profiles_are_not_logged(fleet_folder, capfd, caplog):
    with caplog.at_level(logging.DEBUG, "perce_lite"), serving(None, fleet_folder) as server:
        client = openai.OpenAI(base_url=f"{server.url}v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": SECRET}]
        client.chat.completions.create(model="ann", messages=messages, max_tokens=2, extra_body={"profile": SECRET})
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=SECRET, messages=messages)
        with pytest.raises(openai.BadRequestError) as refusal:
            client.chat.completions.create(model="ann", messages=messages, extra_body={"profile": {"text": SECRET}})
        assert SECRET not in str(refusal.value.body)
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err + caplog.text
