"""What a GitOps controller does with a manifest: applies it, and looks whether the API server holds what Git says."""

from __future__ import annotations

from e2e.kube import Kube, KubectlError, wait_for

_AS_ARGO_CD = ("--server-side", "--field-manager=argocd-controller", "-f", "-")


def sync(kube: Kube, manifest: str) -> None:
    """Apply, until nothing is left to apply. A status that is written between the two reads of a diff is a difference
    too, which the next look does not find."""
    kube.run("apply", *_AS_ARGO_CD, stdin=manifest)
    wait_for("nothing left to apply", lambda: not _difference(kube, manifest),
             story=lambda: _difference(kube, manifest))  # fmt: skip


def _difference(kube: Kube, manifest: str) -> str:
    """What `kubectl diff` shows; empty: the API server holds what Git says."""
    try:
        return kube.run("diff", *_AS_ARGO_CD, stdin=manifest)
    except KubectlError as error:
        return str(error) or "a difference"
