"""The OpenAI endpoint: the real client against a running server; answers are those of `generate`."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.request import urlopen

import openai
import pytest
import torch
from serve_fixtures import EVIL, folder_of, serving
from torch.nn.functional import log_softmax

import perce_lite
from perce_lite import notebook
from perce_lite.errors import NotebookError
from perce_lite.model import adapter_files
from perce_lite.model.answering import Stop
from perce_lite.model.generate import generate, load_adapter
from perce_lite.serve.answers import AnswerStream
from perce_lite.serve.desk import Desk
from perce_lite.serve.pool import Pool
from perce_lite.serve.wire import RequestError

pytest_plugins = ["cli_fixtures", "serve_fixtures"]

QUESTION = "write a small note about the garden"
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def server(fleet_folder):
    with serving(None, fleet_folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}v1", api_key="none", max_retries=0, timeout=60)


def asked(client, model: str, tokens: int = 8, messages=MESSAGES, **more):
    extra = {name: more.pop(name) for name in ("profile", "use_adapter", "lean", "personal") if name in more}
    return client.chat.completions.create(
        model=model, messages=messages, max_tokens=tokens, extra_body=extra or None, **more
    )


def text_of(answer) -> str:
    return answer.choices[0].message.content


def generated(folder, user=None, profile=None, use_adapter=True, tokens=8, prompt=QUESTION) -> str:
    """What `perce-lite generate` answers."""
    adapter = perce_lite.load(folder)
    return adapter.generate(prompt, profile=profile, user=user, max_new_tokens=tokens, use_adapter=use_adapter)


# What is there, and who answers


def test_models_are_base_adapters_and_users(client):
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["base", "all", EVIL, "ann", "cy"]
    assert models["ann"].kind == "user"
    assert models["ann"].gain is not None
    assert models["cy"].gain is None
    assert client.models.retrieve("all").kind == "adapter"
    assert client.models.retrieve("user:ann").id == "ann"


def test_two_users_at_once_get_their_own_adapters(client, fleet_folder):
    expected = {
        "ann": generated(folder_of(fleet_folder, "user", "ann"), "ann"),
        EVIL: generated(folder_of(fleet_folder, "user", EVIL), EVIL),
        "cy": generated(folder_of(fleet_folder, "all", "all"), "cy"),
    }
    assert len(set(expected.values())) == 3
    users = ["ann", EVIL, "cy"] * 3
    with ThreadPoolExecutor(len(users)) as threads:
        answers = list(threads.map(lambda user: text_of(asked(client, user)), users))
    assert answers == [expected[user] for user in users]


def test_the_base_answers_as_if_there_were_no_adapters(client, fleet_folder):
    folder = folder_of(fleet_folder, "user", "ann")
    text_of(asked(client, "ann"))  # whose adapter is on the base now
    base = generated(folder, profile="", use_adapter=False)
    assert text_of(asked(client, "base")) == base
    assert text_of(asked(client, "base", use_adapter=True)) == base
    assert text_of(asked(client, "ann", use_adapter=False)) == generated(folder, "ann", use_adapter=False)


def test_a_profile_of_the_request_goes_before_the_users_own(client, fleet_folder):
    folder = folder_of(fleet_folder, "user", "ann")
    own = asked(client, "ann")
    assert "otter" not in own.profile
    with_otters = asked(client, "ann", profile="I keep an otter.")
    assert with_otters.profile == "I keep an otter."
    assert text_of(with_otters) == generated(folder, profile="I keep an otter.")
    without = asked(client, "ann", profile=None)
    assert without.profile == ""
    assert text_of(without) == generated(folder, profile="")
    assert own.usage.prompt_tokens > without.usage.prompt_tokens


def test_an_adapter_that_needs_no_profile_is_asked_without(server, client, monkeypatch):
    directory = server.service.directory
    plain = directory.metadata_of
    monkeypatch.setattr(directory, "metadata_of", lambda entry: {**plain(entry), "train_on": "counterfactual"})
    assert asked(client, "ann", 1).profile == ""
    assert asked(client, "ann", 1, profile="Otters.").profile == "Otters."


def test_a_conversation_is_put_as_chat_puts_it(client, fleet_folder):
    its = load_adapter(adapter_files.read_metadata(folder_of(fleet_folder, "user", "ann")))
    turns = [*MESSAGES, {"role": "assistant", "content": "An otter."}, {"role": "user", "content": "And then?"}]
    answer = asked(client, "ann", 4, [{"role": "developer", "content": "Be brief."}, *turns], profile="Otters.")
    system = {"role": "system", "content": "Be brief."}
    assert answer.usage.prompt_tokens == len(its.maker.prompt_ids([system, *turns], "Otters."))
    assert answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 4
    assert answer.choices[0].finish_reason == "length"
    parts = [{"type": "text", "text": QUESTION[:5]}, {"type": "text", "text": QUESTION[5:]}]
    assert text_of(asked(client, "ann", messages=[{"role": "user", "content": parts}])) == text_of(asked(client, "ann"))


# Streams


@pytest.mark.parametrize("model", ["ann", "base"])
def test_a_stream_joins_to_the_answer(client, model):
    whole = asked(client, model, 12)
    chunks = list(asked(client, model, 12, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == text_of(whole)
    assert sum(map(bool, pieces)) > 2
    assert chunks[0].profile == whole.profile
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_put_the_prompt_as_generate_does(client, fleet_folder):
    expected = generated(folder_of(fleet_folder, "user", "ann"), "ann")
    whole = client.completions.create(model="ann", prompt=QUESTION, max_tokens=8)
    assert whole.choices[0].text == expected
    stream = client.completions.create(model="ann", prompt=[QUESTION], max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_a_stop_text_ends_an_answer_and_is_left_out(client):
    whole = text_of(asked(client, "ann", 20))
    stop = whole[len(whole) // 2 :][:3]
    expected = whole[: whole.index(stop)].rstrip()
    answer = asked(client, "ann", 20, stop=["never said", stop])
    assert text_of(answer) == expected
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 20
    chunks = list(asked(client, "ann", 20, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_a_seed_repeats_what_was_drawn(client):
    def drawn(seed):
        return text_of(asked(client, "ann", 12, temperature=1.5, top_p=0.95, seed=seed))

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1
    assert text_of(asked(client, "ann", 12, temperature=0, seed=3)) == text_of(asked(client, "ann", 12))


class Letters:
    """A tokenizer whose ids are the bytes of UTF-8."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("said", "stops", "text", "ended"),
    [
        (" \n a b \n", (), "a b", False),
        ("naïve 抹茶 🦦", (), "naïve 抹茶 🦦", False),
        ("one\n\ntwo", ("\n\n",), "one", True),
        ("one\ntwo\n", ("\n\n",), "one\ntwo", False),
        ("aab", ("ab",), "a", True),
        ("ab", ("abc",), "ab", False),
        ("xyz", ("z", "y"), "x", True),
        ("stop", ("stop",), "", True),
    ],
)
def test_pieces_join_to_what_is_said(said, stops, text, ended):
    pieces: list[str] = []
    stream = AnswerStream(Letters(), stops, stop := Stop(), pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for byte in said.encode():
        if not stop.asked:
            stream.put(torch.tensor([byte]))
    stream.end()
    assert "".join(pieces) == stream.text == text
    assert "" not in pieces
    assert (stream.ended, stop.asked) == (ended, ended)
    assert bytes(stream.shown_ids()).decode().strip() == text


# How an answer leans on the profile


@pytest.mark.parametrize("use_adapter", [True, False])
def test_lean_is_the_pir_of_inspect(client, fleet_folder, use_adapter):
    answer = asked(client, "ann", 6, profile="I keep an otter.", lean=True, use_adapter=use_adapter)
    units = answer.choices[0].lean
    its = load_adapter(adapter_files.read_metadata(folder_of(fleet_folder, "user", "ann")))
    assert "".join(unit["text"] for unit in units if not unit["end_of_turn"]).strip() == text_of(answer)
    taken = AnswerStream(its.maker.tokenizer, (), Stop(), lambda piece: None)
    generate(its.model, its.maker, MESSAGES, "I keep an otter.", 6, use_adapter, stream=taken)
    ids = taken.ids
    assert len(ids) == answer.usage.completion_tokens == sum(len(unit["token_pirs"]) for unit in units)

    def log_probs(profile: str, adapter: bool) -> list[float]:
        prompt = its.maker.prompt_ids(MESSAGES, profile)
        with torch.no_grad():
            if adapter:
                logits = its.model(input_ids=torch.tensor([prompt + ids])).logits
            else:
                with its.model.disable_adapter():
                    logits = its.model(input_ids=torch.tensor([prompt + ids])).logits
        every = log_softmax(logits[0, len(prompt) - 1 : -1].double(), -1)
        return every.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()

    factual, counterfactual = log_probs("I keep an otter.", use_adapter), log_probs("", False)
    expected = [one - other for one, other in zip(factual, counterfactual, strict=True)]
    assert [pir for unit in units for pir in unit["token_pirs"]] == pytest.approx(expected, abs=1e-4)
    assert sum(unit["factual"] for unit in units) == pytest.approx(sum(factual), abs=1e-4)


def test_lean_comes_with_a_stream_and_never_without_a_profile(client):
    whole = asked(client, "ann", 4, lean=True)
    *_, last = asked(client, "ann", 4, lean=True, stream=True)
    assert last.choices[0].lean == whole.choices[0].lean
    assert not hasattr(asked(client, "ann", 4, lean=True, profile=None).choices[0], "lean")
    assert not hasattr(asked(client, "ann", 4).choices[0], "lean")


@pytest.mark.parametrize("use_adapter", [True, False])
def test_personal_is_that_of_generate(client, fleet_folder, use_adapter):
    folder, more = folder_of(fleet_folder, "user", "ann"), {"use_adapter": use_adapter}
    answers = {strength: text_of(asked(client, "ann", 10, personal=strength, **more)) for strength in (0, 1, 4)}
    for strength, answer in answers.items():
        expected = perce_lite.load(folder).generate(QUESTION, user="ann", max_new_tokens=10, personal=strength, **more)
        assert answer == expected
    assert len(set(answers.values())) > 1
    assert text_of(asked(client, "ann", 10, **more)) == answers[0]


# Errors, in OpenAI's form


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"model": "cohort:press"}, 404, "model"),
        ({"n": 2}, 400, "n"),
        ({"temperature": 3}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10**6}, 400, "messages"),
        ({"stop": list("abcde")}, 400, "stop.constrained-str"),
        ({"presence_penalty": 1}, 400, "presence_penalty"),
        ({"extra_body": {"personal": 11}}, 400, "personal"),
        ({"extra_body": {"personal": 1, "profile": None}}, 400, "personal"),
        ({"extra_body": {"no_such_field": 2}}, 400, "no_such_field"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "An"}]}, 400, "messages"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(client, change, status, param):
    with pytest.raises(openai.APIStatusError) as refusal:
        client.chat.completions.create(**{"model": "ann", "messages": MESSAGES, **change})
    error = refusal.value.body
    assert refusal.value.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == param.split(".")[0]


