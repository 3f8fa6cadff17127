"""Errors of the engine that a user meets: each has a stable reason, and a message that says what to do.

A `StartupError` ends the process: its reason and message go to stderr and to the container's termination message,
from where the operator lifts them into the InferenceService's conditions. A `RequestError` ends one request.
"""

from __future__ import annotations

import json
import os
import sys


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


class InvalidAdapterError(StartupError):
    reason = "InvalidAdapter"


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


DEFAULT_TERMINATION_LOG = "/dev/termination-log"


def report_startup_error(error: StartupError) -> None:
    """One line on stderr, and the same as JSON where Kubernetes picks up a container's last message."""
    message = " ".join(error.message.split())
    print(f"error: {error.reason}: {message}", file=sys.stderr, flush=True)
    path = os.environ.get("MAINSAIL_TERMINATION_LOG", DEFAULT_TERMINATION_LOG)
    if not os.access(path, os.W_OK):
        return
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps({"reason": error.reason, "message": message}) + "\n")
