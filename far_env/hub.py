"""Repositories of the Hugging Face hub: files of one commit are listed, fetched and verified, and small folders pushed.

`list_files` pins a commit, `fetch` resumes and verifies one file, `snapshot` keeps some files of a commit in the cache and
works without a network afterwards, `push` makes one commit of given files. The environment variables HF_ENDPOINT, HF_TOKEN and
HF_HUB_OFFLINE are those of huggingface_hub. Nothing that is fetched is ever executed or unpickled here.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from far_env.hub_errors import HubError, Unreachable, endpoint, is_connection_error, patiently, sentences
from far_env.io import cache_dir, locked, read_json, write_json

PREFIX = "hub:"
"""The beginning of the names of policies, hosts and results in a repository: hub:user/name or hub:user/name@revision."""
CONNECTION_SECONDS = 5
"""How long a request waits for the first answer."""
_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([^\s@]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REFS_FILE = "revisions.json"


@dataclass(frozen=True)
class HubFile:
    """A file of a commit.

    Attributes:
        size: in bytes; None if it is unknown.
        sha256: of its content, or its first hex digits, for files that git does not hold itself; else None.
        git_sha1: git's SHA-1 of the content with a header, for the others; else None.
    """

    size: int | None
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class Listing:
    """The files of one commit of a repository.

    Attributes:
        repository: user/name.
        kind: "model" or "dataset".
        commit: the 40 hex digits of the commit.
        files: name → facts.
    """

    repository: str
    kind: str
    commit: str
    files: Mapping[str, HubFile]


def is_hub_name(name: str) -> bool:
    """Return whether a name is meant to be that of a repository."""
    return name.startswith(PREFIX)


def split_name(name: str) -> tuple[str, str | None]:
    """Repository and revision of hub:user/name[@revision]. Raises HubError if the name has another form."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise HubError(f"{name!r} is no repository; the form is hub:user/name or hub:user/name@revision")
    return match[1], match[2]


def list_files(repository: str, kind: str = "model", revision: str | None = None) -> Listing:
    """The files of a commit, by default the newest.

    Raises:
        Unreachable: without a network.
        HubError: if the repository or the revision does not exist, or needs a token.
    """
    from huggingface_hub import HfApi

    def ask() -> Listing:
        info = HfApi(endpoint=endpoint()).repo_info(
            repository, repo_type=kind, revision=revision, files_metadata=True, timeout=CONNECTION_SECONDS
        )
        files = {}
        for entry in info.siblings or []:
            large = entry.lfs
            sha256 = None if large is None else large["sha256"] if isinstance(large, dict) else large.sha256
            files[entry.rfilename] = HubFile(int(entry.size or 0), sha256, None if large else entry.blob_id)
        return Listing(repository, kind, info.sha or "", files)

    with sentences(repository, revision):
        listing = patiently(ask)
    if not _COMMIT.fullmatch(listing.commit):
        raise HubError(f"{endpoint()} did not name a commit of {repository}; it is no Hugging Face hub, check HF_ENDPOINT")
    return listing