def test_a_fault_of_the_server_is_told_without_texts(server, client, monkeypatch, capfd):
    def broken(*args):
        raise ValueError(f"what was asked: {QUESTION}")

    monkeypatch.setattr(server.service.answers.pool, "take", broken)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as refusal:
            asked(client, "ann", stream=stream)
        assert refusal.value.body["type"] == "server_error"
    told = capfd.readouterr()
    assert "ValueError in" in told.err
    assert QUESTION not in told.out + told.err + str(refusal.value.body)
    monkeypatch.undo()
    assert text_of(asked(client, "ann"))


def test_one_adapter_serves_the_users_of_its_data(adapter_folder):
    with serving(adapter_folder, None) as server:
        client = openai.OpenAI(base_url=f"{server.url}v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["base", "adapter", "user0", "user1", "user2"]
        assert text_of(asked(client, "user1")) == generated(adapter_folder, "user1")
        assert text_of(asked(client, "adapter")) == generated(adapter_folder, profile="")


# Adapters in memory


def test_adapters_are_dropped_by_least_use_and_come_back_the_same(fleet_folder):
    folders = [folder_of(fleet_folder, *key) for key in (("user", "ann"), ("user", EVIL), ("all", "all"))]
    ann, evil, shared = map(adapter_files.read_metadata, folders)
    size = adapter_files.weights_bytes(folders[0])
    pool = Pool(shared, limit=2 * size)

    def says(metadata, on=True):
        return pool.take(metadata).answer(MESSAGES, "Otters.", on, 8, Stop())

    base = says(None, on=False)
    first = {name: says(metadata) for name, metadata in (("ann", ann), ("evil", evil))}
    assert (pool.adapters, pool.bytes, pool.loads) == (2, 2 * size, 2)
    says(ann)
    says(shared)  # in the place of evil, who was used least
    assert (pool.adapters, pool.loads) == (2, 3)
    assert says(ann) == first["ann"]
    assert pool.loads == 3
    assert says(evil) == first["evil"]
    assert pool.loads == 4
    assert says(None, on=False) == base
    assert len({base, *first.values()}) == 3
    small = Pool(shared, limit=1)
    for metadata, name in ((ann, "ann"), (evil, "evil"), (ann, "ann")):  # one at a time, larger than the limit
        assert small.take(metadata).answer(MESSAGES, "Otters.", True, 8, Stop()) == first[name]
        assert small.adapters == 1


def test_an_adapter_that_cannot_be_loaded_leaves_the_base_as_it_was(fleet_folder, tmp_path):
    shared = adapter_files.read_metadata(folder_of(fleet_folder, "all", "all"))
    pool = Pool(shared, limit=2**30)
    base = pool.take(None).answer(MESSAGES, "", False, 8, Stop())
    own = pool.take(shared).answer(MESSAGES, "", True, 8, Stop())
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "perce_lite.json"):
        (broken / name).write_bytes((folder_of(fleet_folder, "user", "ann") / name).read_bytes())
    (broken / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(Exception, match=r"header|deserializ"):
        pool.take({**shared, "folder": str(broken)})
    assert pool.take(None).answer(MESSAGES, "", False, 8, Stop()) == base
    assert pool.take(shared).answer(MESSAGES, "", True, 8, Stop()) == own


# One at a time


def test_turns_come_in_order_and_the_queue_has_an_end():
    async def story():
        desk, order, first_may_end = Desk(max_queue=2, patience=60), [], threading.Event()

        def work(name):
            if name == "first":
                first_may_end.wait(60)
            order.append(name)
            return name

        first = await desk.start(lambda: work("first"))
        waiting = [asyncio.create_task(desk.start(lambda name=name: work(name))) for name in ("second", "third")]
        await asyncio.sleep(0)
        with pytest.raises(RequestError) as refusal:
            await desk.start(lambda: work("fourth"))
        assert (refusal.value.status, refusal.value.code) == (429, "queue_full")
        waiting[0].cancel()  # a client that goes away frees its place
        await asyncio.wait(waiting[:1])
        fifth = asyncio.create_task(desk.start(lambda: work("fifth")))
        await asyncio.sleep(0)
        first_may_end.set()
        assert [await first, await (await waiting[1]), await (await fifth)] == ["first", "third", "fifth"]
        assert order == ["first", "third", "fifth"]
        while desk.busy:
            await asyncio.sleep(0)
        assert await (await desk.start(lambda: work("last"))) == "last"

    asyncio.run(story())


def test_who_waits_for_too_long_or_at_the_end_is_sent_away():
    async def story():
        desk, may_end = Desk(max_queue=2, patience=0.01), threading.Event()
        first = await desk.start(lambda: may_end.wait(60))
        with pytest.raises(RequestError) as refusal:
            await desk.start(lambda: None)
        assert (refusal.value.status, refusal.value.code) == (503, "timeout")
        assert desk.waiting == 0
        desk.patience = 60
        waiting = asyncio.create_task(desk.start(lambda: None))
        await asyncio.sleep(0)
        desk.close()
        for late in (waiting, desk.start(lambda: None)):
            with pytest.raises(RequestError) as refusal:
                await late
            assert (refusal.value.status, refusal.value.code) == (503, "shutting_down")
        may_end.set()
        assert await first is True

    asyncio.run(story())


@contextmanager
def slowly(server, monkeypatch):
    """Inside, each token of an answer waits until it is let go; gives the number of tokens so far, and that."""
    model = server.service.answers.pool._base.model
    forward, seen, go = type(model).forward, [], threading.Event()

    def waiting(self, *args, **inputs):
        seen.append(1)
        if len(seen) > 2:
            go.wait(60)
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(model), "forward", waiting)
    try:
        yield seen, go
    finally:
        go.set()
        monkeypatch.undo()


