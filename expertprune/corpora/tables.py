"""Rows of CSV and parquet files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expertprune.errors import SpecError, first_line

_LONGEST = 2**27  # characters of a CSV field; conversations are longer than the library's limit of 131,072


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV file with a header, each with the line that it ends on; all values are text.

    Raises:
        SpecError: the file is not UTF-8 text or not CSV, or a row has more fields than the header.
    """
    csv.field_size_limit(_LONGEST)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for row in rows:
                if None in row:
                    raise SpecError(f"{path}, line {rows.line_num}: has more fields than the header")
                yield rows.line_num, {key: value for key, value in row.items() if value is not None}
        except UnicodeDecodeError as error:
            raise SpecError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
        except csv.Error as error:
            raise SpecError(f"{path}, line {rows.line_num}: not CSV: {error}") from None


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a parquet file, each with its number; raises `SpecError` if it cannot be read."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, pyarrow.ArrowException) as error:
        raise SpecError(f"{path}: not a parquet file: {first_line(error)}") from None
