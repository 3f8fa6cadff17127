import hashlib
import io
import json
import tarfile
from pathlib import Path

from e2e.cluster.images import (
    CONTROL_PLANE_IMAGE,
    ENGINE_IMAGE,
    Image,
    archive,
    base_spec,
    node_images,
    seen_by_containers,
)


def unpacked(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: file.read() for member in tar if (file := tar.extractfile(member))}


def test_every_blob_is_named_by_its_digest_and_referred_to_with_its_size():
    files = unpacked(archive(Image(name="localhost/a:1", files={"etc/passwd": b"x"}, links={"bin": "usr/bin"})))
    (entry,) = json.loads(files["index.json"])["manifests"]
    manifest = json.loads(files[f"blobs/sha256/{entry['digest'][7:]}"])
    for descriptor in (entry, manifest["config"], *manifest["layers"]):
        blob = files[f"blobs/sha256/{descriptor['digest'][7:]}"]
        assert hashlib.sha256(blob).hexdigest() == descriptor["digest"][7:]
        assert len(blob) == descriptor["size"]
    assert entry["annotations"]["io.containerd.image.name"] == "localhost/a:1"


def test_layer_has_folders_before_what_lies_in_them():
    files = unpacked(archive(Image(name="a:1", files={"a/b/c": b"data"}, folders=("tmp",))))
    layers = [data for name, data in files.items() if name.startswith("blobs/") and not data.startswith(b"{")]
    with tarfile.open(fileobj=io.BytesIO(layers[0])) as tar:
        assert [(member.name, oct(member.mode)) for member in tar] == [
            ("a", "0o755"), ("a/b", "0o755"), ("tmp", "0o1777"), ("a/b/c", "0o755"),
        ]  # fmt: skip


def test_same_image_same_bytes():
    one, two = (archive(Image(name="a:1", files={"f": b"1"})) for _ in range(2))
    assert one == two


def test_product_images_run_the_scripts_of_the_project_as_nobody():
    scripts = {"mainsail-engine": "mainsail_engine.cli:main"}
    images = {image.name: image for image in node_images(b"", scripts, [Path("/code/operator"), Path("/code/engine")])}
    for name in (ENGINE_IMAGE, CONTROL_PLANE_IMAGE):
        assert images[name].environment["PATH"].startswith("/opt/mainsail/bin:/opt/mainsail/venv/bin:")
        assert images[name].environment["PYTHONPATH"] == "/opt/mainsail/operator:/opt/mainsail/engine"
        assert images[name].user == "65534:65534"
        assert b"from mainsail_engine.cli import main\n" in images[name].files["opt/mainsail/bin/mainsail-engine"]


def test_a_checkout_is_seen_below_opt_wherever_it_lies():
    seen = dict(seen_by_containers(Path("/tmp/code/.venv"), [Path("/tmp/code/engine")], "/root/python"))
    assert seen["/tmp/code/.venv"] == "/opt/mainsail/venv"
    assert seen["/tmp/code/engine"] == "/opt/mainsail/engine"
    assert seen["/usr"] == "/usr"
    assert seen["/root/python"] == "/root/python"


def test_an_interpreter_of_the_system_needs_no_folder_of_its_own():
    assert "/usr" in dict(pairs := seen_by_containers(Path("/code/.venv"), [], "/usr"))
    assert [here for here, _ in pairs] == ["/usr", "/etc/ld.so.cache", "/code/.venv"]


def test_base_spec_binds_read_only_and_keeps_the_rest():
    default = {"process": {"rlimits": [1], "cwd": "/"}, "mounts": [{"destination": "/proc"}], "root": {"path": "r"}}
    spec = base_spec(default, [("/usr", "/usr"), ("/code", "/opt/code")])
    assert spec["process"] == {"cwd": "/"}
    assert spec["root"] == {"path": "r"}
    assert [mount["destination"] for mount in spec["mounts"]] == ["/proc", "/usr", "/opt/code"]
    assert spec["mounts"][2]["source"] == "/code"
    assert "ro" in spec["mounts"][1]["options"]
    assert default["process"]["rlimits"] == [1]
