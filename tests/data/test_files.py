import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.data.files import read_file, read_text
from fedlora.errors import DataError

NUMBERED = frozenset({"0", "1"})


def rows_of(path, **options):
    table = read_file(path, **options)
    return [dict(row.values) for row in table.rows], [row.origin for row in table.rows]


def test_json_lines_remember_their_line(write, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "one\\u2028x"}\r\n\n{"text": "zwei ü\u2028y", "k": 1}'.encode())
    rows, origins = rows_of(path)
    assert rows == [{"text": "one\u2028x"}, {"text": "zwei ü\u2028y", "k": 1}]
    assert origins == [f"{path}:1", f"{path}:3"]
    assert read_file(path).columns == ("text", "k")


def test_csv_cells_may_hold_commas_and_line_breaks(write, tmp_path):
    cells = [["text", "label"], ["a,b", "x"], ["two\nlines", "y"], ["long " * 40_000, "z"]]
    path = tmp_path / "a.csv"
    write("a.csv", cells)
    rows, origins = rows_of(path)
    assert [[row["text"], row["label"]] for row in rows] == cells[1:]
    assert origins == [f"{path}:2", f"{path}:3", f"{path}:5"]


def test_csv_may_start_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\r\nhello,1\r\n")
    assert rows_of(path)[0] == [{"text": "hello", "label": "1"}]


def test_tsv_quotes_are_ordinary_characters(write, tmp_path):
    write("a.tsv", [["text", "label"], ['"no end', "1"], ['say "x"', "0"]])
    rows, _ = rows_of(tmp_path / "a.tsv")
    assert [row["text"] for row in rows] == ['"no end', 'say "x"']


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_without_header_columns_are_numbers(write, tmp_path, name):
    write(name, [["1", "good film"], ["0", "bad film"]])
    rows, origins = rows_of(tmp_path / name, numbered=NUMBERED)
    assert rows == [{"0": "1", "1": "good film"}, {"0": "0", "1": "bad film"}]
    assert origins[0].endswith(":1")


def test_a_header_of_numbers_is_still_a_header(write, tmp_path):
    write("a.csv", [["0", "1"], ["1", "good film"]])
    assert rows_of(tmp_path / "a.csv", numbered=NUMBERED)[0] == [{"0": "1", "1": "good film"}]


def test_parquet_rows_are_counted_from_one(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None], "label": [1, 2]}), path)
    rows, origins = rows_of(path)
    assert rows == [{"text": "a", "label": 1}, {"text": None, "label": 2}]
    assert origins == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": \n',
            r"a\.jsonl:2: invalid JSON .*one object per line",
        ),
        ("a.json", '{\n"text": "a"\n}', r"a\.json:1: invalid JSON .*must be rewritten"),
        ("a.json", '[{"text": "a"}]', r"a\.json:1: the line is a list; expected one JSON object"),
        ("a.jsonl", '{"text": "a"}\n3\n', r"a\.jsonl:2: the line is a number \(3\)"),
        ("a.jsonl", "[" * 200_000, r"a\.jsonl:1: invalid JSON"),
        ("a.jsonl", "\n\n", r"a\.jsonl: the file has no rows"),
        ("a.csv", "text,label\n", r"a\.csv: the file has no rows"),
        (
            "a.csv",
            "text,label\na,1\nb\n",
            r"a\.csv:3: the row has 1 cells; expected 2 \(text, label\)",
        ),
        ("a.csv", 'text,label\na,1\n"b" x,2\n', r"a\.csv:3: malformed CSV"),
        ("a.csv", 'text,label\na,1\n"b,2\nc,3\n', r"a\.csv:3: malformed CSV"),
        ("a.tsv", "text\tlabel\na\t1\t2\n", r"a\.tsv:2: the row has 3 cells; expected 2"),
        ("a.csv", "text,text\na,1\n", r'a\.csv:1: the header has the column "text" more than once'),
        ("a.parquet", "not parquet", r"a\.parquet: not a readable Parquet file"),
        ("a.xlsx", "x", r'files that end in "\.xlsx" are not read; expected one of \.jsonl'),
    ],
)
def test_malformed_files_are_named_with_their_line(write, tmp_path, name, content, message):
    write(name, content)
    with pytest.raises(DataError, match=message):
        read_file(tmp_path / name)


def test_other_encodings_are_named_with_their_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\ngood\nb\xe4d\n")
    with pytest.raises(DataError, match=r"a\.csv:3: byte 0xe4 is not UTF-8"):
        read_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.txt: cannot be read"):
        read_text(tmp_path / "none.txt")