def until(holds) -> None:
    """Waits for as long as it takes."""
    while not holds():
        time.sleep(0.01)


def ask_raw(server, body: dict) -> socket.socket:
    """A request on a socket of its own, that can be closed at any moment."""
    host, port = server._listening.getsockname()
    connection = socket.create_connection((host, port), timeout=60)
    text = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(text)}\r\n\r\n".encode() + text)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_turn(server, client, monkeypatch, stream):
    expected = text_of(asked(client, "ann"))
    heard = threading.Event()

    class Heard(Stop):
        def ask(self):
            super().ask()
            heard.set()

    monkeypatch.setattr("perce_lite.serve.app.Stop", Heard)
    with slowly(server, monkeypatch) as (seen, go):
        connection = ask_raw(server, {"model": "ann", "messages": MESSAGES, "max_tokens": 500, "stream": stream})
        until(lambda: len(seen) > 2)
        connection.close()
        desk = server.service.desk
        assert desk.busy
        assert heard.wait(60)
        go.set()
        until(lambda: not desk.busy)
        assert len(seen) < 6
    assert text_of(asked(client, "ann")) == expected


def test_a_full_queue_is_429_and_frees_itself(fleet_folder, monkeypatch):
    with serving(None, fleet_folder, max_queue=0) as server:
        client = openai.OpenAI(base_url=f"{server.url}v1", api_key="none", max_retries=0)
        text_of(asked(client, "ann", 1))
        with slowly(server, monkeypatch) as (seen, _):
            connection = ask_raw(server, {"model": "ann", "messages": MESSAGES, "max_tokens": 9})
            until(lambda: len(seen) > 2)
            with pytest.raises(openai.RateLimitError) as refusal:
                asked(client, "ann")
            assert refusal.value.body["code"] == "queue_full"
            assert refusal.value.response.headers["retry-after"] == "2"
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        connection.close()


