"""DOCX, HTML and PDF: the text that a reader sees in them, read by python-docx, inscriptis and pypdf."""

import io
import re
import zipfile
from collections import Counter
from itertools import pairwise
from statistics import quantiles

from perce_lite.data.importers.archives import LARGEST_ZIP
from perce_lite.data.importers.writings import Notes, Writing, count_words, date_of, tidy

_OTHERS_CHATS = (
    (re.compile(r'class="(?:page_wrap|message default)'), "Telegram's chats as HTML; export them as JSON instead"),
    (re.compile(r'class="[^"]*\b_(?:3-95|a6-[a-z])\b'), "Meta's pages as HTML; ask for JSON instead"),
    (re.compile(r'class="chatlog|class="?preamble__guild'), "Discord's chats as HTML; export them as JSON instead"),
    (re.compile(r'class="note-?(?:container|content)?"[\s\S]{0,600}class="heading"'), "Keep's HTML; its JSON is read"),
    (re.compile(r"NETSCAPE-Bookmark-file", re.I), "bookmarks"),
    (re.compile(r'class="mdl-grid|class="outer-cell'), "Google's activity as HTML, which holds no texts of one's own"),
)
"""Pages of exports, which are not the person's prose, by what their HTML holds."""

_NOT_PROSE = (
    "nav", "header", "footer", "aside", "form", "button", "figure", "script", "style", "noscript", "template", "iframe",
    "svg",
)  # fmt: skip
"""Elements beside a page's own text."""

_FURNITURE_PAGES = 3
"""Pages at whose top or bottom a line stands that is taken for a running head."""


def from_docx(content: bytes, source: str, notes: Notes) -> Writing | None:
    """The paragraphs of a Word file; title: a first paragraph of that style; None, and a note, where it is none.

    Tables, headers, footnotes, comments and text boxes are left out; tables and tracked insertions are noted.
    """
    import docx
    from docx.opc.exceptions import OpcError
    from lxml.etree import LxmlError

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            if sum(part.file_size for part in parts.infolist()) > LARGEST_ZIP:
                notes.skip("a DOCX that unpacks to too much", source)
                return None
        document = docx.Document(io.BytesIO(content))
        created = document.core_properties.created
    except (zipfile.BadZipFile, OpcError, LxmlError, KeyError, ValueError, OSError) as error:
        notes.skip("a DOCX that cannot be read", f"{source} ({error})"[:200])
        return None
    for _ in document.tables:
        notes.skip("a table in a DOCX", source)
    for _ in document.element.body.iter("{*}ins"):
        notes.skip("a tracked insertion in a DOCX; accept the changes in it first", source)
    paragraphs = [
        (str(paragraph.style.name) if paragraph.style else "", paragraph.text) for paragraph in document.paragraphs
    ]
    styled_texts = [(style, text.strip()) for style, text in paragraphs if text.strip()]
    title = styled_texts[0][1] if len(styled_texts) > 1 and re.match(r"Title|Heading 1", styled_texts[0][0]) else ""
    body = [text for _, text in (styled_texts[1:] if title else styled_texts)]
    return Writing(tidy("\n\n".join(body)), source, tidy(title), date=date_of(created))


def from_html(page: str, source: str, notes: Notes) -> Writing | None:
    """The text of a page, less its menus and quotes; None, and a note, where it is an export that is no prose."""
    import inscriptis
    from lxml import html
    from lxml.etree import LxmlError

    export = next((what for pattern, what in _OTHERS_CHATS if pattern.search(page[:200_000])), None)
    if export is not None:
        notes.skip(export, source)
        return None
    try:
        tree = html.document_fromstring(re.sub(r"^\s*<\?xml[^>]*>", "", page))
    except (LxmlError, ValueError) as error:  # nothing in it, or nested too deeply
        notes.skip("HTML that cannot be read", f"{source} ({error})"[:200])
        return None
    dates = tree.xpath("//meta[@property='article:published_time' or @name='date']/@content | //time/@datetime")
    titles = [heading.text_content() for heading in [*tree.iter("h1"), *tree.iter("title")]]
    article = next(iter([*tree.iter("article"), *tree.iter("main"), *tree.iter("body")]), tree)
    for _ in article.iter("blockquote"):
        notes.skip("a quote in HTML", source)
    for element in [*article.iter(*_NOT_PROSE, "blockquote", "title", "h1")]:
        if element is not article:
            element.drop_tree()
    text = inscriptis.get_text(html.tostring(article, encoding="unicode"))
    body = tidy(re.sub(r"(?m)^[ \t]+(?=\S)", "", text))
    date = next(filter(None, map(date_of, dates)), None)
    return Writing(body, source, tidy(" ".join(titles[0].split())) if titles else "", date=date)


def from_pdf(content: bytes, source: str, notes: Notes) -> Writing | None:
    """The text of a PDF, its lines joined to paragraphs; None, and a note, where it holds none."""
    import pypdf
    from pypdf.errors import DependencyError, PyPdfError

    try:
        reader = pypdf.PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            notes.skip("a PDF with a password; save it without one", source)
            return None
        pages = [page.extract_text() for page in reader.pages]
        date = date_of(reader.metadata.creation_date) if reader.metadata else None
    except DependencyError:
        notes.skip("a PDF that is encrypted; save it without a password", source)
        return None
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError) as error:
        notes.skip("a PDF that cannot be read", f"{source} ({error})"[:200])  # pypdf's ways to meet torn bytes
        return None
    if not any(page.strip() for page in pages):
        notes.skip("a PDF without text, such as scanned pages; let a program such as ocrmypdf recognise it", source)
        return None
    return Writing(tidy(unwrapped(_without_furniture([tidy(page).split("\n") for page in pages]))), source, date=date)


def _without_furniture(pages: list[list[str]]) -> list[str]:
    """The lines of all pages, less page numbers and running heads."""
    ends = Counter(_shape(line) for page in pages for line in {page[0], page[-1]})

    def stays(page: list[str], place: int) -> bool:
        at_end = place in (0, len(page) - 1)
        line = page[place]
        return not at_end or not (_shape(line) in ("", "#") or ends[_shape(line)] >= _FURNITURE_PAGES)

    return [line for page in pages for place, line in enumerate(page) if stays(page, place)]


def _shape(line: str) -> str:
    """A line with all numbers alike, without what stands around a page's number."""
    return re.sub(r"[-–—\s|.]+", " ", re.sub(r"\d+", "#", line)).strip().casefold()


def unwrapped(lines: list[str]) -> str:
    """The lines of a page as paragraphs: a line that is full, or ends within a sentence, goes on in the next one."""
    lengths = [len(line) for line in lines if line.strip()]
    full = 0.8 * (quantiles(lengths, n=10)[-1] if len(lengths) > 1 else 0)
    text = lines[0] if lines else ""
    for line, following in pairwise(lines):
        goes_on = bool(line.strip() and following.strip()) and len(line) >= full
        if goes_on and re.search(r"[^\W\d_][-\u00ad]$", line) and following[:1].islower():
            text = text[:-1] + following
        else:
            text += (" " if goes_on else "\n\n" if not _is_item(following) else "\n") + following
    return text


def _is_item(line: str) -> bool:
    """Whether a line is one of a list or a short heading's, which stays with its neighbours."""
    return count_words(line) <= 3 or re.match(r"\s*(?:[-*•‣]|\d+[.)])\s", line) is not None
