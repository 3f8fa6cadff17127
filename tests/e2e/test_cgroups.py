from pathlib import Path

from e2e.cluster.cgroups import Hierarchy, hierarchies, mount_options

V1_GROUPS = "9:name=systemd:/\n8:pids:/\n4:memory:/outer/inner\n2:cpu,cpuacct:/\n0::/\n"
V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /outer /sys/fs/cgroup/memory rw,relatime shared:3 - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
ROOT = Path("/sys/fs/cgroup")


def test_v1_takes_every_hierarchy_with_the_own_folder_below_its_mount():
    assert hierarchies(V1_GROUPS, V1_MOUNTS) == [
        Hierarchy(1, ("cpu", "cpuacct"), ROOT / "cpu,cpuacct", ROOT / "cpu,cpuacct"),
        Hierarchy(1, ("memory",), ROOT / "memory", ROOT / "memory/inner"),
        Hierarchy(1, ("name=systemd",), ROOT / "systemd", ROOT / "systemd"),
    ]


def test_v2_alone_is_taken_at_its_root():
    mounts = "30 23 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    assert hierarchies("0::/user.slice/session-1.scope\n", mounts) == [Hierarchy(2, (), ROOT, ROOT)]


def test_a_hierarchy_without_controllers_is_mounted_by_its_name():
    assert mount_options(Hierarchy(1, ("name=systemd",), ROOT, ROOT)) == "none,name=systemd"
    assert mount_options(Hierarchy(1, ("cpu", "cpuacct"), ROOT, ROOT)) == "cpu,cpuacct"
