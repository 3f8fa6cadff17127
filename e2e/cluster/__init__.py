"""A real Kubernetes on one machine, as plain processes in namespaces of their own.

    python -m e2e.cluster up|down|status

Who does what, in the order in which it happens:

    place.py       where everything of a checkout lies, and the names and ports derived from its path
    packages.py    containerd, runc, CNI plugins, nft: Debian packages, unpacked and never installed
    gobuild.py     etcd, the control plane, kubelet, kube-proxy, CoreDNS, kubectl, helm: one Go program (kubeall/)
    images.py      the node's tiny container images, and what of the host its containers see instead
    pki.py         keys, certificates, kubeconfigs
    cgroups.py     the cgroup that holds every process of the cluster: what `down` ends, whoever started it
    netns.py       the network namespace: the cluster's addresses exist only in there
    machine.py     process 1 in there: starts the components of components.py and waits for each
    forward.py     127.0.0.1:port on the host to the API server and to the gateway inside
    rig.py         up, down and status made of these

Two checkouts share nothing but the cache: names, cgroup and ports follow from the checkout's path. The cgroup is
the only record that `down` needs, so a cluster whose starter was killed is found and ended as well.
"""
