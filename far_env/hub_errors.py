"""What can go wrong with the Hugging Face hub, each as one sentence, and waiting for a hub that is busy."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from far_env.errors import first_line
from far_env.io import DISK_ERRORS, disk_error

TRIES = 4
"""Of a request that is answered with one of `BUSY`."""
BUSY = (429, 500, 502, 503, 504)
MAX_WAIT_SECONDS = 300
"""A hub that asks for a longer pause is not waited for."""
Answer = TypeVar("Answer")


class HubError(ValueError):
    """A repository cannot be used; the message names it, the reason and the remedy."""


class Unreachable(HubError):
    """The hub did not answer, so that what is in the cache may be used instead."""


def endpoint() -> str:
    """The hub's address, without a slash at its end: that of HF_ENDPOINT, else of huggingface_hub."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def patiently(function: Callable[[], Answer]) -> Answer:
    """Call a function, and again after a pause while the hub is busy: as long as it asks for, or 1, 2, 4 … seconds."""
    from huggingface_hub.errors import HfHubHTTPError

    for tried in range(1, TRIES + 1):
        try:
            return function()
        except HfHubHTTPError as error:
            status, seconds = _status(error), _retry_after(error, 2 ** (tried - 1))
            if status not in BUSY or tried == TRIES or seconds > MAX_WAIT_SECONDS:
                raise
            print(f"the hub is busy ({status}); trying again in {seconds:g} s", file=sys.stderr, flush=True)
            time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


def _status(error: Exception) -> int | None:
    """The HTTP status of an error, if it has one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _retry_after(error: Exception, otherwise: float) -> float:
    """The seconds that the hub asks to wait."""
    text = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return float(text) if text.isdecimal() else otherwise


@contextmanager
def sentences(
    repository: str,
    revision: str | None = None,
    written: str = "a file",
    *,
    writes: bool = False,
    place: str | None = None,
) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence; ``place`` is the address, by default that of the hub."""
    from huggingface_hub import errors, get_token

    place = place or endpoint()
    token = "the token in use may not" if get_token() else "set HF_TOKEN to a token that may, or log in with hf auth login"
    doing = "write to" if writes else "read"
    try:
        yield
    except (HubError, KeyboardInterrupt):
        raise
    except errors.GatedRepoError as error:
        who = "with the account of the token in use" if get_token() else "and set HF_TOKEN, or log in with hf auth login"
        page = f"{place}/{repository}"
        raise HubError(f"{repository} is only given to those who accept its terms: do that on {page} {who}") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repository} has no revision {revision}; give a branch, a tag or a commit of it") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repository} is not on {place}, or is private: check the name; to {doing} a private one {token}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{repository} has no such file ({first_line(error)})") from error
    except errors.HfHubHTTPError as error:
        status = _status(error)
        if status in (401, 403):
            raise HubError(f"{place} does not let this token {doing} {repository} ({status}); {token}") from error
        if status in BUSY:
            wait = _retry_after(error, 0)
            pause = f" in {wait:,.0f} s" if wait else " later"
            raise HubError(
                f"{place} is busy and asks to wait ({status}); give the same command again{pause}, it continues"
            ) from error
        raise HubError(f"{place} refused to {doing} {repository}: {first_line(error)}") from error
    except errors.HFValidationError as error:
        raise HubError(f"{repository!r} cannot be a repository: {first_line(error)}") from error
    except errors.OfflineModeIsEnabled as error:
        raise Unreachable(f"{repository} cannot be fetched because HF_HUB_OFFLINE is set") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise ValueError(disk_error(error, written)) from error
        if is_connection_error(error):
            raise Unreachable(_unreachable(repository, place, error)) from error
        raise


def is_connection_error(error: Exception) -> bool:
    """Return whether an error is a connection that was not made or broke: of the system, or of the client (requests, httpx)."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError | OfflineModeIsEnabled):
        return False
    client = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    return client or (isinstance(error, OSError) and error.errno not in DISK_ERRORS)


def _unreachable(repository: str, place: str, error: Exception) -> str:
    reason = first_line(error)
    return f"{repository} cannot be fetched from {place} ({reason}); with a network give the same command again, it continues"
