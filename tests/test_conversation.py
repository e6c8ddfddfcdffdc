"""Talking to an adapter: scripted lines, a toy model; what is said equals what `generate` says."""

import io
import os
import pty
import signal
import subprocess
import sys

import pytest
import torch
import toys
from transformers.cache_utils import DynamicCache

from perce_lite.cli.conversation import Conversation, chat, talk, typed
from perce_lite.model import adapter_files
from perce_lite.model.answering import Answerer, Kept, Stop
from perce_lite.model.generate import generate, load_adapter

pytest_plugins = ["cli_fixtures"]


@pytest.fixture
def its(adapter_folder):
    """That adapter, loaded."""
    return load_adapter(adapter_files.read_metadata(adapter_folder))


def said(its, messages, profile="", use_adapter=True, tokens=8):
    """What `generate` answers, with nothing kept from an earlier answer."""
    turns = [{"role": role, "content": text} for role, text in messages]
    return generate(its.model, its.maker, turns, profile, tokens, use_adapter)


def talked(its, lines, capfd, tokens=8, **options):
    """Answers on standard output, and what was told beside them."""
    told: list[str] = []
    conversation = Conversation(Answerer(its), tokens, told.append, **options)
    capfd.readouterr()
    talk(conversation, lines)
    return capfd.readouterr().out, told, conversation


@pytest.mark.parametrize("profile_pass", ["full", "frozen"])
def test_answers_are_those_of_generate_turn_after_turn(its, capfd, profile_pass):
    its.maker.frozen_profile = profile_pass == "frozen"
    questions = ["Who are you?", "Write a note about the garden.", "And the harbour?"]
    out, told, conversation = talked(its, [*questions, "", "/quit", "never asked"], capfd, profile="An otter.")
    messages, expected = [], []
    for question in questions:
        messages.append(("user", question))
        expected.append(said(its, messages, "An otter."))
        messages.append(("assistant", expected[-1]))
    assert conversation.turns == list(zip(questions, expected, strict=True))
    assert told == []
    assert len(set(expected)) > 1
    position = 0
    for answer in expected:  # streamed, in this order
        position = out.index(answer, position) + len(answer)


def test_a_prompt_that_starts_like_the_last_one_is_read_only_once(its, capfd, monkeypatch):
    read = []
    forward = its.model.get_base_model().forward

    def counted(*args, input_ids=None, **inputs):
        read.append(input_ids.shape[1])
        return forward(*args, input_ids=input_ids, **inputs)

    monkeypatch.setattr(its.model.get_base_model(), "forward", counted)
    _, _, conversation = talked(its, ["Who are you?", "And I?"], capfd, tokens=3, profile="A long profile " * 20)
    prompts = [length for length in read if length > 1]
    assert len(prompts) == 2
    first = its.maker.prompt_ids([{"role": "user", "content": "Who are you?"}], conversation.profile.strip())
    assert prompts[0] == len(first) > 100
    assert prompts[1] < 40


def test_a_cache_is_cut_to_what_two_prompts_share():
    def kept():
        cache = DynamicCache()
        cache.update(torch.arange(5.0).view(1, 1, 5, 1), torch.zeros(1, 1, 5, 1), 0)
        return Kept(True, [7, 8, 9], cache)  # two more ids were answered

    for ids, length in (([7, 8, 9, 1], 3), ([7, 8, 1, 1], 2), ([7, 8, 9], 2), ([7, 8], 1)):
        cache = kept().start_of(ids, 0, use_adapter=True)
        assert cache.layers[0].keys.flatten().tolist() == list(range(length))
    assert kept().start_of([1, 8, 9], 0, use_adapter=True) is None
    assert kept().start_of([7, 8, 9, 1], 0, use_adapter=False) is None
    assert kept().start_of([7, 8, 1, 1], 2, use_adapter=True) is not None
    assert kept().start_of([7, 8, 1, 1], 3, use_adapter=True) is None, "a prefix is there whole or not at all"


def test_base_and_compare(its, capfd):
    question = [("user", "Who are you?")]
    base, adapter = said(its, question, use_adapter=False), said(its, question)
    assert base != adapter
    out, told, conversation = talked(its, ["/compare", "/base", question[0][1], "/compare", "/base"], capfd)
    assert told[0].startswith("There is no question")
    assert told[1:] == ["The base, the adapter off, answers now.", "The adapter answers now."]
    assert conversation.turns == [(question[0][1], base)]
    assert out.split("\n") == [*f"{base}\nbase:\n{base}\nadapter:\n{adapter}\n".split("\n")]


