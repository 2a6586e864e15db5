"""How much memory the host provider thinks is left, over made-up /proc and /sys trees.

The file under test is compiled with an ``fopen`` that looks below a directory of the test.
"""
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20
DRIVER = r"""
#include <stdio.h>
#include "acl/limits.h"
static const char *root;
FILE *fopen_below(const char *path, const char *mode) {
    char below[8192];
    snprintf(below, sizeof below, "%s%s", root, path);
    return fopen(below, mode);
}
int main(int argc, char **argv) {
    uint64_t available, total;
    root = argv[argc - 1];
    acl_machine_memory(&available, &total);
    printf("%llu %llu\n", (unsigned long long)available, (unsigned long long)total);
    return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    gcc = shutil.which("gcc") or pytest.skip("no gcc here")
    directory = tmp_path_factory.mktemp("limits")
    driver, found = directory / "driver.c", directory / "limits"
    driver.write_text(DRIVER)
    include = [f"-I{ROOT / 'include'}", f"-I{ROOT / 'llm_datadist' / 'host'}"]
    shim = directory / "shim.h"
    shim.write_text("#include <stdio.h>\nFILE *fopen_below(const char *path, const char *mode);\n"
                    "#define fopen fopen_below\n")
    objects = []
    limits = ROOT / "llm_datadist" / "host" / "acl" / "limits.c"
    for source, extra in ((driver, []), (limits, ["-include", str(shim)])):
        objects.append(str(directory / f"{source.stem}.o"))
        run(gcc, "-std=gnu11", "-Wall", "-Wextra", "-Werror", *include, *extra, "-c", str(source), "-o", objects[-1])
    run(gcc, *objects, "-o", str(found))
    try:
        run(found, "/nowhere")
    except OSError as error:
        pytest.skip(f"what gcc makes does not run by itself here: {error}")
    return found


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def machine(program, tmp_path):
    """Write files below a root, and return (available, total) in MiB of what the program makes of them."""
    def answer(tree=()):
        meminfo = {"/proc/meminfo": "MemTotal: 16384 kB\nMemFree: 1 kB\nMemAvailable: 8192 kB\n"}
        for path, text in {**meminfo, **dict(tree)}.items():
            place = Path(f"{tmp_path}{path}")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        available, total = map(int, run(str(program), str(tmp_path)).split())
        return available / MIB, total / MIB
    return answer


def group_2(path, limit, usage, cache=0):
    base = f"/sys/fs/cgroup{path}"
    return {f"{base}/memory.max": f"{limit}\n", f"{base}/memory.current": f"{usage}\n",
            f"{base}/memory.stat": f"anon 5\ninactive_file {cache}\nactive_file 7\n"}


def group_1(path, limit, usage, cache=0):
    base = f"/sys/fs/cgroup/memory{path}"
    return {f"{base}/memory.limit_in_bytes": f"{limit}\n", f"{base}/memory.usage_in_bytes": f"{usage}\n",
            f"{base}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}\n"}


def test_without_groups_it_is_what_the_kernel_says(machine):
    assert machine() == (8, 16)


def test_a_group_without_limit_changes_nothing(machine):
    assert machine(tree={"/proc/self/cgroup": "0::/app\n", **group_2("/app", "max", 3 * MIB)}) == (8, 16)
    assert machine(tree={"/proc/self/cgroup": "9:memory:/app\n", **group_1("/app", 2**63 - 4096, MIB)}) == (8, 16)


@pytest.mark.parametrize(("line", "group"), [("0::/app\n", group_2), ("4:cpu:/x\n9:memory:/app\n", group_1)])
def test_the_limit_of_the_own_group_counts_without_its_page_cache(machine, line, group):
    assert machine(tree={"/proc/self/cgroup": line, **group("/app", 6 * MIB, 4 * MIB, MIB)}) == (3, 6)


@pytest.mark.parametrize(("line", "group"), [("0::/outer/inner\n", group_2), ("9:memory:/outer/inner\n", group_1)])
def test_the_tightest_group_above_us_decides(machine, line, group):
    assert machine(tree={"/proc/self/cgroup": line, **group("/outer/inner", 10 * MIB, MIB),
                         **group("/outer", 5 * MIB, 3 * MIB)}) == (2, 5)


@pytest.mark.parametrize(("line", "group"), [("0::/not/seen/here\n", group_2), ("9:memory:/not/seen/here\n", group_1)])
def test_in_a_container_the_mount_is_the_own_group(machine, line, group):
    assert machine(tree={"/proc/self/cgroup": line, **group("", 4 * MIB, MIB)}) == (3, 4)


def test_a_full_group_leaves_nothing(machine):
    assert machine(tree={"/proc/self/cgroup": "0::/\n", **group_2("", 4 * MIB, 5 * MIB)}) == (0, 4)


def test_a_kernel_that_has_more_than_the_group_does_not_widen_it(machine):
    assert machine(tree={"/proc/self/cgroup": "0::/\n", **group_2("", 12 * MIB, 0)}) == (8, 12)