def test_an_answer_that_takes_too_long_is_ended(fleet_folder):
    with serving(None, fleet_folder, answer_seconds=0.0) as server:
        client = openai.OpenAI(base_url=f"{server.url}v1", api_key="none", max_retries=0)
        answer = asked(client, "ann", 500)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens < 500


# The command


def test_ctrl_c_finishes_what_is_under_way(fleet_folder):
    code = "from perce_lite.cli.app import main; main()"
    words = [sys.executable, "-c", code, "serve", "--fleet", str(fleet_folder), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        url, models = first.split()[2], process.stdout.readline()
        client = openai.OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0)
        stream = iter(asked(client, "ann", 60, stream=True))
        next(stream)
        process.send_signal(signal.SIGINT)
        pieces = [chunk.choices[0].finish_reason for chunk in stream]
        assert pieces[-1] in ("length", "stop")
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped. Nothing was written; who waited for an answer was sent away." in err
    assert "up to 1024 MiB" in models
    assert QUESTION not in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--host", "0.0.0.0"], "needs --api-key-file FILE"),
        (["--allow-host", "home.example"], "needs --api-key-file FILE"),
        (["--host", "192.0.2.1", "--api-key-file", "good.txt"], "cannot be listened to"),
        (["--api-key-file", "none.txt"], "none.txt: cannot be read"),
        (["--api-key-file", "short.txt"], "short.txt, line 2: a key is 16 or more"),
        (["--api-key-file", "twice.txt"], "twice.txt, line 2: this key stands there twice"),
        (["--api-key-file", "empty.txt"], "empty.txt: holds no key"),
        (["--api-key-file", "zoe.txt"], "a key is tied to zoe, and there is no such user"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(fleet_folder, run, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    key = "k" * 16
    for name, text in (("short", f"{key}\nshort"), ("twice", f"{key}\n{key} ann"), ("empty", "# none\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "good.txt").write_text(key)
    (tmp_path / "zoe.txt").write_text(f"{key} zoe")
    code, _, err = run("serve", "--fleet", fleet_folder, "--port", "0", *words)
    assert code == 2
    assert told in " ".join(err.split())


def test_an_address_that_is_taken_is_told(fleet_folder, run, adapter_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = run("serve", adapter_folder, "--port", str(taken.getsockname()[1]))
    assert code == 2
    assert "0 takes a free one" in " ".join(err.split())
    for words in ((), (adapter_folder, "--fleet", fleet_folder)):
        assert "give an adapter's folder" in " ".join(run("serve", *words)[2].replace("│", " ").split())
    assert run("serve", "--fleet", os.devnull + "/none")[0] == 2


def test_the_benchmark_measures_three_ways(adapter_folder, figures, run):
    measured = figures("bench", "--serve", adapter_folder, "--repeats", "2")
    assert list(measured["ways"]) == ["generate", "served, in memory", "served, from disk"]
    for way in measured["ways"].values():
        assert way["first_token_s"] > 0
        assert way["tokens_per_s"] > 0
    code, _, err = run("bench", "mine.yaml", "--serve", adapter_folder)
    assert code == 2
    assert "RECIPE has no part in --serve" in " ".join(err.replace("│", " ").split())


def test_one_call_opens_the_page_in_a_notebook(adapter_folder, fleet_folder):
    first = notebook.serve(adapter_folder)
    client = openai.OpenAI(base_url=f"{first.src}v1", api_key="none", max_retries=0)
    assert len(list(client.models.list())) == 5
    with urlopen(first.src) as page:
        assert "frame-ancestors" not in page.headers["content-security-policy"]
    second = notebook.serve(fleet=fleet_folder)
    assert f'src="{second.src}' in second._repr_html_()
    with pytest.raises(openai.APIConnectionError):  # the earlier one has ended
        client.models.list()
    with urlopen(second.src) as page:
        assert page.status == 200
    with pytest.raises(NotebookError):
        notebook.serve()
    notebook._serving.close()
