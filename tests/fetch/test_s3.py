"""s3:// against moto, a server that speaks S3's protocol and checks signatures."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from moto.server import ThreadedMotoServer

from mainsail_fetch.s3 import trusted

FILES = {"config.json": b"{}", "model.safetensors": b"w" * 200_000, "deep/er/tokenizer.json": b"[]"}


@pytest.fixture(scope="module")
def server():
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture(scope="module")
def account(server: str) -> dict[str, str]:
    """An account that may read the bucket; from here on the server checks who asks."""
    options = {"endpoint_url": server, "region_name": "us-east-1", "aws_access_key_id": "setup",
               "aws_secret_access_key": "setup"}  # fmt: skip
    s3, iam = boto3.client("s3", **options), boto3.client("iam", **options)
    s3.create_bucket(Bucket="models")
    for name, body in FILES.items():
        s3.put_object(Bucket="models", Key=f"tiny/{name}", Body=body)
    s3.put_object(Bucket="models", Key="tinyother/config.json", Body=b"not this one")
    s3.put_object(Bucket="models", Key="one.gguf", Body=b"GGUF")
    iam.create_user(UserName="reader")
    policy = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=policy)
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    assert httpx.post(f"{server}/moto-api/reset-auth", content=b"0").status_code == 200
    return {"AWS_ENDPOINT_URL": server, "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}  # fmt: skip


def test_a_prefix(fetch, account, tmp_path: Path) -> None:
    done = fetch("s3://models/tiny", tmp_path / "m", **account)
    assert done.code == 0, done.log
    found = {str(p.relative_to(tmp_path / "m")): p.read_bytes() for p in (tmp_path / "m").rglob("*") if p.is_file()}
    assert found == FILES


def test_one_object(fetch, account, tmp_path: Path) -> None:
    assert fetch("s3://models/one.gguf", tmp_path / "m", **account).code == 0
    assert (tmp_path / "m" / "one.gguf").read_bytes() == b"GGUF"


@pytest.mark.parametrize(
    ("uri", "change", "reason"),
    [
        ("s3://models/none", {}, "ModelNotFound"),
        ("s3://models/none.gguf", {}, "ModelNotFound"),
        ("s3://no-such-bucket/tiny", {}, "ModelNotFound"),
        ("s3://models/tiny", {"AWS_ACCESS_KEY_ID": "AKIAWRONG"}, "CredentialsRefused"),
        ("s3://models/tiny", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "CredentialsRefused"),
        ("s3://models/tiny", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "SourceUnreachable"),
        ("s3://models/tiny", {"SSL_CERT_FILE": "/nothing", "SSL_CERT_DIR": "/nothing"}, "SourceUnreachable"),
    ],
)
def test_failures_say_why(fetch, account, tmp_path: Path, uri: str, change: dict[str, str], reason: str) -> None:
    done = fetch(uri, tmp_path / "m", **(account | change))
    assert (done.code, done.reason) == (1, reason), done.log
    assert done.message


def test_an_image_without_certificates_gets_some(tmp_path: Path) -> None:
    def paths(cafile: str | None, capath: Path | None) -> ssl.DefaultVerifyPaths:
        make: Any = ssl.DefaultVerifyPaths
        return make(cafile, str(capath) if capath else None, "", "", "", "")

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "one.pem").touch()
    (tmp_path / "empty").mkdir()
    for none in (paths(None, None), paths(None, tmp_path / "empty")):
        assert Path(trusted({}, none)["SSL_CERT_FILE"]).read_text().count("BEGIN CERTIFICATE") > 50
        assert trusted({"SSL_CERT_FILE": "/own"}, none) == {}
    assert trusted({}, paths("/etc/ssl/certs/ca.crt", None)) == {}
    assert trusted({}, paths(None, tmp_path / "full")) == {}
