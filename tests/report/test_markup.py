from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from fedlora.report.markup import element, format_bytes, preformatted, table, visible


class Seen(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.data = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, attrs))

    def handle_data(self, data):
        self.data += data


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_comes_back_as_text_and_never_as_markup(text):
    seen = Seen(element("p", text))
    assert seen.tags == [("p", [])]
    assert seen.data == visible(text)


@given(st.text(st.characters(exclude_categories=())))
def test_visible_is_idempotent_and_can_be_encoded(text):
    once = visible(text)
    assert visible(once) == once
    once.encode("utf-8")


def test_direction_and_control_characters_are_written_out():
    assert visible("a\u202eb\x00c\nd\ud800") == "a\\u202eb\\u0000c\\u000ad\\ud800"


def test_long_text_is_cut():
    assert visible("x" * 50, 10) == "x" * 9 + "…"
    assert visible("x" * 10, 10) == "x" * 10


def test_cells_and_job_text_are_escaped():
    made = table(["<a>"], [["<b>"]]) + preformatted("<c>\n&")
    tags = {tag for tag, _ in Seen(made).tags}
    assert tags == {"div", "table", "thead", "tbody", "tr", "th", "td", "pre"}
    assert "&lt;c&gt;\n&amp;" in made


def test_bytes_have_decimal_units():
    assert [format_bytes(n) for n in (0, 999, 1500, 2.5e6, 3e9, 4e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "3 GB",
        "4 TB",
    ]
