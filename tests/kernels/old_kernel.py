# SPDX-License-Identifier: MIT
"""Boot a kernel that Debian ships in an emulated machine, and run the core's tests and some of the package's.

    python tests/kernels/old_kernel.py [--kernel linux-image-cloud-amd64] [--processors 2] [--only WORD …]

Needs apt-get, dpkg-deb, qemu-system-x86 and a static busybox. Nothing is installed; what is downloaded and
built is kept in build/kernels/. The machine is emulated instruction by instruction, so nothing but its speed
depends on the processor at hand. Fails unless every test has passed and the machine has switched itself off.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from initramfs import Initramfs

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests"
sys.path.insert(0, str(TESTS))

import buildkit  # noqa: E402

HERE = TESTS / "kernels"
BUILD = ROOT / "build" / "kernels"
FLAGS = ("-O1", *buildkit.SWITCHES, *buildkit.AUDITED)
SLOWER = 20  # times longer than on a real machine, for what the tests themselves wait for
MEMORY = "2G"
MACHINE_SECONDS = 4 * 3600
PYTHON_TESTS = ("barriers", "capabilities", "cow", "fork", "freeze", "arena", "block", "death")
DISTRIBUTIONS = ("pytest", "pytest-timeout", "numpy", "hypothesis", "posix_ipc")


@dataclass(frozen=True)
class Job:
    name: str
    seconds: int
    command: str


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


# ---- what goes into the machine ----------------------------------------------------------------------------


def kernel(package: str) -> Path:
    """The kernel's image out of a package, or out of what a package without one depends on."""
    depends = re.findall(
        r"^\s*Depends: (linux-image-\S+)$", run("apt-cache", "depends", package), re.MULTILINE
    )
    package = depends[0] if depends else package
    place = BUILD / package
    images = sorted(place.glob("boot/vmlinuz-*"))
    if not images:
        place.mkdir(parents=True, exist_ok=True)
        run("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package, cwd=place)
        run("dpkg-deb", "-x", next(place.glob("*.deb")), place)
        images = sorted(place.glob("boot/vmlinuz-*"))
    return images[-1]


def build_c_tests() -> list[Path]:
    out = BUILD / "programs"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    core = buildkit.compile_all(buildkit.core_sources(), out, *FLAGS)
    tests = sorted((TESTS / "csrc").glob("test_*.c"))
    flags = (*FLAGS, "-iquote", buildkit.CSRC, "-iquote", TESTS / "csrc")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda one: buildkit.cc(*flags, one, *core, "-o", out / one.stem), tests))
    return [out / test.stem for test in tests]


