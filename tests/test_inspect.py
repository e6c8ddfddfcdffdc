"""`perce-lite inspect`: figures against full logits, the verdict on planted data, and a page that keeps text text."""

import html.parser
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import toys
from torch.nn.functional import log_softmax

from perce_lite.cli.views.page import write_inspection
from perce_lite.data.pairs import IGNORED, PairMaker
from perce_lite.data.text_units import text_units
from perce_lite.errors import DataError
from perce_lite.evaluation import inspect as inspection
from perce_lite.evaluation.inspect import inspect
from perce_lite.model.logprob_store import Store
from perce_lite.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
EVIL = "<script>alert('x')</script> & \"q\""


def toy_recipe(folder: Path, rows: list[dict], **train) -> Recipe:
    toys.toy_folder(folder / "toy")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    options = {"store": str(folder / "store"), "clip_min": 0.2, "clip_max": 2.0, **train}
    sections = {"split": {"test": 0, "validation": 0}, "train": options, "data": {"path": "rows.jsonl"}}
    (folder / "r.yaml").write_text(json.dumps({"model": "toy", "quantization": "none", "dtype": "float32", **sections}))
    return load_recipe(folder / "r.yaml")


def full_logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens.ids])).logits[0, :-1].double()
    labels = torch.tensor(tokens.labels[1:])
    mask = labels != IGNORED
    return log_softmax(logits, -1)[mask].gather(1, labels[mask, None])[:, 0]


