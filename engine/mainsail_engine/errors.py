"""Errors of the engine that a user meets: each has a stable reason, and a message that says what to do.

A `StartupError` ends the process: its reason and message go to stderr and to the container's termination message,
from where the operator lifts them into the InferenceService's conditions. A `RequestError` ends one request.
"""

from __future__ import annotations


class StartupError(Exception):
    """The engine cannot start. `reason` is stable; `message` names the file, tensor or flag, and a remedy."""

    reason = "EngineFailed"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ModelNotFoundError(StartupError):
    reason = "ModelNotFound"


class MissingTensorError(StartupError):
    reason = "MissingTensor"


class UnexpectedTensorError(StartupError):
    reason = "UnexpectedTensor"


class UnsupportedModelError(StartupError):
    reason = "UnsupportedModel"


class InvalidConfigurationError(StartupError):
    reason = "InvalidConfiguration"


class OutOfMemoryError(StartupError):
    reason = "OutOfMemory"


class RequestError(Exception):
    """One request cannot be served. `status` is the HTTP status, `param` the offending field where there is one."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
