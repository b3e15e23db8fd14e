"""FAR's data sets from the Hugging Face hub: shards are fetched, verified and unpacked, each completely or not at all.

A shard is a tar archive without compression. It is read through before anything is written: it may hold folders and plain files
at relative paths without "..", and nothing else. It is unpacked into a hidden folder and then moved into place, so that a
stopped download leaves whole files only; it is deleted once it is unpacked.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from far_env.clips.data_folders import DATA_VARIABLE, DOWNLOAD_FOLDER, DownloadState, data_dir, read_state, write_state
from far_env.clips.datasets import DATASETS
from far_env.clips.recordings import find_lists, find_recordings
from far_env.errors import first_line, unknown_name
from far_env.hub import HubError, Listing, fetch, list_files
from far_env.io import LOCK_FILE, disk_errors, locked, make_run_dir
from far_env.progress import show_progress

REPOSITORIES = {
    "ucf101": "guyuchao/UCF101",
    "bair": "guyuchao/BAIR",
    "minecraft": "guyuchao/Minecraft",
    "dmlab": "guyuchao/DMLab",
    "minecraft_latent": "guyuchao/Minecraft_Latent",
    "dmlab_latent": "guyuchao/DMLab_Latent",
}
"""Data set → repository of FAR's authors. Those with latents are for training."""
_SHARDS = "shard-*.tar"
_RESERVED = (DOWNLOAD_FOLDER, LOCK_FILE)


@dataclass(frozen=True)
class DownloadPlan:
    """What a download will take.

    Attributes:
        name: of the data set.
        folder: where it goes.
        listing: the files of the commit.
        shards: those that are wanted and not yet unpacked.
        state: what is there.
        lists: names of the JSON lists beside the shards.
        free: bytes that the disk of the folder has left.
    """

    name: str
    folder: Path
    listing: Listing
    shards: list[str]
    state: DownloadState
    lists: list[str]
    free: int

    @property
    def bytes_to_fetch(self) -> int:
        """Bytes of shards and lists that have not arrived."""
        arrived = sum(path.stat().st_size for path in (self.folder / DOWNLOAD_FOLDER).rglob("*.tar*") if path.is_file())
        return max(0, self._size(self.shards) + self._size(self.lists) - arrived)

    @property
    def bytes_on_disk(self) -> int:
        """Bytes that the disk must have left: the files, and the largest shard beside what is unpacked from it."""
        largest = max((self.listing.files[name].size for name in self.shards), default=0)
        return self.bytes_to_fetch + largest

    def _size(self, names: list[str]) -> int:
        return sum(self.listing.files[name].size for name in names)

    def text(self) -> str:
        """The plan in two lines."""
        state = self.state
        there = f", {len(state.done)} are there" if state.done else ""
        return (
            f"{self.name}: {state.wanted} of the {len(state.shards)} shards of {self.listing.repository} at commit "
            f"{self.listing.commit[:10]}{there}; {len(self.shards)} shards and {len(self.lists)} lists to fetch, "
            f"{amount(self.bytes_to_fetch)}\n"
            f"to {self.folder}: up to {amount(self.bytes_on_disk)} while unpacking, {amount(self.free)} are free"
        )


def download_plan(name: str, max_shards: int | None = None) -> DownloadPlan | None:
    """What a download will take; None, without asking the hub, if all that is wanted is there.

    A download that was begun stays at its commit, so that all shards are of one state of the repository.

    Args:
        name: one of `REPOSITORIES`.
        max_shards: only the first shards, for a try; None for all.

    Raises:
        ValueError: on an unknown name or a number below 1.
        HubError: if the repository cannot be read, or is laid out in another way.
    """
    if name not in REPOSITORIES:
        raise ValueError(unknown_name("data set to download", name, list(REPOSITORIES)))
    if max_shards is not None and max_shards < 1:
        raise ValueError(f"--max-shards must be at least 1, got {max_shards}")
    folder = data_dir() / name
    before = read_state(folder)
    if before is None and folder.is_dir() and any(path.name not in _RESERVED for path in folder.iterdir()):
        raise ValueError(f"{folder} holds files that were not downloaded by this command; move them, or set {DATA_VARIABLE}")
    if before is not None:
        wanted = min(len(before.shards), max_shards or len(before.shards))
        if replace(before, wanted=wanted).complete:
            write_state(folder, replace(before, wanted=max(wanted, len(before.done))))
            return None
    listing = list_files(REPOSITORIES[name], "dataset", None if before is None else before.commit)
    shards = sorted(file for file in listing.files if PurePosixPath(file).match(_SHARDS))
    if not shards:
        some = ", ".join(sorted(listing.files)[:5]) or "nothing"
        raise HubError(
            f"{listing.repository} has no {_SHARDS} (it holds {some}): it is laid out in another way than FAR's data sets; "
            "fetch it with hf download, unpack it, and give the folder with --data-dir"
        )
    done = [] if before is None else before.done
    wanted = min(len(shards), max_shards or len(shards))
    state = DownloadState(listing.repository, listing.commit, shards, wanted, done)
    missing = [shard for shard in shards[:wanted] if shard not in done]
    lists = sorted(file for file in listing.files if "/" not in file and file.endswith(".json"))
    lists = [file for file in lists if not (folder / file).exists()]
    return DownloadPlan(name, folder, listing, missing, state, lists, _free(folder))


