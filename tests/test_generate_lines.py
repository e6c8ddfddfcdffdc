"""`generate` over many prompts: a file or a pipe, a prompt a line or JSONL, in batches."""

import io
import json

import pytest

pytest_plugins = ["cli_fixtures"]

MANY = ("--max-new-tokens", 6)


@pytest.fixture
def ask(run, adapter_folder, tmp_path, monkeypatch):
    """Runs `generate` on `lines`, as a file or through a pipe; gives code, answers and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(lines: str, *words, pipe: bool = False):
        (tmp_path / "prompts").write_text(lines, encoding="utf-8")
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        source = () if pipe else ("--prompts", "prompts")
        code, out, err = run("generate", "--adapter", adapter_folder, *source, *MANY, *words)
        return code, [json.loads(line) for line in out.splitlines()], err

    return call


def test_a_line_each_in_batches_of_any_size_from_a_file_or_a_pipe(ask, run, adapter_folder):
    prompts = [f"write a {word} note about the garden" for word in ("small", "quiet", "strange", "heavy", "green")]
    lines = "\n\n".join(prompts) + "\n"
    alone = [
        run("generate", "--adapter", adapter_folder, "--user", "user1", "--prompt", prompt, *MANY)[1].strip()
        for prompt in prompts
    ]
    for size, pipe in ((1, False), (3, True), (8, False)):
        code, answers, err = ask(lines, "--user", "user1", "--batch-size", size, pipe=pipe)
        assert code == 0, err
        assert [answer["prompt"] for answer in answers] == prompts
        assert [answer["answer"] for answer in answers] == alone
        assert {answer["user"] for answer in answers} == {"user1"}
        assert all(answer["profile"] for answer in answers)


def test_jsonl_with_a_user_or_a_profile_a_line_keeps_what_else_stands_there(ask):
    records = [
        {"prompt": "a note", "user": "user0", "id": 7},
        {"messages": [{"role": "user", "content": "a note"}], "profile": [{"title": "t", "text": "otters"}]},
        {"prompt": "a note"},
    ]
    code, answers, err = ask("\n".join(map(json.dumps, records)), "--profile", "short words")
    assert code == 0, err
    assert [answer.get("id") for answer in answers] == [7, None, None]
    assert answers[1]["profile"] == "t\notters"
    assert answers[2]["profile"] == "short words"
    assert (answers[0]["user"], "user" in answers[2]) == ("user0", False)
    assert {answer["model"] for answer in answers} == {"adapter"}
    assert {answer["model"] for answer in ask("hello", "--no-profile", "--base")[1]} == {"base"}


@pytest.mark.parametrize(
    ("lines", "words", "told"),
    [
        ("", ["--no-profile"], "there is no prompt in it"),
        ('{"prompt": "x"}\nplain', ["--no-profile"], "prompts, line 2: not JSON"),
        ('{"prompt": "x"}\n[1]', ["--no-profile"], "line 2: an object such as"),
        ('{"text": "x"}', ["--no-profile"], "line 1: no prompt"),
        ('{"prompt": "x", "user": "zoe"}', [], "user zoe: the data knows no such user; it has user0"),
        ('{"prompt": "x", "user": "user0", "profile": "y"}', [], "line 1: has both a profile and a user"),
        ("hello", [], "line 1: this adapter was trained with the user's profile"),
        ('{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}', ["--no-profile"], "of the kind image"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_loaded(ask, monkeypatch, lines, words, told):
    monkeypatch.setattr("perce_lite.model.generate.load_base", lambda recipe: pytest.fail("the base was loaded"))
    code, answers, err = ask(lines, *words)
    assert (code, answers, told in err, "Traceback" in err) == (2, [], True, False), err


def test_out_takes_its_name_when_all_is_written(ask, tmp_path):
    code, printed, err = ask("hello\nthere", "--no-profile", "--out", "answers.jsonl", "--json", "all.json")
    assert (code, printed) == (0, []), err
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()]
    assert json.loads((tmp_path / "all.json").read_text("utf-8")) == {"answers": written}
    assert [answer["prompt"] for answer in written] == ["hello", "there"]


def test_one_prompt_or_many(ask, run, adapter_folder, monkeypatch):
    code, _, err = ask("hello", "--prompt", "hello", "--no-profile")
    assert (code, "--prompts and --out are for many" in err) == (2, True)
    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    code, _, err = run("generate", "--adapter", adapter_folder, "--no-profile")
    assert (code, "pipe prompts in" in err) == (2, True)
    code, _, err = run("generate", "--adapter", adapter_folder, "--no-profile", "--prompts", "nowhere")
    assert (code, "cannot be read as UTF-8" in err) == (2, True)


def test_drawn_answers_depend_on_the_seed_and_the_place_alone(ask):
    lines = "\n".join(f"note {number}" for number in range(4))
    drawn = [
        [answer["answer"] for answer in ask(lines, "--no-profile", "--temperature", "1", "--seed", seed)[1]]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_personal_and_batches(ask):
    plain = ask("a note\nanother", "--user", "user0")[1]
    personal = ask("a note\nanother", "--user", "user0", "--personal", "2")[1]
    assert [answer["answer"] for answer in plain] != [answer["answer"] for answer in personal]
