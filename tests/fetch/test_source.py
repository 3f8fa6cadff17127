"""What a URI means."""

from __future__ import annotations

import pytest

from mainsail_fetch.source import HubSource, OciSource, S3Source, file_in, folder, parse

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("hf://org/name", HubSource("org/name", "", "v1")),
        ("hf://org/name.v2/q/file.gguf", HubSource("org/name.v2", "q/file.gguf", "v1")),
        ("s3://my-bucket/models/one/", S3Source("my-bucket", "models/one")),
        ("oci://ghcr.io/org/model", OciSource("ghcr.io", "org/model", "latest")),
        ("oci://127.0.0.1:5000/m:1.2", OciSource("127.0.0.1:5000", "m", "1.2")),
        (f"oci://r.example/a/b@{DIGEST}", OciSource("r.example", "a/b", DIGEST)),
        ("hf://org", None),
        ("hf://org/name/../x", None),
        ("s3://bucket", None),
        ("s3://UPPER/x", None),
        ("oci://host", None),
        ("oci://host/Repo", None),
        ("pvc://claim/x", None),
        ("https://example.com/x", None),
    ],
)
def test_parsing(uri: str, expected) -> None:
    assert parse(uri, "v1") == expected


def test_folders_are_readable_and_different() -> None:
    one, other = folder("hf://org/name", "main"), folder("hf://org/name", "v2")
    assert one.startswith("org-name-")
    assert one != other
    assert len(folder("s3://bucket/" + "x" * 900, "main")) < 100


def test_a_gguf_is_one_file() -> None:
    assert file_in(HubSource("o/n", "q/m.gguf", "main")) == "m.gguf"
    assert file_in(S3Source("b", "m.gguf")) == "m.gguf"
    assert file_in(S3Source("b", "folder")) == file_in(OciSource("r", "m", "t")) == ""
