"""Public weights by name: where they come from, what they must be, where they are kept.

Every file has a pinned size and sha256, or, where none is published, the ones of the
first download, which are kept beside it and checked ever after. A file appears in the
cache folder only when it is whole and verified::

    ~/.cache/rvc_mlx/            or $RVC_MLX_HOME
    ├── rmvpe/rmvpe.pt
    └── contentvec/
        ├── pytorch_model.bin
        ├── config.json
        └── recorded.json        sizes and hashes of the first download
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rvc_mlx.checkpoint import hash_file
from rvc_mlx.machine import cache_folder

RECORD = "recorded.json"
METADATA_TIMEOUT = 10.0  # seconds to wait for the hub's answer
TRANSFERS = 3  # tries; each goes on where the one before broke off


@dataclass(frozen=True)
class WeightFile:
    """One file of a hub repository; ``None`` where size or hash is not published."""

    path: str  # inside the repository
    size: int | None = None  # bytes
    sha256: str | None = None

    @property
    def name(self) -> str:
        """The file's name without folders, which it keeps in the cache."""
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Weights:
    """Named public weights; the first file holds the tensors."""

    repo: str
    files: tuple[WeightFile, ...]


# fmt: off
PUBLIC_WEIGHTS: Mapping[str, Weights] = {
    "rmvpe": Weights("lj1995/VoiceConversionWebUI", (
        WeightFile("rmvpe.pt", 181184272,
                   "6d62215f4306e3ca278246188607209f09af3dc77ed4232efdd069798c4ec193"),
    )),
    "hubert-fairseq": Weights("lj1995/VoiceConversionWebUI", (
        WeightFile("hubert_base.pt", 189507909,
                   "f54b40fd2802423a5643779c4861af1e9ee9c1564dc9d32f54f20b5ffba7db96"),
    )),
    "hubert": Weights("lj1995/VoiceConversionWebUI", (
        WeightFile("hubert_base/pytorch_model.bin", None,
                   "cc8c20f4b90a520757260197a3ff2505705a7adbd20ad9eeaa4e1a9b38442ef5"),
        WeightFile("hubert_base/config.json", None,
                   "0346950779dfb7f9316fa74ed846e2b8a22a08eedfdc5387b73f327cb1a4a7cf"),
    )),
    "contentvec": Weights("IAHispano/Applio", (
        WeightFile("Resources/embedders/contentvec/pytorch_model.bin"),
        WeightFile("Resources/embedders/contentvec/config.json"),
    )),
}
# fmt: on


class _MissingError(FileNotFoundError):
    """The hub answered that it does not have the file."""


def locate(
    name: str,
    *,
    folder: str | os.PathLike | None = None,
    table: Mapping[str, Weights] = PUBLIC_WEIGHTS,
) -> Path | None:
    """The weights' main file if all files are there in the right size, else ``None``.

    Hashes were checked when the files arrived; `download` checks them again.

    Raises:
        ValueError: the name is unknown.
    """
    place = _place(name, folder, table)
    for file in table[name].files:
        wanted = _expected(place, file)
        path = place / file.name
        if not path.is_file() or wanted.size not in (None, path.stat().st_size):
            return None
    return place / table[name].files[0].name


def download(
    name: str,
    *,
    folder: str | os.PathLike | None = None,
    from_dir: str | os.PathLike | None = None,
    endpoint: str | None = None,
    table: Mapping[str, Weights] = PUBLIC_WEIGHTS,
) -> Path:
    """Fetch named weights, verify them, and give the path of the main file.

    Files that are there and right are kept; an interrupted transfer is resumed.

    Args:
        name: a name of ``table``.
        folder: the cache folder; by default `cache_folder`.
        from_dir: take the files from this folder instead of the network.
        endpoint: the hub's address; by default huggingface_hub's own.
        table: the weights that are known.

    Raises:
        ValueError: the name is unknown, or a file has another size or hash.
        FileNotFoundError: ``from_dir`` or the hub does not have a file.
        ConnectionError: the hub cannot be reached or the transfer broke off.
    """
    place = _place(name, folder, table)
    place.mkdir(parents=True, exist_ok=True)
    for file in table[name].files:
        target = place / file.name
        wanted = _expected(place, file)
        if target.is_file():
            _verify(target, wanted, f"delete {target} and try again")
        elif from_dir is not None:
            _copy(file, wanted, Path(from_dir), target)
        else:
            _fetch_alone(table[name].repo, wanted, target, endpoint)
        if file.sha256 is None:
            _record(place, target)
    return place / table[name].files[0].name


def _place(
    name: str, folder: str | os.PathLike | None, table: Mapping[str, Weights]
) -> Path:
    if name not in table:
        raise ValueError(f"no weights are named {name!r}; known are {', '.join(table)}")
    return (cache_folder() if folder is None else Path(folder)) / name


