"""Why a model could not be fetched: a stable reason for conditions, and words for people."""

from __future__ import annotations


class FetchError(Exception):
    """The reasons: ModelNotFound, CredentialsRefused, SourceUnreachable, RateLimited, DiskFull, SourceDamaged,
    InvalidSource."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def of_status(code: int, what: str, said: str = "") -> FetchError:
    """What an HTTP status means for somebody who wants a model."""
    more = f": {said}" if said else ""
    if code in (401, 403):
        return FetchError("CredentialsRefused", f"{what}: HTTP {code}, the credentials are missing, wrong or not enough"
                          f"{more}; put valid ones into the Secret that spec.model.secretRef names")  # fmt: skip
    if code == 404:
        return FetchError("ModelNotFound", f"{what} does not exist (HTTP 404){more}")
    if code == 429:
        return FetchError("RateLimited", f"{what}: HTTP 429, too many requests{more}; it is tried again")
    return FetchError("SourceUnreachable", f"{what}: HTTP {code}{more}")
