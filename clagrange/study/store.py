"""A study's folder: what is stored, what it follows from, and who is at work in it.

    config.yaml                      the resolved settings
    results/STREAM.METHOD.parquet    per-task results of each finished run
    results/earlier/                 results of other settings, data or versions; what returns is taken from there
    checkpoints/STREAM.METHOD.pt     the state after the last finished task of each unfinished run
    locks/STREAM.METHOD.json         which process has taken a run; gone when nobody is at work
    summary.json, report.html, report.md, report.tex, accuracy.png, plasticity.png, profile.png, improvement.png,
    cost.png, streams/STREAM.png, sensitivity/, tensorboard/
                                     once there is something to show

A run is known by its `Origin`: settings, data, version. Results of other settings or data are never taken for
those of the study: they are put away and the run is done again. Finished results of another version are kept,
with a warning; unfinished ones are refused, since one run should not come from two programs.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.weak import WeakTensorKeyDictionary

import clagrange
from clagrange.study.engine import Run, read_checkpoint
from clagrange.study.files import PARTIAL, FileProblem, locked, remove_leftovers, replacing, require_writable
from clagrange.study.groups import Groups
from clagrange.study.machine import beginning_of, lives, this_host
from clagrange.study.problems import SettingsError
from clagrange.study.results import MethodResult
from clagrange.study.settings import Study
from clagrange.tasks import TaskStream

Job = tuple[str, str]
"""A run: the names of its stream and its method."""

UNKNOWN = "unknown"
"""Version and data of results that were stored before these were recorded."""

_SHOWING = (
    *("callbacks/", "cli.py", "configs/", "figures/", "strategies/", "verify/"),
    *("study/problems.py", "study/reporting/", "study/samplers.py", "study/search.py", "study/search_file.py"),
)
"""Parts of the package that no number of a run depends on."""


# ------------------------------------------------------------------------------------------------ origins
@functools.cache
def code_version() -> str:
    """The version of the package, in a checkout with a hash of the sources that runs depend on, and torch's.

    Example:
        >>> code_version().startswith(f"clagrange {clagrange.__version__}")
        True
    """
    package = Path(clagrange.__file__).parent
    version = f"clagrange {clagrange.__version__}"
    if (package.parent / "pyproject.toml").is_file():
        digest = hashlib.sha256()
        for folder, folders, files in os.walk(package, followlinks=True):
            folders.sort()
            for name in sorted(files):
                path = Path(folder, name).relative_to(package).as_posix()
                if name.endswith(".py") and not path.startswith(_SHOWING):
                    digest.update(f"{path}\n".encode() + (package / path).read_bytes())
        version += f"+{digest.hexdigest()[:10]}"
    return f"{version}, torch {torch.__version__}"


def checksum(stream: TaskStream) -> str:
    """A hash of the examples and targets of all tasks of a stream, of whatever seed, test examples included."""
    digest = hashlib.sha256()
    seen: Any = WeakTensorKeyDictionary()
    for number in range(stream.tasks):
        task = stream.task(number)
        for part in (task, task.test):
            if part is None:
                continue
            for tensor in (part.data, part.targets):
                if tensor not in seen:
                    seen[tensor] = True
                    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


_CHECKSUMS: dict[str, str] = {}
"""What was computed in this process, by stream and folder of the data."""


@dataclass(frozen=True)
class Origin:
    """What the numbers of a run follow from.

    Attributes:
        settings: seeds, stream, network and method in full, as JSON has them.
        data: `checksum` of the stream.
        version: `code_version`.
    """

    settings: dict[str, Any]
    data: str
    version: str

    @classmethod
    def of(cls, study: Study, stream: str, method: str) -> "Origin":
        """The origin of a run here and now."""
        body = study.streams[stream]
        where = [body.kind, body.settings, study.seeds[0], os.environ.get("CLAGRANGE_DATA"), str(Path.cwd())]
        key = json.dumps(where, sort_keys=True)
        if key not in _CHECKSUMS:
            _CHECKSUMS[key] = checksum(body.stream(study.seeds[0]))
        settings = settings_of(study.resolved(), stream, method)
        if study.device != "cpu":
            settings["device"] = study.device
        return cls(settings, _CHECKSUMS[key], code_version())

    @property
    def text(self) -> str:
        """All of it, as JSON."""
        return json.dumps(self.written, sort_keys=True)

    @property
    def written(self) -> dict[str, Any]:
        """All of it, as plain containers."""
        return {"settings": self.settings, "data": self.data, "version": self.version}

    @property
    def key(self) -> str:
        """A hash of all of it."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def difference(self, stored: "Origin") -> str | None:
        """The first setting, or the data, in which a stored run differs; None where both are the same."""
        here, there = (dict(_leaves(origin.settings)) for origin in (self, stored))
        for name in [*here, *there]:
            if here.get(name) != there.get(name):
                return f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        if UNKNOWN not in (self.data, stored.data) and self.data != stored.data:
            return f"its data are others (checksum {stored.data} there and {self.data} here)"
        return None


