"""The picture of a response: whole, small, escaped, without anything that loads or runs."""

from xml.etree import ElementTree

from perce_lite.cli.views.picture import picture, write_picture

SVG = "{http://www.w3.org/2000/svg}"


def row(*units: tuple[str, float], query: str = "Why?") -> dict:
    made = [{"text": text, "pir": pir, "end_of_turn": False} for text, pir in units]
    made.append({"text": "<|im_end|>", "pir": 9.0, "end_of_turn": True})
    return {"query": query, "units": made, "pir_mean": sum(pir for _, pir in units) / len(units)}


def texts(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_every_token_is_drawn_once_and_coloured_by_its_pir():
    svg = picture(row(("yo", 5.0), (", the", 0.0), (" soup", -1.5)))
    assert texts(svg)[1:4] == ["yo", ", the", " soup"]
    tokens = [element for element in ElementTree.fromstring(svg).iter(f"{SVG}rect") if list(element)]
    assert [(token.get("class"), token.get("opacity")) for token in tokens] == [("more", "0.85"), ("less", "0.4")]
    assert [token[0].text for token in tokens] == ["PIR +5.00 nats", "PIR -1.50 nats"]
    assert "im_end" not in svg


def test_text_is_escaped_and_lines_are_broken():
    words = [(f" word{number}", 1.0) for number in range(40)]
    svg = picture(row(("<script>&", 1.0), ("\n", 0.0), *words, query="<b> " * 40))
    assert "<script" not in svg
    assert texts(svg)[1] == "<script>&"
    heights = {element.get("y") for element in ElementTree.fromstring(svg).iter(f"{SVG}text")}
    assert len(heights) > 7
    assert "href" not in svg
    assert svg.count("://") == 1, "the name space alone"


def test_the_most_personal_row_is_drawn(tmp_path):
    write_picture({"rows": [row(("dull", 0.1)), row(("ngl", 4.2))]}, tmp_path / "answer.svg")
    assert "ngl" in (tmp_path / "answer.svg").read_text("utf-8")
