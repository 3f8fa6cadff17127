from pathlib import Path

import pytest
from e2e.cluster import components
from e2e.cluster.configuration import TEMPLATES, Configuration, filled
from e2e.steps import StepError


@pytest.fixture
def configuration(tmp_path: Path) -> Configuration:
    return Configuration(
        state=tmp_path / "state", logs=tmp_path / "log", kubeall=Path("/bin/kubeall"), packages=Path("/debian"),
        bound=(("/usr", "/usr"), ("/code", "/opt/code")), images=("a.tar",), cgroup_root="/mainsail-1",
    )  # fmt: skip


def test_survives_the_way_to_another_process(configuration: Configuration, tmp_path: Path):
    configuration.write(tmp_path / "file")
    assert Configuration.read(tmp_path / "file") == configuration


def test_every_template_is_filled_whole(configuration: Configuration):
    names = [str(path.relative_to(TEMPLATES)) for path in TEMPLATES.rglob("*") if path.is_file()]
    assert "kubelet.yaml" in names
    for name in names:
        assert "@" not in configuration.fill(name).read_text()


def test_a_name_without_a_value_is_an_error():
    with pytest.raises(StepError, match="@NOTHING@"):
        filled("a @NOTHING@ b", {})


def test_the_kubelet_reads_its_filled_file(configuration: Configuration):
    config = next(word for word in components.kubelet(configuration) if word.startswith("--config="))
    assert 'cgroupRoot: "/mainsail-1"' in Path(config.removeprefix("--config=")).read_text()