def settings_of(resolved: Mapping[str, Any], stream: str, method: str) -> dict[str, Any]:
    """The part of a resolved study file that one run follows from, as JSON has it.

    Raises:
        KeyError: if the file has no such run.
    """
    body = resolved["streams"][stream]
    read_off_later = ("methods", "threshold")
    parts = {name: value for name, value in body.items() if name not in read_off_later}
    whole = {"seeds": resolved["seeds"], **parts, "method": body["methods"][method]}
    read: dict[str, Any] = json.loads(json.dumps(whole))
    return read


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{prefix}.{key}".lstrip("."))]


# ------------------------------------------------------------------------------------------------ the folder
@dataclass(frozen=True)
class Folder:
    """Where a study keeps its files."""

    path: Path

    def result(self, stream: str, method: str) -> Path:
        """Per-task results of a finished run."""
        return self.path / "results" / f"{stream}.{method}.parquet"

    def checkpoint(self, stream: str, method: str) -> Path:
        """The state of an unfinished run."""
        return self.path / "checkpoints" / f"{stream}.{method}.pt"

    def lock(self, stream: str, method: str) -> Path:
        """Which process has taken a run."""
        return self.path / "locks" / f"{stream}.{method}.json"

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    def prepare(
        self,
        study: Study,
        *,
        resume: bool = False,
        overwrite: bool = False,
        fresh: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Make the folder ready for a study, or refuse.

        Args:
            study: what is to run.
            resume: go on with a study that the folder holds; what has other settings or data is run again.
            overwrite: replace what the folder holds.
            fresh: go on, but run again what is of another version.
            say: told of everything that runs again, and why.

        Raises:
            SettingsError: if the folder is in use and no flag is given, was not made by clagrange, is being
                worked on with other settings, or holds unfinished runs of another version.
            FileProblem: if it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise SettingsError(f"out: expected a folder, got the file {self.path}")
        self._refuse_foreign_files()
        require_writable(self.path)
        with self.alone():
            used = self.config.exists()
            if used and not (resume or overwrite or fresh):
                raise SettingsError(
                    f"out: {self.path} already holds a study; choose another folder, or go on with --resume, "
                    f"or replace it with --overwrite"
                )
            if used:
                self._refuse_strangers(study, overwrite)
            remove_leftovers(self.path)
            if used and overwrite:
                self._clear()
            elif used:
                self._sort_out(study, fresh, say)
            with replacing(self.config) as partial:
                partial.write_text(yaml.safe_dump(study.resolved(), sort_keys=False))

    def require(self, study: Study) -> None:
        """Raise unless the folder still holds the study, to be asked `alone`.

        Between two runs of a process another one may begin with other settings.

        Raises:
            SettingsError: that says so.
        """
        if not self._holds(study):
            raise SettingsError(
                f"out: another process has begun with other settings in {self.path}; what was finished is in "
                f"{self.path / 'results' / 'earlier'}; go on in another folder, or with --resume once it is done"
            )

    def _holds(self, study: Study) -> bool:
        """Whether the settings in the folder are those of a study."""
        with contextlib.suppress(OSError, yaml.YAMLError):
            return bool(
                yaml.safe_load(self.config.read_text()) == yaml.safe_load(yaml.safe_dump(study.resolved()))
            )
        return False

    def _refuse_foreign_files(self) -> None:
        """Raise where files lie in the folder, but no study; another process may be about to begin one."""
        ours = re.compile(rf"locks|\..*\.{PARTIAL}.*")
        names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        if not all(map(ours.fullmatch, names)) and not self.config.exists():
            raise SettingsError(f"out: {self.path} holds files that no study made; choose another folder")

    def _clear(self) -> None:
        """Remove all but the guard that this process holds."""
        for path in [*self.path.glob("locks/*.json"), *self.path.iterdir()]:
            try:
                if path.is_dir() and not path.is_symlink():
                    if path.name != "locks":
                        shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError as error:
                raise SettingsError(f"out: {path} cannot be replaced ({error.strerror})") from error

    def _refuse_strangers(self, study: Study, overwrite: bool) -> None:
        """Raise where another process is at work in the folder and would be disturbed."""
        same = self._holds(study)
        for lock in _locks(self.path / "locks"):
            holder = _holder(lock)
            if holder is not None and (overwrite or not same):
                why = "which --overwrite would remove" if overwrite else "with other settings"
                raise SettingsError(
                    f"out: {holder} is at work in {self.path}, {why}; wait for it or choose another folder (if "
                    f"that process is gone, remove {lock})"
                )

    def _sort_out(self, study: Study, fresh: bool, say: Callable[[str], None]) -> None:
        """Put away what is stored and not of this study, bring back what is, and say so."""
        here = {job: Origin.of(study, *job) for job in study.runs() if _holder(self.lock(*job)) is None}
        refused = {}
        for job in here:
            if self.checkpoint(*job).exists() and not self.result(*job).exists() and not fresh:
                with contextlib.suppress(FileProblem):
                    there = self._origin_of_checkpoint(job)
                    if here[job].difference(there) is None and there.version != here[job].version:
                        refused[".".join(job)] = there.version
        if refused:
            raise SettingsError(
                f"out: {self.path} holds unfinished runs of {_versions(set(refused.values()))} "
                f"({', '.join(refused)}), this is {code_version()}; go on with that version, or start them anew "
                f"with --fresh"
            )
        kept: dict[str, list[str]] = {}
        for job, origin in here.items():
            name, result = ".".join(job), self.result(*job)
            if result.exists():
                try:
                    there = self._origin_of_result(job)
                except FileProblem:
                    say(f"{name} runs again: {result} is damaged; it is kept as {self._damaged(result)}")
                else:
                    reason = origin.difference(there)
                    if reason is None and there.version != origin.version:
                        if fresh:
                            reason = f"it is of {there.version}, this is {origin.version}"
                        else:
                            kept.setdefault(there.version, []).append(name)
                    if reason is not None:
                        say(
                            f"{name} runs again: {reason}; the old result is kept as {self._put_away(job, there)}"
                        )
            if not result.exists() and self._earlier(job, origin).exists():
                self._earlier(job, origin).replace(result)
                say(f"{name}: a result of these settings is taken from {self._earlier(job, origin)}")
            if result.exists():
                self.checkpoint(*job).unlink(missing_ok=True)
            elif self.checkpoint(*job).exists():
                try:
                    there = self._origin_of_checkpoint(job)
                except FileProblem:
                    continue  # said when the run begins
                reason = origin.difference(there)
                if reason is not None or there.version != origin.version:
                    self.checkpoint(*job).unlink()
                    say(f"{name} begins anew: {reason or f'it is of {there.version}, this is {origin.version}'}")
        for version, names in kept.items():
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            say(
                f"warning: results of {version} are kept ({some}), this is {code_version()}; run "
                f"them again with --fresh"
            )

    def _origin_of_result(self, job: Job) -> Origin:
        stored = MethodResult.read(self.result(*job)).origin
        return self._without_record(job) if stored is None else Origin(**stored)

    def _origin_of_checkpoint(self, job: Job) -> Origin:
        try:
            return Origin(**json.loads(read_checkpoint(self.checkpoint(*job))["key"]))
        except (ValueError, TypeError) as error:
            if isinstance(error, FileProblem):
                raise
            return self._without_record(job)

    def _without_record(self, job: Job) -> Origin:
        """Of a part that was stored before origins were recorded: the settings that stand in the folder."""
        try:
            settings = settings_of(yaml.safe_load(self.config.read_text()), *job)
        except (KeyError, TypeError):
            settings = {}
        return Origin(settings, UNKNOWN, "a version that kept no record")

    def _earlier(self, job: Job, origin: Origin) -> Path:
        return self.path / "results" / "earlier" / f"{'.'.join(job)}.{origin.key}.parquet"

    def _put_away(self, job: Job, origin: Origin) -> Path:
        target = self._earlier(job, origin)
        target.parent.mkdir(exist_ok=True)
        return self.result(*job).replace(target)

    def _damaged(self, path: Path) -> Path:
        """Rename a damaged file, for whoever wants to know what happened to it."""
        return path.replace(path.with_name(f"{path.name}.damaged"))

    def start(self, study: Study, job: Job, say: Callable[[str], None]) -> tuple[Run | Groups, Origin]:
        """A run, as its checkpoint has it or from the start, and its origin."""
        checkpoint, origin = self.checkpoint(*job), Origin.of(study, *job)
        run = study.start(*job)
        if checkpoint.exists():
            try:
                run.load(checkpoint, origin.text)
            except FileProblem as error:
                run = study.start(*job)
                say(self.set_aside_checkpoint(job, error))
        return run, origin

    def set_aside_checkpoint(self, job: Job, error: FileProblem) -> str:
        """Rename a damaged checkpoint; what to say of it."""
        kept = self._damaged(self.checkpoint(*job))
        return f"{'.'.join(job)} begins anew: {str(error).partition(';')[0]}; it is kept as {kept}"

    # ------------------------------------------------------------------------------------------- locks
    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """As the only process that looks after the folder; others wait."""
        guard = self.path / "locks" / "guard"
        with locked(guard):
            try:
                yield
            finally:
                if not _locks(guard.parent):
                    guard.unlink(missing_ok=True)
                    with contextlib.suppress(OSError):  # another process has come
                        guard.parent.rmdir()

    def take(self, job: Job, study: Study) -> str | None:
        """Take a run of a study for this process; or say which living process has it.

        Raises:
            SettingsError: if the folder has become that of another study.
        """
        with self.alone():
            self.require(study)
            holder = _holder(self.lock(*job))
            if holder is None:
                with replacing(self.lock(*job)) as partial:
                    partial.write_text(json.dumps({**_me(), "since": time.time()}))
            return holder

    def release(self, job: Job) -> None:
        """Give back a run, if this process has it."""
        with self.alone(), contextlib.suppress(OSError, ValueError):
            taken = json.loads(self.lock(*job).read_text())
            if taken == {**taken, **_me()}:
                self.lock(*job).unlink()

    def tidy(self) -> None:
        """Remove the folder of checkpoints when it is empty."""
        with contextlib.suppress(OSError):
            (self.path / "checkpoints").rmdir()


def _locks(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.json") if not path.name.startswith(".")]  # others are being written


def _versions(versions: set[str]) -> str:
    return " and ".join(sorted(versions))


def _me() -> dict[str, Any]:
    return {"host": this_host(), "pid": os.getpid(), "started": beginning_of(os.getpid())}


def _holder(lock: Path) -> str | None:
    """The living process that a lock file names; None where there is none.

    A process of another machine counts as living: only there it can be told.
    """
    try:
        found = json.loads(lock.read_text())
        pid, host, started = int(found["pid"]), str(found["host"]), found["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if host == this_host() and not lives(pid, started):
        return None
    return f"process {pid} on {host}"


def stored_results(folder: Folder, runs: list[Job]) -> list[MethodResult]:
    """The results of those runs, given by stream and method, that are finished."""
    return [MethodResult.read(folder.result(*run)) for run in runs if folder.result(*run).exists()]