def needed(names: tuple[str, ...]) -> set[str]:
    """Distributions and all they need here."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another Python or system
        found.add(name)
        left += [re.split(r"[^\w.-]", one)[0] for one in requires if "extra ==" not in one]
    return found


def add_python(image: Initramfs) -> None:
    """The interpreter that runs this, its library, the package as built in place, what the tests import."""
    image.program(Path(os.path.realpath(sys.executable)), "/usr/bin/python3")
    home = Path(sysconfig.get_path("stdlib"))
    image.tree(home)
    for name in needed(DISTRIBUTIONS):
        for one in importlib.metadata.files(name) or []:
            source = Path(str(one.locate()))
            if source.exists() and "/tests/" not in str(one) and ".." not in one.parts:
                image.file(source, f"/packages/{one}")
                if ".so" in source.name:
                    image.program(source, f"/packages/{one}")
    image.tree(ROOT / "ksmalloc", "/guest/ksmalloc")
    for one in sorted(TESTS.glob("*.py")):
        image.file(one, f"/guest/tests/{one.name}")
    image.file(ROOT / "pyproject.toml", "/guest/pyproject.toml")


def image_of(jobs: list[Job], programs: list[Path]) -> Initramfs:
    image = Initramfs()
    busybox = shutil.which("busybox")
    if not busybox:
        sys.exit("there is no busybox")
    image.program(Path(busybox), "/bin/busybox")
    for name in set(run(busybox, "--list").split()) - {"busybox"}:
        image.link(f"/bin/{name}", "busybox")
    for folder in ("/proc", "/sys", "/dev", "/root"):
        image.directory(folder)
    image.text("/init", (HERE / "init.sh").read_text(encoding="utf-8"), 0o755)
    image.text("/jobs", "".join(f"{job.name}\t{job.seconds}\t{job.command}\n" for job in jobs))
    image.text("/etc/passwd", "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    image.text("/etc/group", "root:x:0:\nnogroup:x:65534:\n")
    settings = {
        "KSMALLOC_TEST_SLOWER": str(SLOWER),
        "PYTHONHOME": str(Path(sysconfig.get_path("stdlib")).parent.parent),
        "PYTHONPATH": "/guest:/packages",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    image.text("/settings", "".join(f"export {name}={value}\n" for name, value in settings.items()))
    for program in programs:
        image.program(program, f"/guest/c/{program.name}")
    add_python(image)
    return image


def all_jobs(programs: list[Path], only: list[str]) -> list[Job]:
    # As as_on says of such a kernel.
    life = "cd /guest && python3 tests/lifekit.py barrier=stop tracking=pagemap"
    jobs = [Job("life", 3600, life)]
    jobs += [Job(f"c-{one.name}", 3600, f"/guest/c/{one.name}") for one in programs]
    for name in PYTHON_TESTS:
        pytest = f"python3 -m pytest -q -p no:cacheprovider -o timeout=1800 tests/test_{name}.py"
        jobs.append(Job(f"python-{name}", 3600, f"cd /guest && {pytest}"))
    for word in only:
        if not any(word in job.name for job in jobs):
            sys.exit(f"no job has {word} in its name")
    return [job for job in jobs if not only or any(word in job.name for word in only)]


# ---- the machine -------------------------------------------------------------------------------------------


def boot(image: Path, archive: Path, processors: int, log: Path) -> str:
    """Everything that the machine said, until it switched itself off."""
    qemu = shutil.which("qemu-system-x86_64")
    if not qemu:
        sys.exit("there is no qemu-system-x86_64")
    words = "console=ttyS0 quiet loglevel=4 panic=-1 rdinit=/init"
    command = [qemu, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(processors), "-m", MEMORY]
    command += ["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]
    command += ["-kernel", str(image), "-initrd", str(archive), "-append", words]
    said = []
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
        ) as machine,
    ):
        assert machine.stdout is not None
        alarm = threading.Timer(MACHINE_SECONDS, machine.kill)  # it may hang, and say nothing
        alarm.start()
        try:
            for line in machine.stdout:
                text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line)
                print(text, end="", flush=True)
                out.write(text)
                said.append(text)
        finally:
            alarm.cancel()
    return "".join(said)


def count(said: str) -> str:
    """How much was run."""
    cases = sum(int(n) for n in re.findall(r"^(\d+) cases, \d+ failed$", said, re.MULTILINE))
    passed = sum(int(n) for n in re.findall(r"\b(\d+) passed\b", said))
    skipped = sum(int(n) for n in re.findall(r"\b(\d+) skipped\b", said))
    return f"{cases} C cases, {passed} Python tests, {skipped} skipped"


def judge(said: str, jobs: list[Job]) -> list[str]:
    """What went wrong."""
    found = dict(re.findall(r"^=== job (\S+) status (\d+) ", said, re.MULTILINE))
    problems = [f"{name}: status {status}" for name, status in found.items() if status != "0"]
    problems += [f"{job.name}: was not run" for job in jobs if job.name not in found]
    if not re.search(r"^=== end$", said, re.MULTILINE):
        problems.append("the machine did not come to the end")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kernel", default="linux-image-cloud-amd64")
    parser.add_argument("--processors", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    image = kernel(options.kernel)
    programs = build_c_tests()
    jobs = all_jobs(programs, options.only)
    archive = BUILD / "initramfs.cpio"
    size = image_of(jobs, programs).write(archive)
    print(f"{image.name}: {len(jobs)} jobs, {size >> 20} MiB of files", flush=True)
    start = time.monotonic()
    said = boot(image, archive, options.processors, BUILD / f"{image.name}.log")
    problems = judge(said, jobs)
    print(f"{image.name}: {len(jobs)} jobs in {time.monotonic() - start:.0f} s, {len(problems)} failed")
    print(f"{image.name}: {count(said)}")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
