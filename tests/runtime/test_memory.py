"""Free memory is what the machine has, and no more than the control groups of a container or batch job allow."""

import resource

import pytest

from kr_fast.runtime import memory

GIB = 1 << 30


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"memory.{name}").write_text(f"{value}\n")


@pytest.fixture
def left(monkeypatch, tmp_path):
    """``left(text)``: free bytes of a process whose /proc/self/cgroup holds ``text``, on a machine with 8 GiB free."""

    def result(text):
        folders = list(memory.control_groups(text, tmp_path))
        return min([8 * GIB, *(memory.available_in(folder, 8 * GIB) for folder in folders)])

    return result


def test_limits_of_version_2_on_the_way_up(left, tmp_path):
    assert left("0::/\n") == 8 * GIB  # no files at all
    group(tmp_path / "job" / "step", max="max", current=5 * GIB, stat="inactive_file 0")
    assert left("0::/job/step\n") == 8 * GIB
    group(tmp_path / "job", max=4 * GIB, current=3 * GIB, stat=f"anon 1\ninactive_file {GIB // 2}")
    assert left("0::/job/step\n") == 3 * GIB // 2
    group(tmp_path, max=GIB, current=2 * GIB, stat="inactive_file 0")
    assert left("0::/job/step\n") == 0


def test_limits_of_version_1(left, tmp_path):
    text = "9:cpu,cpuacct:/job\n4:memory:/job\n0::/\n"
    group(tmp_path / "memory" / "job", limit_in_bytes=2**63 - 4096, usage_in_bytes=GIB, stat="total_inactive_file 0")
    assert left(text) == 8 * GIB
    group(tmp_path / "memory" / "job", limit_in_bytes=3 * GIB, usage_in_bytes=GIB, stat=f"total_inactive_file {GIB}")
    assert left(text) == 3 * GIB


def test_this_machine_has_some():
    assert 0 < memory.free_memory() < 1 << 50


def test_freed_memory_is_kept():
    if not memory.keep_freed_memory():
        pytest.skip("the thresholds are the user's, or there is no mallopt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        [bytearray(24 << 20) for _ in range(4)]  # 6,144 pages each; by default all but 48 MB go back
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2 * 4 * 6_144  # of 8 rounds


def test_freed_memory_is_returned():
    if not memory.keep_freed_memory():
        pytest.skip("the thresholds are the user's, or there is no mallopt")
    kept = [bytearray(24 << 20) for _ in range(4)]
    held = anonymous()
    del kept
    memory.return_freed_memory()
    assert anonymous() < held - (3 * 24 << 10)


def anonymous():
    """KiB of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