def test_profiles(its, capfd, tmp_path):
    (tmp_path / "me.txt").write_text("I keep ü otters.", encoding="utf-8")
    lines = ["/profile", "/profile A marmot", f"/profile @{tmp_path / 'me.txt'}", "/profile user user1"]
    _, told, conversation = talked(its, [*lines, "Who?", "/profile none"], capfd)
    assert told[:3] == ["There is no profile in the prompt.", "A marmot", "I keep ü otters."]
    theirs = {
        f"{one['title']}\n{one['text']}" for row in toys.toy_rows() if row["user"] == "user1" for one in row["profile"]
    }
    assert set(told[3].partition("now:\n")[2].split("\n\n")) <= theirs
    assert told[4] == "There is no profile in the prompt."
    assert (conversation.profile, conversation.user) == ("", None)


def test_a_user_gets_the_profile_that_generate_would_choose(its, capfd, figures, adapter_folder):
    question = "write a small note about the garden"
    _, _, conversation = talked(its, ["/profile user user1", question], capfd, tokens=4)
    words = ["--adapter", adapter_folder, "--prompt", question, "--user", "user1", "--max-new-tokens", "4"]
    found = figures("generate", *words)
    assert conversation.turns == [(question, found["answer"])]
    assert conversation.profile_shown().endswith(found["profile"])


def test_lines_that_fail_leave_the_chat_as_it_was(its, capfd):
    lines = ["/profile A marmot", "/profile @no.txt", "/profile user zoe", "/bass", "/clear", " /base is a word"]
    _, told, conversation = talked(its, lines, capfd, tokens=2)
    assert conversation.profile == "A marmot"
    assert "no.txt" in told[1]
    assert "it has user0, user1, user2" in told[2]
    assert "there is no /bass; did you mean /base?" in told[3]
    assert [question for question, _ in conversation.turns] == ["/base is a word"]


def test_what_does_not_fit_the_context_is_left_out_and_said(its, capfd, monkeypatch):
    question = "write a note about the garden please"
    one = len(its.maker.prompt_ids([{"role": "user", "content": question}], ""))
    monkeypatch.setattr(its.model.get_base_model().config, "max_position_embeddings", 2 * one + 30)
    _, told, conversation = talked(its, [question] * 4, capfd, tokens=8)
    assert len(told) >= 1
    assert all("left out: the model looks at" in line for line in told)
    assert 1 <= len(conversation.turns) < 4
    earlier = [pair for turn in conversation.turns[:-1] for pair in zip(("user", "assistant"), turn, strict=True)]
    assert conversation.turns[-1][1] == said(its, [*earlier, ("user", question)])
    _, told, conversation = talked(its, [question, question * 20], capfd, tokens=8)
    assert "ask a shorter one" in told[0]
    assert [asked for asked, _ in conversation.turns] == [question]  # it costs no earlier turn


def test_ctrl_c_stops_the_answer_and_not_the_chat(its, capfd, monkeypatch):
    whole = said(its, [("user", "Who are you?")])
    calls, forward = [], its.model.get_base_model().forward

    def interrupted(*args, **inputs):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(*args, **inputs)

    monkeypatch.setattr(its.model.get_base_model(), "forward", interrupted)
    before = signal.getsignal(signal.SIGINT)
    _, told, conversation = talked(its, ["Who are you?", "Again?"], capfd)
    assert told == ["Stopped."]
    [first, second] = conversation.turns
    assert whole.startswith(first[1])
    assert len(first[1]) < len(whole)
    assert second[0] == "Again?"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("train_on", "said"), [("factual", "/profile"), ("counterfactual", "it needs none")])
def test_it_says_whether_a_profile_is_needed(its, capfd, monkeypatch, train_on, said):
    its.metadata["train_on"] = train_on
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n"))
    chat(its, None, None, 2)
    assert said in capfd.readouterr().err


def test_a_pipe_gives_answers_alone_and_no_colours(adapter_folder, run):
    words = ["--max-new-tokens", "4", "--profile", "An otter."]
    command = [sys.executable, "-c", "from perce_lite.cli.app import main; main()", "chat", adapter_folder, *words]
    done = subprocess.run(command, input="/base\nWho are you?\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, base, _ = run("generate", "--adapter", adapter_folder, *words, "--base", "--prompt", "Who are you?")
    assert done.stdout == base
    assert "\x1b" not in done.stdout + done.stderr


def test_a_terminal_ends_with_ctrl_d_and_drops_a_line_at_ctrl_c(monkeypatch):
    ours, theirs = pty.openpty()
    told: list[str] = []
    with os.fdopen(theirs, "r") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        lines = iter(["first", KeyboardInterrupt, "second", EOFError])

        def typing(prompt):
            line = next(lines)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", typing)
        assert list(typed(told.append)) == ["first", "second"]
    os.close(ours)
    assert told == ["\nCtrl-D or /quit leaves."]


def test_a_stop_is_seen_by_every_row():
    stop = Stop()
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert stop(ids, ids).tolist() == [False, False]
    stop.asked = True
    assert stop(ids, ids).tolist() == [True, True]
