"""Rows of every kind of file, and unsound files named with the row that is wrong."""

import datetime
import decimal
import gzip
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from kalmagrove.data.tables.cells import Cell
from kalmagrove.data.tables.reading import iter_rows, split_rows, table_files
from kalmagrove.errors import KalmaGroveError


def rows_of(path: Path) -> list[dict[str, Cell]]:
    return [row.cells for row in iter_rows(path)]


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        'a,b c\n1,"x, ""y""\nz"\n,NA\n',
        '\ufeffa,b c\r\n1,"x, ""y""\nz"\r\n,NA\r\n',
        'a;b c\n1;"x, ""y""\nz"\n;NA\n',
        '"a"\t" b c "\n1\t"x, ""y""\nz"\n\n\tnan',
    ],
    ids=["commas", "byte order mark and CRLF", "semicolons", "tabs and an empty line"],
)
def test_a_csv_with_quotes_and_line_breaks(tmp_path: Path, text: str) -> None:
    expected = [{"a": "1", "b c": 'x, "y"\nz'}, {"a": None, "b c": None}]
    assert rows_of(write(tmp_path, "t.csv", text)) == expected
    assert rows_of(write(tmp_path, "t.csv.gz", gzip.compress(text.encode(), mtime=0))) == expected


def test_a_row_says_where_it_stands(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", 'a,b\n1,"x\ny"\n2,z\n')
    assert [row.place for row in iter_rows(path)] == [f"line 3 of {path}", f"line 4 of {path}"]


def test_a_jsonl_keeps_its_types(tmp_path: Path) -> None:
    text = '{"a": 1, "b": "01", "c": true}\n\n{"b": null, "a": 2.5, "d": "NA"}\n{"a": NaN, "b": " "}\n'
    assert rows_of(write(tmp_path, "t.jsonl", text)) == [
        {"a": 1, "b": "01", "c": True},
        {"b": None, "a": 2.5, "d": None},
        {"a": None, "b": None},
    ]


def test_a_parquet_gives_dates_as_text_and_decimals_as_numbers(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "day": [datetime.date(2024, 1, 31), None],
            "moment": pyarrow.array([datetime.datetime(2024, 1, 31, 8, 5), None], pyarrow.timestamp("us", "UTC")),
            "price": [decimal.Decimal("1.25"), decimal.Decimal("2.00")],
            "kind": pyarrow.array(["x", "y"]).dictionary_encode(),
            "ratio": [float("nan"), 0.5],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert rows_of(tmp_path / "t.parquet") == [
        {"day": "2024-01-31", "moment": "2024-01-31 08:05:00+00:00", "price": 1.25, "kind": "x", "ratio": None},
        {"day": None, "moment": None, "price": 2.0, "kind": "y", "ratio": 0.5},
    ]


def test_large_whole_decimals_of_a_parquet_stay_apart(tmp_path: Path) -> None:
    names = [decimal.Decimal(90071992547409930 + number) for number in range(6)]
    pyarrow.parquet.write_table(pyarrow.table({"id": names}), tmp_path / "t.parquet")
    assert len({row["id"] for row in rows_of(tmp_path / "t.parquet")}) == 6


UNSOUND: dict[str, tuple[str, str | bytes, str]] = {
    "empty file": ("t.csv", "", "is empty or begins with an empty line"),
    "empty first line": ("t.csv", "\na,b\n1,2\n", "begins with an empty line"),
    "header alone": ("t.csv", "a,b\n", "holds no rows"),
    "too few cells": ("t.csv", "a,b\n1,2\n3\n", r"line 3 of .*t.csv has 1 cells, its first line has 2 names"),
    "too many cells": ("t.csv", "a,b\n1,2,3\n", r"line 2 of .* has 3 cells"),
    "no name": ("t.csv", ",b\n1,2\n", "column 1 of .* has no name"),
    "one name twice": ("t.csv", "a,b,a \n1,2,3\n", "two columns named 'a'"),
    "open quotes": ("t.csv", 'a,b\n1,"2\n3,4\n', "no sound CSV .unexpected end of data"),
    "text behind quotes": ("t.csv", 'a,b\n1,"2"x\n', "line 2 of .* is no sound CSV"),
    "lone carriage returns": ("t.csv", "a,b\n1,2\r3,4\r", "is no sound CSV"),
    "a huge cell": ("t.csv", "a,b\n1," + "x" * 200_000 + "\n", "field larger than field limit"),
    "not UTF-8": ("t.csv", b"a,b\n\xff\xfe,2\n", "is not text in UTF-8"),
    "NUL bytes": ("t.csv", b"a,b\n\x00,2\n", "NUL bytes"),
    "cut gzip": ("t.csv.gz", gzip.compress(b"a,b\n1,2\n" * 100)[:-20], "damaged or cut short"),
    "no JSON": ("t.jsonl", '{"a": 1}\n{"a": \n', r"line 2 of .* is no sound JSON"),
    "no object": ("t.jsonl", "[1, 2]\n", "is no JSON object"),
    "a list in a cell": ("t.jsonl", '{"a": [1]}\n', "has a list in column 'a'"),
    "an object in a cell": ("t.jsonl", '{"a": {"b": 1}}\n', "has an object in column 'a'"),
    "a JSON name twice": ("t.jsonl", '{"a": 1, "a": 2}\n', "two cells named 'a'"),
    "an empty JSON name": ("t.jsonl", '{" ": 1}\n', "cell without a name"),
    "half a surrogate": ("t.jsonl", '{"a": "\\ud800"}\n', "half a surrogate pair"),
    "half a surrogate in a name": ("t.jsonl", '{"\\ud800": 1}\n', "half a surrogate pair in the name of a column"),
    "digits without end": ("t.jsonl", '{"a": ' + "9" * 5000 + "}\n", "no sound JSON"),
    "deep JSON": ("t.jsonl", '{"a": ' + "[" * 100_000 + "\n", "no sound JSON"),
    "no parquet": ("t.parquet", "hello", "is not a sound parquet file"),
    "another type": ("t.xlsx", "hello", "is no table of a supported type"),
}


@pytest.mark.parametrize("what", UNSOUND)
def test_an_unsound_file_is_named(tmp_path: Path, what: str) -> None:
    name, content, message = UNSOUND[what]
    with pytest.raises(KalmaGroveError, match=message):
        rows_of(write(tmp_path, name, content))


def test_a_parquet_with_lists_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": [[1, 2], [3]]}), tmp_path / "t.parquet")
    with pytest.raises(KalmaGroveError, match=r"column 'a' of .* holds a list; leave it out"):
        rows_of(tmp_path / "t.parquet")


def test_a_source_that_is_not_there_or_holds_no_table(tmp_path: Path) -> None:
    with pytest.raises(KalmaGroveError, match="there is no file or folder"):
        table_files(str(tmp_path / "none.csv"))
    write(tmp_path, "notes.txt", "hello")
    with pytest.raises(KalmaGroveError, match=r"holds no usable file; put .csv, .jsonl, .parquet files in it"):
        table_files(str(tmp_path))


def many_rows(first: int, count: int) -> str:
    return "a,b\n" + "".join(f"{number},{number % 7}\n" for number in range(first, first + count))


def test_rows_are_divided_by_their_content_and_equal_ones_stay_together(tmp_path: Path) -> None:
    text = many_rows(0, 400)
    path = write(tmp_path, "t.csv", text + text.partition("\n")[2])
    found = [(split, row.cells["a"]) for split, row in split_rows(str(path), seed=0)]
    assert len(found) == 800 and found == [(split, row.cells["a"]) for split, row in split_rows(str(path), seed=0)]
    splits = {split: [cell for own, cell in found if own == split] for split in ("train", "valid", "test")}
    assert not set(splits["train"]) & set(splits["valid"]) and not set(splits["train"]) & set(splits["test"])
    assert all(20 < len(set(splits[split])) < 70 for split in ("valid", "test"))
    assert found != [(split, row.cells["a"]) for split, row in split_rows(str(path), seed=1)]


def test_files_that_are_named_as_splits_keep_their_rows(tmp_path: Path) -> None:
    write(tmp_path, "train-00.csv", many_rows(0, 50))
    write(tmp_path, "train-01.csv.gz", gzip.compress(many_rows(50, 50).encode()))
    write(tmp_path, "validation.jsonl", '{"a": 7, "b": 1}\n')
    write(tmp_path, "other.csv", many_rows(900, 3))
    found = [(split, int(str(row.cells["a"]))) for split, row in split_rows(str(tmp_path), seed=0)]
    assert {number for split, number in found if split != "valid"} == set(range(100))
    assert [number for split, number in found if split == "valid"] == [7]
    assert 1 <= sum(split == "test" for split, _ in found) < 30


@pytest.mark.parametrize("seed", range(20))
def test_equal_rows_are_in_one_split_where_a_split_is_filled_up(seed: int, tmp_path: Path) -> None:
    rows = [f"{number},{number % 3}" for number in range(8)] * 10
    path = write(tmp_path, "t.csv", "\n".join(["a,b", *rows]) + "\n")
    places: dict[str, set[str]] = {}
    for split, row in split_rows(str(path), seed=seed):
        places.setdefault(str(row.cells["a"]), set()).add(split)
    assert all(len(splits) == 1 for splits in places.values())
    assert set.union(*places.values()) == {"train", "valid", "test"}


def test_three_rows_are_enough_for_three_splits_and_two_are_not(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", many_rows(0, 3))
    assert sorted(split for split, _ in split_rows(str(path), seed=0)) == ["test", "train", "valid"]
    path = write(tmp_path, "t.csv", many_rows(0, 2))
    with pytest.raises(KalmaGroveError, match="holds 2 different rows, too few for train, valid, test"):
        list(split_rows(str(path), seed=0))
