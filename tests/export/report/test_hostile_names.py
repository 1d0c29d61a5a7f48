"""No name and no text of a checkpoint becomes markup in the page; `make test-browser` asks a browser, too."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.support.hostile_report import MARK, PAYLOADS, make_hostile_report

TAGS = frozenset(
    (
        "html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "h3", "p", "span", "div", "b",
        "i", "table", "thead", "tr", "th", "td", "ul", "li", "small", "svg", "path", "wbr", "code", "footer", "pre",
    )
)  # fmt: skip
ATTRIBUTES = frozenset(
    (
        "lang", "charset", "http-equiv", "content", "name", "class", "style", "viewbox", "preserveaspectratio", "role",
        "aria-label", "d",
    )
)  # fmt: skip


class Markup(HTMLParser):
    """Every tag, attribute and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes = set[str](), set[str]()
        self.labels, self.words, self.others, self.shown = list[str](), list[str](), list[str](), list[str]()
        self.feed(html)
        self.close()
        self.text = "".join(self.words)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attributes)
        self.labels += [value or "" for name, value in attributes if name == "aria-label"]
        self.others += [value or "" for name, value in attributes if name != "aria-label"]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.others.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hostile_report(tmp_path_factory.mktemp("hostile"))


def test_the_page_has_only_its_own_markup(page: Path) -> None:
    found = Markup(page.read_text())
    assert found.tags <= TAGS and found.attributes <= ATTRIBUTES
    assert not [each for each in found.others if MARK in each]
    for payload in PAYLOADS:  # shown as it is
        assert payload in found.text
    in_pictures = [payload for payload in PAYLOADS if any(payload.split(".")[-1] in label for label in found.labels)]
    assert len(in_pictures) >= 4, found.labels


def test_the_page_forbids_scripts_and_everything_from_elsewhere(page: Path) -> None:
    html = page.read_text()
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in html.partition("<title>")[0]
