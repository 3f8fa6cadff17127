import pytest
from e2e.cluster.gobuild import SOURCE, kubernetes_version, linker_flags
from e2e.steps import StepError


def test_version_is_the_one_that_the_module_requires():
    assert kubernetes_version("require (\n\tk8s.io/kubectl v0.37.2\n\tk8s.io/kubernetes v1.37.2\n)\n") == "1.37.2"
    assert kubernetes_version((SOURCE / "go.mod").read_text()).startswith("1.37.")


def test_no_version_is_said():
    with pytest.raises(StepError, match=r"requires no k8s\.io/kubernetes"):
        kubernetes_version("module x\n")


def test_linker_gets_the_version_in_parts():
    flags = linker_flags("1.37.2")
    assert "-X k8s.io/component-base/version.gitVersion=v1.37.2" in flags
    assert "-X k8s.io/component-base/version.gitMinor=37" in flags
