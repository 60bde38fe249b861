"""Global and own adapters of clients, as the page and the terminal show them."""

import io

import pytest
from rich.console import Console

from fedlora.report.run_page import write_report
from fedlora.report.side_by_side import side_by_side, text_table

TASK = "causal-lm"


def row(client, examples, common, own):
    scores = [{} if value is None else {"bits_per_byte": value} for value in (common, own)]
    return {"client": client, "examples": examples, "global": scores[0], "own": scores[1]}


def with_rows(summary, *rows, kind="personal"):
    return {**summary, "side_by_side": {kind: list(rows)}}


def own_tables(page):
    """Every table of a page that has own adapters, as mappings by heading."""
    head = ["client", "examples", "global adapter", "own adapter", "difference"]
    return [
        [dict(zip(head, line, strict=True)) for line in lines]
        for first, *lines in page.tables
        if first == head
    ]


def printed(found):
    out = io.StringIO()
    Console(file=out, width=160, color_system=None).print(text_table(found))
    return out.getvalue()


def test_every_client_has_a_row_with_both_scores(make_run, read_page, summary):
    """Less is better in bits per byte, and the difference says by how much they differ."""
    given = with_rows(
        summary, row("c10", 4, 1.5, 1.25), row("c2", 3, 1.5, 1.75), row("c3", 0, None, None)
    )
    (table,) = own_tables(read_page(write_report(make_run(summary=given))))
    assert table == [
        {"client": "c2", "examples": "3", "global adapter": "1.5000", "own adapter": "1.7500",
         "difference": "+0.2500"},
        {"client": "c3", "examples": "0", "global adapter": "–", "own adapter": "–",
         "difference": "–"},
        {"client": "c10", "examples": "4", "global adapter": "1.5000", "own adapter": "1.2500",
         "difference": "−0.2500"},
    ]  # fmt: skip
    (found,) = side_by_side(given, TASK)
    assert found.verdict == (
        "The own adapter is better for 1 and worse for 1 of 2 clients with both scores."
    )
    for cells, _ in found.lines():
        assert any(all(cell in line for cell in cells) for line in printed(found).splitlines())


def test_better_is_green_whatever_the_sign(make_run, read_page, summary):
    def marked(task, rows):
        given = {"task": task, "base": {"accuracy": 0.5, "loss": 1.0}}
        given["side_by_side"] = {"local": rows}
        page = read_page(write_report(make_run(task=task, summary=given, name=task)))
        return [a.get("class") for tag, a in page.tags if tag == "span" and "class" in a]

    less = [row("ada", 2, 1.5, 1.0), row("bob", 2, 1.0, 1.5), row("cyd", 2, 1.0, 1.0)]
    more = [
        {**one, "global": {"accuracy": 0.5}, "own": {"accuracy": value}}
        for one, value in zip(less, (0.75, 0.25, 0.5), strict=True)
    ]
    for found in (marked(TASK, less), marked("sequence-classification", more)):
        assert [css for css in found if css in ("good", "bad")] == ["good", "bad"]


def test_both_kinds_are_told_apart(make_run, read_page, summary):
    summary["side_by_side"] = {
        "local": [row("ada", 2, 1.5, 1.0)],
        "personal": [row("ada", 2, 1.5, 0.5)],
    }
    page = read_page(write_report(make_run(summary=summary)))
    assert [table[0]["own adapter"] for table in own_tables(page)] == ["0.5000", "1.0000"]
    assert "Global and own adapter: what the strategy leaves with each client" in page.text
    assert "Global and own adapter: trained by each client alone" in page.text


@pytest.mark.parametrize("absent", [{}, {"side_by_side": {}}, {"side_by_side": {"local": []}}])
def test_without_own_adapters_there_is_no_table(make_run, read_page, summary, absent):
    page = read_page(write_report(make_run(summary={**summary, **absent})))
    assert not own_tables(page)
    assert "Global and own adapter" not in page.text


def test_many_clients_are_folded_away_on_the_page_and_cut_off_on_the_terminal(
    make_run, read_page, summary
):
    given = with_rows(summary, *(row(f"c{i}", 1, 1.0, 2.0) for i in range(30)))
    page = read_page(write_report(make_run(summary=given)))
    assert "30 clients" in page.text
    assert len(own_tables(page)[0]) == 30
    (found,) = side_by_side(given, TASK)
    text = printed(found)
    assert "c23" in text
    assert "c24" not in text
    assert "6 more clients are in the report." in text


def test_a_client_s_name_is_text(make_run, read_page, summary):
    name = "<script>alert(1)</script>[bold]x[/bold]\u202e"
    given = with_rows(summary, row(name, 1, 1.0, 2.0))
    page = read_page(write_report(make_run(summary=given)))
    assert "script" not in {tag for tag, _ in page.tags}
    shown = name.replace("\u202e", "\\u202e")
    assert own_tables(page)[0][0]["client"] == shown
    (found,) = side_by_side(given, TASK)
    assert shown in printed(found)
