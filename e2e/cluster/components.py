"""The command line of each component, as a function of the configuration alone."""

from __future__ import annotations

from pathlib import Path

from e2e.cluster.configuration import Configuration
from e2e.cluster.network import API_PORT, NODE, NODE_IP, POD_RANGE, SERVICE_RANGE

ETCD_URL = "http://127.0.0.1:2379"
ETCD_PEER_URL = "http://127.0.0.1:2380"
KUBELET_ROOT = Path("/var/lib/kubelet")
"""In the mount namespace of the cluster, whatever the checkout's path: a socket's path has 107 bytes at most."""


def etcd(it: Configuration) -> list[str]:
    """One member; without fsync, because this cluster never outlives its machine."""
    return [
        str(it.kubeall), "etcd", f"--data-dir={it.state}/etcd", "--name=mainsail",
        f"--listen-client-urls={ETCD_URL}", f"--advertise-client-urls={ETCD_URL}",
        f"--listen-peer-urls={ETCD_PEER_URL}", f"--initial-advertise-peer-urls={ETCD_PEER_URL}",
        f"--initial-cluster=mainsail={ETCD_PEER_URL}", "--unsafe-no-fsync", "--log-level=warn",
    ]  # fmt: skip


def api_server(it: Configuration) -> list[str]:
    """RBAC and Node authorization, all default admission plus NodeRestriction, aggregation ready."""
    pki = it.pki
    return [
        str(it.kubeall), "kube-apiserver", f"--etcd-servers={ETCD_URL}",
        f"--advertise-address={NODE_IP}", "--bind-address=0.0.0.0", f"--secure-port={API_PORT}",
        f"--tls-cert-file={pki}/apiserver.crt", f"--tls-private-key-file={pki}/apiserver.key",
        f"--client-ca-file={pki}/ca.crt", "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-signing-key-file={pki}/sa.key", f"--service-account-key-file={pki}/sa.pub",
        f"--kubelet-certificate-authority={pki}/ca.crt", "--kubelet-preferred-address-types=InternalIP",
        f"--kubelet-client-certificate={pki}/apiserver-kubelet.crt",
        f"--kubelet-client-key={pki}/apiserver-kubelet.key",
        f"--requestheader-client-ca-file={pki}/front-proxy-ca.crt",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User",
        f"--proxy-client-cert-file={pki}/front-proxy-client.crt",
        f"--proxy-client-key-file={pki}/front-proxy-client.key",
        "--enable-aggregator-routing=true", "--profiling=false", "--v=1",
    ]  # fmt: skip


def controller_manager(it: Configuration) -> list[str]:
    """All controllers, each with its own service account; pod addresses per node."""
    pki = it.pki
    return [
        str(it.kubeall), "kube-controller-manager", *_client(it, "controller-manager"),
        f"--service-account-private-key-file={pki}/sa.key", f"--root-ca-file={pki}/ca.crt",
        f"--cluster-signing-cert-file={pki}/ca.crt", f"--cluster-signing-key-file={pki}/ca.key",
        f"--requestheader-client-ca-file={pki}/front-proxy-ca.crt",
        "--horizontal-pod-autoscaler-sync-period=3s",  # of fifteen: tests wait for it
        "--use-service-account-credentials=true", "--allocate-node-cidrs=true", f"--cluster-cidr={POD_RANGE}",
        f"--service-cluster-ip-range={SERVICE_RANGE}", "--v=1",
    ]  # fmt: skip


def scheduler(it: Configuration) -> list[str]:
    """The default profile."""
    return [str(it.kubeall), "kube-scheduler", *_client(it, "scheduler"), "--v=1"]


def _client(it: Configuration, name: str) -> list[str]:
    config = f"{it.pki}/{name}.conf"
    return [
        f"--kubeconfig={config}", f"--authentication-kubeconfig={config}", f"--authorization-kubeconfig={config}",
        "--bind-address=127.0.0.1", "--leader-elect=false",
        "--kube-api-qps=500", "--kube-api-burst=1000",  # the default of 20/s is slow with thousands of Pods
    ]  # fmt: skip


def containerd(it: Configuration) -> list[str]:
    """The container runtime, from the unpacked packages."""
    return [f"{it.packages}/usr/bin/containerd", "--config", str(it.fill("containerd.toml"))]


def kubelet(it: Configuration) -> list[str]:
    """The node's agent."""
    it.fill("resolv.conf")
    return [
        str(it.kubeall), "kubelet", f"--config={it.fill('kubelet.yaml')}", f"--kubeconfig={it.pki}/kubelet.conf",
        f"--hostname-override={NODE}", f"--node-ip={NODE_IP}", f"--root-dir={KUBELET_ROOT}", "--v=2",
    ]  # fmt: skip


def coredns(it: Configuration) -> list[str]:
    """The cluster's DNS, as a process of the node."""
    return [str(it.kubeall), "coredns", "-conf", str(it.fill("Corefile"))]


def kube_proxy(it: Configuration) -> list[str]:
    """Services, by nftables."""
    return [str(it.kubeall), "kube-proxy", f"--config={it.fill('kube-proxy.yaml')}", f"--hostname-override={NODE}",
            "--v=2"]  # fmt: skip