def fetch(listing: Listing, name: str, path: Path) -> None:
    """Fetch a file of the commit to ``path``, unless it is there, and verify it. A stopped download is resumed.

    What has arrived is in ``path`` with the suffix .part until the file is complete and its hash is the listed one.

    Raises:
        Unreachable: if the connection cannot be made, or breaks again and again.
        HubError: if the commit has no such file, or what arrived has another hash; it is then removed.
        ValueError: on a full disk or missing rights.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if name not in listing.files:
        raise HubError(f"{listing.repository} holds no file {name} at commit {listing.commit[:10]}")
    url = hf_hub_url(listing.repository, name, repo_type=listing.kind, revision=listing.commit, endpoint=endpoint())
    with sentences(listing.repository, listing.commit, written=f"{path}.part"):
        _fetch(url, path, listing.files[name], f"{name} of {listing.repository}", build_hf_headers())


def fetch_url(url: str, path: Path, sha256: str | None) -> None:
    """Fetch a file from elsewhere, as `fetch` does; no token is sent.

    Args:
        sha256: of its content, or the first hex digits of it; None if it is unknown: a part of it is then not continued.

    Raises:
        HubError and ValueError: as `fetch`.
    """
    parts = urlsplit(url)
    name = PurePosixPath(parts.path).name
    with sentences(name, written=f"{path}.part", place=f"{parts.scheme}://{parts.netloc}"):
        if sha256 is None:
            path.with_name(f"{path.name}.part").unlink(missing_ok=True)
        _fetch(url, path, HubFile(None, sha256, None), name, {})


def _fetch(url: str, path: Path, expected: HubFile, what: str, headers: dict[str, str]) -> None:
    from huggingface_hub.file_download import http_get

    if path.exists():
        return
    part = path.with_name(f"{path.name}.part")

    def arrived() -> int:
        return part.stat().st_size if part.exists() else 0

    def get() -> None:
        shown = PurePosixPath(urlsplit(url).path).name
        while True:
            have = arrived()
            try:
                with part.open("ab") as file:
                    http_get(
                        url, file, resume_size=have, headers=headers, expected_size=expected.size, displayed_filename=shown
                    )
                return
            except Exception as error:
                # Some versions of huggingface_hub give up at the first break. A connection that brought something goes on.
                if not is_connection_error(error) or arrived() <= have:
                    raise

    path.parent.mkdir(parents=True, exist_ok=True)
    if part.exists() and expected.size is not None and part.stat().st_size > expected.size:
        part.unlink()
    if not part.exists() or _difference(part, expected) is not None:
        patiently(get)
    if (wrong := _difference(part, expected)) is not None:
        part.unlink()
        raise HubError(f"{what} arrived with {wrong}: the transfer was damaged and is removed; try again")
    part.replace(path)


@dataclass(frozen=True)
class Snapshot:
    """Files of a commit on this machine.

    Attributes:
        folder: holds the files.
        commit: the 40 hex digits of the commit.
    """

    folder: Path
    repository: str
    commit: str

    @property
    def name(self) -> str:
        """The name that always means this commit."""
        return f"{PREFIX}{self.repository}@{self.commit}"


@functools.lru_cache(maxsize=64)
def snapshot(name: str, needed: tuple[str, ...], also: tuple[str, ...] = ()) -> Snapshot:
    """The files of hub:user/name[@revision] that a purpose needs, in the cache; one commit for the whole process.

    A commit that is in the cache is used without a network, and so is a branch that was resolved before if there is none.

    Args:
        needed: names of files that must be there.
        also: patterns, such as ``frames/*``, of files that are fetched as well.

    Raises:
        HubError: if the repository cannot be used or lacks a needed file, or without a network if it is not in the cache.
    """
    repository, revision = split_name(name)
    place = cache_dir() / "hub" / repository.replace("/", "--") / hashlib.sha256(repr((needed, also)).encode()).hexdigest()[:8]
    known, asked = _resolved(place), revision or "main"
    commit = revision if revision is not None and _COMMIT.fullmatch(revision) else None
    if commit is not None and (place / commit).is_dir():
        return Snapshot(place / commit, repository, commit)
    try:
        listing = list_files(repository, revision=revision)
    except Unreachable as error:
        commit = known.get(asked)
        if commit is None or not (place / commit).is_dir():
            raise Unreachable(f"{name} is not in the cache, and {error}") from error
        print(f"{name}: the hub is not reached; commit {commit[:10]} from the cache is used", file=sys.stderr)
        return Snapshot(place / commit, repository, commit)
    lacking = [file for file in needed if file not in listing.files]
    if lacking:
        raise HubError(f"{repository} at commit {listing.commit[:10]} lacks {', '.join(lacking)}; it holds {_some(listing)}")
    folder = place / listing.commit
    if not folder.is_dir() or known.get(asked) != listing.commit:
        wanted = [file for file in listing.files if file in needed or any(fnmatch.fnmatchcase(file, item) for item in also)]
        with sentences(repository, written=str(place)):
            place.mkdir(parents=True, exist_ok=True)
            with locked(place):
                if not folder.is_dir():  # else another process was faster
                    _fetch_all(listing, [file for file in wanted if _is_inside(file)], folder)
                write_json(place / _REFS_FILE, {**_resolved(place), asked: listing.commit})
    return Snapshot(folder, repository, listing.commit)


def push(repository: str, files: Mapping[str, Path], message: str, *, private: bool = False, ours: Sequence[str] = ()) -> str:
    """Make the repository if needed, and one commit of the files; returns the 40 hex digits of the commit.

    Args:
        files: name in the repository → path on this machine.
        ours: patterns of files that an earlier push may have left and that are removed unless they are in ``files``.

    Raises:
        HubError: without a token, without the right to write, or without a network.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise HubError(f"pushing to {repository} needs a token that may write: set HF_TOKEN, or log in with hf auth login")
    api = HfApi(endpoint=endpoint())

    def commit() -> str:
        api.create_repo(repository, exist_ok=True, **({"private": True} if private else {}))
        there = list_files(repository).files
        stale = [name for name in there if name not in files and any(fnmatch.fnmatchcase(name, item) for item in ours)]
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        return str(api.create_commit(repository, operations, commit_message=message).oid)

    with sentences(repository, writes=True):
        return patiently(commit)


def _fetch_all(listing: Listing, names: Sequence[str], folder: Path) -> None:
    """Fetch files beside ``folder``, which they become when all are there."""
    unfinished = folder.with_name(f"{folder.name}.part")
    unfinished.mkdir(exist_ok=True)
    for name in names:
        fetch(listing, name, unfinished / name)
    unfinished.rename(folder)


def _resolved(place: Path) -> dict[str, str]:
    """Revision → commit, as processes have found them when the hub was last reached."""
    path = place / _REFS_FILE
    return read_json(path, "delete it") if path.exists() else {}


def _is_inside(name: str) -> bool:
    """Return whether a name of the hub stays inside the folder that it is joined to."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name


def _difference(path: Path, expected: HubFile) -> str | None:
    """What differs between a file and what the commit says of it, or None."""
    size = path.stat().st_size
    if expected.size is not None and size != expected.size:
        return f"{size:,} bytes instead of {expected.size:,}"
    with path.open("rb") as file:
        if expected.sha256 is not None:
            name, wanted, digest = "SHA-256", expected.sha256, hashlib.file_digest(file, "sha256")
        elif expected.git_sha1 is not None:
            # git hashes a header with the length, then the content.
            digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
            name, wanted = "git's SHA-1", expected.git_sha1
            shutil.copyfileobj(file, _HashWriter(digest.update))
        else:
            return None
    actual = digest.hexdigest()
    return None if actual.startswith(wanted) else f"{name} {actual[:8]}… instead of {wanted[:8]}…"


class _HashWriter:
    """A file that only counts into a hash."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.write = write


def _some(listing: Listing) -> str:
    """The first files of a listing, in words."""
    names = sorted(listing.files)
    if not names:
        return "no file"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")