class Page(html.parser.HTMLParser):
    """Tokens, scripts and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tokens: list[dict] = []
        self.scripts = 0
        self.addresses: list[str] = []
        self.open_token = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.scripts += tag == "script"
        self.addresses += [known[name] for name in ("src", "href") if name in known]
        self.open_token = tag == "span" and "tabindex" in known
        if self.open_token:
            self.tokens.append({**known, "text": ""})

    def handle_endtag(self, tag):
        self.open_token = False

    def handle_data(self, data):
        if self.open_token:
            self.tokens[-1]["text"] += data


def page_of(figures: dict, folder: Path) -> tuple[str, Page]:
    write_inspection(figures, folder / "page.html")
    text = (folder / "page.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_figures_equal_full_logits_and_the_store_keeps_them(tmp_path):
    recipe = toy_recipe(tmp_path, toys.toy_rows(users=3, per_user=3))
    figures = inspect(recipe, None, 48, None, 5)
    model = toys.toy_model("chatml", 600).double()
    maker = PairMaker(toys.toy_tokenizer("chatml"), recipe.template, 1024)
    pirs = []
    by_where = {row.where: row for row in inspection.read_rows(recipe)}
    for shown in figures["rows"]:
        [pair] = maker.make([by_where[shown["row"]]])
        pir = full_logits(model, pair.factual) - full_logits(model, pair.counterfactual)
        pirs.append(pir)
        assert shown["pir_mean"] == pytest.approx(float(pir.mean()), abs=2e-5)
        assert sum(unit["pir"] for unit in shown["units"]) == pytest.approx(float(pir.sum()), abs=2e-4)
        assert "".join(unit["text"] for unit in shown["units"]) == pair.row.completion[0]["content"] + "<|im_end|>"
    every = torch.cat(pirs)
    assert figures["own"]["tokens"] == every.numel()
    assert figures["own"]["pir_mean"] == pytest.approx(float(every.mean()), abs=2e-5)
    assert figures["own"]["share_above_min"] == pytest.approx(float((every > 0).double().mean()))
    assert figures["own"]["weight_mean"] == pytest.approx(float((1 + 0.5 * every.clamp(0, 2.0)).mean()), abs=2e-5)
    assert sum(figures["histogram"]["own"]) == every.numel()
    assert len(figures["words"]) == 5
    kept = sum(
        len(Store(folder.parent, folder.name).get(user["user"]))
        for folder in (tmp_path / "store").iterdir()
        for user in figures["users"]
    )
    assert kept == 27, "factual, counterfactual and swapped of nine rows"


def test_rows_user_and_top_choose(tmp_path):
    recipe = toy_recipe(tmp_path, toys.toy_rows(users=3, per_user=4))
    assert {user["user"]: user["rows"] for user in inspect(recipe, None, 5, None, 3)["users"]} == {
        "user0": 2,
        "user1": 2,
        "user2": 1,
    }
    one = inspect(recipe, None, 48, "user1", 3)
    assert [user["user"] for user in one["users"]] == ["user1"]
    assert one["swapped"]["tokens"] == one["own"]["tokens"], "the control is another user's profile all the same"
    assert one["signal"]["says"] == "unknown"
    assert (one["users"][0]["rows"], len(one["words"]), len(one["personal_rows"])) == (4, 3, 3)
    with pytest.raises(DataError, match=r"--user nobody.*user0, user1, user2"):
        inspect(recipe, None, 48, "nobody", 3)
    rows = toys.toy_rows(users=2, per_user=1)
    held_out = [{**row, "split": "test"} for row in rows] + [{**row, "profile": [], "split": "train"} for row in rows]
    with pytest.raises(DataError, match="None of the 2 training rows has a profile"):
        inspect(toy_recipe(tmp_path, held_out), None, 48, None, 3)


def test_users_personal_rows_and_idle_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "IDLE", 1.5)
    figures = inspect(toy_recipe(tmp_path, toys.toy_rows(users=3, per_user=3)), None, 48, None, 4)
    rows = figures["rows"]
    for user in figures["users"]:
        pirs = [
            pir for row in rows if row["user"] == user["user"] for unit in row["units"] for pir in unit["token_pirs"]
        ]
        assert user["tokens"] == len(pirs)
        assert user["pir_mean"] == pytest.approx(sum(pirs) / len(pirs), abs=1e-5)
    of_all = sum(user["swapped_pir_mean"] * user["tokens"] for user in figures["users"]) / figures["own"]["tokens"]
    assert of_all == pytest.approx(figures["swapped"]["pir_mean"], abs=1e-5)
    assert figures["personal_rows"] == sorted(range(9), key=lambda number: -rows[number]["pir_mean"])[:4]
    absolute = []
    for row in rows:
        pirs = [abs(pir) for unit in row["units"] for pir in unit["token_pirs"]]
        absolute.append(sum(pirs) / len(pirs))
    assert figures["idle_rows"] == [number for number, mean in enumerate(absolute) if mean < 1.5]
    assert 0 < len(figures["idle_rows"]) < 9
    text, page = page_of(figures, tmp_path)
    assert "Rows whose profile does nothing" in text
    assert page.addresses == [f"#row-{number}" for number in figures["personal_rows"] + figures["idle_rows"]]
    assert all(f'<article id="{address[1:]}">' in text for address in page.addresses)


def planted(shift: float, rows: int = 30) -> list[inspection.Seen]:
    generator = torch.Generator().manual_seed(1)
    seen = []
    for number in range(rows):
        counterfactual, swapped, factual = -torch.rand(3, 20, generator=generator)
        row = inspection.Row(f"r {number}", f"u{number % 6}", "p", (), ())
        seen.append(
            inspection.Seen(inspection.Pair(row, None, None, "", 0, 0), factual + shift, counterfactual, swapped)
        )
    return seen


def test_signal_is_found_where_it_was_planted_and_not_elsewhere():
    found, none = inspection.signal(planted(0.3)), inspection.signal(planted(0.0))
    assert found["says"] == "signal"
    assert found["low"] <= 0.3 <= found["high"]
    assert "carry signal" in found["sentence"]
    assert (none["says"], none["low"] <= 0 <= none["high"]) == ("none", True)
    assert "no signal" in none["sentence"]
    assert inspection.signal(planted(0.3, rows=4))["says"] == "unknown"
    worse = inspection.signal(planted(-0.3))
    assert (worse["says"], "no signal: another user's helps more" in worse["sentence"]) == ("none", True)
    few = inspection.signal([one for one in planted(0.3) if one.pair.row.user < "u4"])
    assert few["says"] == "signal"
    assert few["sentence"].endswith(
        "20 rows of 4 users). With so few users the interval is too narrow: take it as a hint."
    )
    assert "hint" not in found["sentence"]


def test_the_real_model_tells_own_profiles_from_random_ones(real_model, tmp_path, monkeypatch):
    """The demo data as they are, and with every profile drawn from anybody: the page must say so in words."""
    from perce_lite.data.readers import read_rows
    from perce_lite.data.rows import of_split, spread_over_users, to_records

    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [f"train.store={tmp_path / 'store'}", "profile.top_k=1"])
    figures = inspect(recipe, None, 12, None, 10)
    assert figures["signal"]["says"] == "signal"
    assert "The profiles carry signal" in page_of(figures, tmp_path)[0]
    rows = spread_over_users(of_split(read_rows(recipe), "train"), 40)
    draw = random.Random(3)
    rows = [row for row in rows if row.profile]
    records = [{**one, "profile": to_records([draw.choice(rows)])[0]["profile"]} for one in to_records(rows[:12])]
    (tmp_path / "random.jsonl").write_text("\n".join(json.dumps(one) for one in records), encoding="utf-8")
    overrides = [f"data.path={tmp_path / 'random.jsonl'}", "split.test=0", "split.validation=0"]
    drawn = load_recipe(ROOT / "recipes/quickstart.yaml", [*overrides, f"train.store={tmp_path / 'store'}"])
    figures = inspect(drawn, None, 12, None, 10)
    assert figures["signal"]["says"] == "none"
    assert "The profiles carry no signal" in page_of(figures, tmp_path)[0]


def test_page_escapes_all_text_and_every_token_can_be_reached(tmp_path):
    profile = [{"title": EVIL, "text": EVIL}]
    row = {"user": EVIL, "profile": profile, "prompt": EVIL, "completion": f"{EVIL}\n\tend 🦊 नमस्ते"}
    figures = inspect(toy_recipe(tmp_path, [row] * 2), None, 48, None, 9)
    text, page = page_of(figures, tmp_path)
    assert page.scripts == 1, "the page's own"
    assert "<script>alert" not in text
    assert page.addresses == ["#row-0", "#row-1"]
    assert "http" not in text
    assert len(page.tokens) == sum(len(one["units"]) for one in figures["rows"]) > 20
    every = [unit for row in figures["rows"] for unit in row["units"]]
    for one, unit in zip(page.tokens, every, strict=True):
        assert one["tabindex"] == "0"
        for told in (one["text"], f"PIR {unit['pir']:+.2f}", f"weight {unit['weight']:.2f}"):
            assert told in one["aria-label"]
        assert f"with the profile {unit['factual']:.2f}, without {unit['counterfactual']:.2f}" in one["aria-label"]
    torn = next(unit for unit in every if unit["text"] == "🦊")
    assert sum(torn["token_pirs"]) == pytest.approx(torn["pir"], abs=1e-5)
    assert f"(of {len(torn['token_pirs'])} tokens: {torn['token_pirs'][0]:+.2f}, " in text
    assert 1 < len(torn["token_pirs"]) <= 4
    response = "".join(one["text"] for one in page.tokens[: len(page.tokens) // 2])
    assert response == f"{EVIL}⏎\n⇥\tend 🦊 नमस्ते<|im_end|>"
    assert "�" not in text
    assert json.loads(json.dumps(figures)) == figures


@pytest.mark.parametrize("text", ["🦊🦊 a", "नमस्ते दुनिया", "a\n\n  b\t c", "日本語", "ﷺ x"])
@pytest.mark.parametrize("family", ["chatml", "gemma"])
def test_text_units_are_whole_characters(family, text):
    tokenizer = toys.toy_tokenizer(family)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    units = text_units(tokenizer, ids)
    assert "".join(unit for _, _, unit in units) == text
    assert all("\ufffd" not in unit and unit for _, _, unit in units)
    assert [start for start, _, _ in units[1:]] == [end for _, end, _ in units[:-1]]
    assert units[-1][1] == len(ids)


def test_marks_stay_with_their_letter_and_a_special_token_stands_alone():
    tokenizer = toys.toy_tokenizer("chatml")
    texts = ["👩\u200d👩\u200d👧", "👍🏽", "न", "म", "स्", "ते", "e\u0301", "\ufffd", "<|im_end|>"]
    ids = tokenizer("".join(texts), add_special_tokens=False)["input_ids"]
    assert [text for _, _, text in text_units(tokenizer, ids)] == texts


def test_a_word_is_the_sum_of_its_tokens_and_of_no_others():
    texts = {
        "Cob": 1.0,
        "alt": 2.0,
        ",": 0.5,
        "\n": 8.0,
        "the": 0.25,
        " ": 9.0,
        "cobalt": 2.5,
        "!\nThe": 1.0,
        "<eos>": 7.0,
    }
    units = [{"text": text, "pir": pir, "end_of_turn": text == "<eos>"} for text, pir in texts.items()]
    assert inspection._words([units]) == [
        {"word": "cobalt", "pir": 3.5, "count": 2},
        {"word": "the", "pir": 0.125, "count": 2},
    ]
    assert inspection._words([units[:3]]) == [{"word": "cobalt", "pir": 3.5, "count": 1}], "once, where none is twice"


def fits_a_phone(folder: Path, first: str) -> str:
    """Opens page.html of `folder` 390 px wide and focuses `first`; gives what the page then says under `told`."""
    if shutil.which("chromium") is None:
        pytest.skip("no chromium on PATH")
    probe = (
        "<iframe id=f width=390 height=800 src=page.html></iframe><script>"
        f"f.onload = () => {{ const d = f.contentDocument; const one = d.querySelector('{first}'); one.focus();"
        "const told = d.getElementById('told')?.textContent;"
        "const beyond = d.documentElement.scrollWidth - d.documentElement.clientWidth;"
        "document.title = 'beyond ' + beyond + ' focus ' + (d.activeElement === one) + ' told ' + told; }</script>"
    )
    (folder / "probe.html").write_text(probe)
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--enable-logging=stderr",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000", "--dump-dom", f"file://{folder}/probe.html",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>beyond 0 focus true told " in done.stdout, done.stdout[-500:]
    assert "CONSOLE" not in done.stderr
    return done.stdout


def test_page_fits_a_phone_and_the_console_is_silent(tmp_path):
    rows = toys.toy_rows(users=2, per_user=2)
    rows = [{**row, "user": row["user"] * 20, "completion": row["completion"] + " " + "x" * 200} for row in rows]
    page_of(inspect(toy_recipe(tmp_path, rows), None, 48, None, 9), tmp_path)
    assert " told “" in (said := fits_a_phone(tmp_path, ".response span"))
    assert "PIR" in said