def download(plan: DownloadPlan) -> int:
    """Fetch, verify and unpack what the plan says; returns the number of files unpacked. A stopped download continues.

    Raises:
        HubError: if something cannot be fetched, arrives damaged, or holds what a shard may not hold.
        ValueError: if there is not enough space, another process downloads to the folder, or what was unpacked is no data set.
    """
    if plan.bytes_on_disk > plan.free:
        raise ValueError(
            f"{plan.name} needs up to {amount(plan.bytes_on_disk)} in {plan.folder}, where {amount(plan.free)} are free; free "
            f"some, set {DATA_VARIABLE} to a folder on another disk, or take fewer with --max-shards"
        )
    folder, state, unpacked = make_run_dir(plan.folder), plan.state, 0
    work = folder / DOWNLOAD_FOLDER
    with disk_errors(folder), locked(folder):
        write_state(folder, state)
        for name in plan.lists:
            fetch(plan.listing, name, folder / name)
        for shard in show_progress(plan.shards, description=f"download {plan.name}", unit="shards"):
            archive = work / PurePosixPath(shard).name
            fetch(plan.listing, shard, archive)
            unpacked += unpack(archive, folder, work / "unpacking")
            state = replace(state, done=[*state.done, shard])
            write_state(folder, state)
            archive.unlink()
    _check_layout(plan)
    return unpacked


def unpack(archive: Path, folder: Path, staging: Path) -> int:
    """Unpack a shard below ``folder`` by way of the folder ``staging``, all of it or nothing; returns the number of files.

    Raises:
        HubError: if the archive is damaged, or holds a link, a device, a compressed or sparse file, or a path that leaves the
            folder. Nothing is written then.
    """
    shutil.rmtree(staging, ignore_errors=True)
    with _removed(staging), _opened(archive) as tar:
        members = [member for member in tar if _is_file(member, archive)]
        staging.mkdir(parents=True)
        for member in members:
            tar.extract(member, staging, set_attrs=False, filter="data")
        for member in members:
            target = folder / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            (staging / member.name).replace(target)
    return len(members)


def amount(size: int) -> str:
    """Bytes in words, such as 3.2 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    """Remove the folder at the end of the block, whatever happens."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """The archive; what tarfile finds wrong with it becomes a HubError."""
    try:
        with tarfile.open(archive, "r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise HubError(f"{archive.name} cannot be unpacked: {first_line(error)}; nothing of it was") from error


def _is_file(member: tarfile.TarInfo, archive: Path) -> bool:
    """Return whether a member is a file, and not a folder. Raises HubError on anything else, or on a path outside."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in path.parts[0]:
        reason = "which leaves the folder"
    elif path.parts[:1] and path.parts[0] in _RESERVED:
        reason = "which is the place of the download's own files"
    elif member.issparse():
        reason = "a sparse file"
    elif member.isreg() or member.isdir():
        return member.isreg()
    else:
        reason = "a link" if member.issym() or member.islnk() else "which is no plain file"
    raise HubError(f"{archive.name} holds {member.name[:200]!r}, {reason}; it is not unpacked")


def _check_layout(plan: DownloadPlan) -> None:
    """Raise ValueError unless the folder has a list or a video."""
    if find_lists(plan.folder, DATASETS[plan.name.removesuffix("_latent")].preferred_lists):
        return
    try:
        find_recordings(plan.folder)
    except ValueError as error:
        raise ValueError(
            f"{plan.name} was unpacked to {plan.folder}, but has neither a list nor a video there: {plan.listing.repository} "
            "is laid out in another way than FAR's data sets"
        ) from error


def _free(folder: Path) -> int:
    """Bytes free on the disk of a folder that may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
