"""Rows of JSONL, CSV and parquet files, read within limits."""

from __future__ import annotations

import codecs
import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from expertprune.errors import SpecError, first_line
from expertprune.files import opened, parse_json

_MIB = 2**20
LONGEST = 64 * _MIB  # bytes of one document, and of one line
_ROWS = 16  # of a parquet file in memory at a time
_UNPACKED = 256 * _MIB  # bytes of a column in one row group, unless the file itself is large
_RATIO = 100  # by which text can be compressed


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file, each with the number of its line; raises `SpecError` if it cannot be read."""
    try:
        with opened(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), start=1):
                if len(line) > LONGEST:
                    raise SpecError(f"{path}, line {number}: longer than {LONGEST // _MIB} MiB; split the document")
                if line.strip():
                    if number == 1 and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                        raise SpecError(
                            f"{path}: a JSON array; write one object a line (jq -c '.[]'), or read the file as a data set: "
                            "dataset: json and data_files"
                        )
                    yield number, _object(line, f"{path}, line {number}")
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror or error}") from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    """A line of a JSONL file."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise SpecError(f"{where}: not UTF-8 text: {error.reason}") from None
    text = text.removeprefix("\ufeff")  # some editors begin files so
    row = parse_json(text, where, SpecError, any_integer=True, unique=True)
    if not isinstance(row, dict):
        raise SpecError(f"{where}: not a JSON object: {text[:60]!r}")
    return row


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV file with a header, each with the line that it ends on; all values are text.

    Raises:
        SpecError: the file is not UTF-8 text or not CSV, a line is too long, a column has the name
            of another, or a row has more fields than the header.
    """
    csv.field_size_limit(LONGEST)  # conversations are longer than the library's limit of 131,072 characters
    rows = None
    try:
        with opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            rows = csv.DictReader(_lines(text, path), strict=True)
            _check_names(rows.fieldnames or (), f"{path}, line 1")
            for row in rows:
                if None in row:
                    raise SpecError(f"{path}, line {rows.line_num}: has more fields than the header")
                yield rows.line_num, {key: value for key, value in row.items() if value is not None}
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        line = rows.line_num if rows is not None else 1
        raise SpecError(f"{path}, line {line}: not CSV: {error}") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror or error}") from None


def _lines(text: io.TextIOWrapper, path: Path) -> Iterator[str]:
    """The lines of a text, read no further than the limit of one line."""
    for number, line in enumerate(iter(lambda: text.readline(LONGEST + 1), ""), start=1):
        if len(line) > LONGEST:
            raise SpecError(f"{path}, line {number}: longer than {LONGEST // _MIB} MiB; split the document")
        yield line


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a parquet file, each with its number.

    Raises:
        SpecError: the file cannot be read, unpacks to far more than it is, or a column has the name of another.
    """
    from pyarrow import parquet

    number = 0
    try:
        with opened(path) as source, parquet.ParquetFile(source) as file:
            _check_unpacked(file.metadata, path)
            _check_names(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except SpecError:
        raise
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {first_line(error)}") from None
    except Exception as error:  # a damaged file fails in any way, from ArrowInvalid to OverflowError
        raise SpecError(f"{path}: not a parquet file: {first_line(error)}") from None


def _check_names(names: Iterable[str], where: str) -> None:
    """Raises `SpecError` where two columns have one name, of which a row would hold the last."""
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise SpecError(f"{where}: two columns are named {twice!r}; rename one")


def _check_unpacked(about: Any, path: Path) -> None:
    """Raises `SpecError` where a column unpacks to more than memory should have to hold."""
    most = max(_UNPACKED, _RATIO * path.stat().st_size)
    for group in range(about.num_row_groups):
        for column in range(about.num_columns):
            chunk = about.row_group(group).column(column)
            if chunk.total_uncompressed_size > most:
                raise SpecError(
                    f"{path}: column {chunk.path_in_schema!r} unpacks to {chunk.total_uncompressed_size / _MIB:,.0f} MiB "
                    "in one row group; write smaller row groups"
                )