def _expected(place: Path, file: WeightFile) -> WeightFile:
    """The file with the size and hash of its first download, where none are pinned."""
    path = place / RECORD
    if file.sha256 is not None or not path.is_file():
        return file
    try:
        entry = json.loads(path.read_text("utf-8")).get(file.name)
        return file if entry is None else WeightFile(file.path, *_pair(entry))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: the record of hashes is damaged; delete it and download again"
        ) from error


def _pair(entry: dict) -> tuple[int, str]:
    return int(entry["size"]), str(entry["sha256"])


def _record(place: Path, target: Path) -> None:
    """Keep size and hash of a file that has none published."""
    path = place / RECORD
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if target.name in known:
        return
    known[target.name] = {"size": target.stat().st_size, "sha256": hash_file(target)}
    partial = path.with_name(f".{RECORD}.{uuid.uuid4().hex[:8]}.partial")
    partial.write_text(json.dumps(known, indent=2) + "\n", "utf-8")
    os.replace(partial, path)


def _verify(path: Path, wanted: WeightFile, remedy: str) -> None:
    size = path.stat().st_size
    if wanted.size not in (None, size):
        raise ValueError(
            f"{path}: has {size} bytes but {wanted.name} has {wanted.size}; {remedy}"
        )
    if wanted.sha256 is not None and (found := hash_file(path)) != wanted.sha256:
        raise ValueError(
            f"{path}: has sha256 {found} but {wanted.name} has {wanted.sha256}; {remedy}"
        )


def _copy(file: WeightFile, wanted: WeightFile, source: Path, target: Path) -> None:
    """Copy a file from a local folder, under its own name or its path in the hub."""
    places = [source / file.path, source / target.parent.name / file.name]
    places.append(source / file.name)
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        looked = ", ".join(str(path) for path in dict.fromkeys(places))
        raise FileNotFoundError(f"{source}: has no {file.name}; looked for {looked}")
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        shutil.copyfile(found, partial)
        _verify(partial, wanted, f"{found} is another file; get the right one")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _fetch_alone(
    repo: str, wanted: WeightFile, target: Path, endpoint: str | None
) -> None:
    """Fetch the file unless another process does so meanwhile."""
    from huggingface_hub.utils import WeakFileLock

    with WeakFileLock(target.parent / ".lock"):
        if not target.is_file():
            _fetch(repo, wanted, target, endpoint)


def _fetch(repo: str, wanted: WeightFile, target: Path, endpoint: str | None) -> None:
    """Download one file beside its target, verify it and move it there."""
    staging = target.parent / ".partial"
    try:
        _ask(repo, wanted, endpoint)
        _transfer(repo, wanted, staging, endpoint)
    except _transfer_errors() as error:
        if isinstance(error, _MissingError):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConnectionError(
            f"{target.name}: could not be downloaded from {repo} ({reason}); check the "
            f"network, or get the file elsewhere and put it at {target} or pass its "
            "folder with --from-dir"
        ) from error
    whole = staging / wanted.path
    try:
        _verify(whole, wanted, "the hub's file has changed or the transfer is damaged")
        os.replace(whole, target)
    finally:
        shutil.rmtree(staging)


def _transfer_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises: its error, OSError and its HTTP library's error."""
    from huggingface_hub.utils import HfHubHTTPError

    return tuple(
        kind
        for kind in (*HfHubHTTPError.__mro__, OSError)
        if issubclass(kind, Exception) and kind is not Exception
    )


def _ask(repo: str, wanted: WeightFile, endpoint: str | None) -> None:
    """Ask the hub about the file first: this fails at once without a network.

    Raises:
        ValueError: the file has another size, so it need not be transferred.
        FileNotFoundError: the hub does not have it.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import EntryNotFoundError, RepositoryNotFoundError

    url = hf_hub_url(repo, wanted.path, endpoint=endpoint)
    try:
        found = get_hf_file_metadata(url, token=False, timeout=METADATA_TIMEOUT)
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise _MissingError(
            f"{wanted.name}: {repo} on the hub has no file {wanted.path}; it has moved: "
            "get it elsewhere and pass its folder with --from-dir"
        ) from error
    if wanted.size is not None and found.size not in (None, wanted.size):
        raise ValueError(
            f"{url}: has {found.size} bytes but {wanted.name} should have "
            f"{wanted.size}; the hub's file has changed"
        )


def _transfer(
    repo: str, wanted: WeightFile, staging: Path, endpoint: str | None
) -> None:
    """Let huggingface_hub write the file under ``staging``."""
    from huggingface_hub import hf_hub_download

    for attempt in range(TRANSFERS):
        try:
            hf_hub_download(
                repo, wanted.path, local_dir=staging, endpoint=endpoint, token=False
            )
            return
        except _transfer_errors():
            if attempt == TRANSFERS - 1:
                raise
