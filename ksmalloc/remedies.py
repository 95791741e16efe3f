# SPDX-License-Identifier: MIT
"""From facts to what is missing, and the lines that would help here. Nothing here looks at anything."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ksmalloc.facts import Facts

DEVICE = "/dev/userfaultfd"
MOVE_SINCE = (6, 8)
WRITES_SINCE = (6, 9)  # it is there since 6.7, and loses writes now and then

UDEV = """\
echo 'KERNEL=="userfaultfd", MODE="0666"' | sudo tee /etc/udev/rules.d/60-userfaultfd.rules
sudo udevadm control --reload && sudo udevadm trigger --name-match=userfaultfd
# or, until the next boot:
sudo chmod 0666 /dev/userfaultfd"""

SYSCTL = """\
# or, for every program on the machine:
sudo sysctl -w vm.unprivileged_userfaultfd=1"""

MKNOD = f"""\
sudo mknod -m 0666 {DEVICE} c 10 "$(awk '$2 == "userfaultfd" {{ print $1 }}' /proc/misc)\""""

KUBERNETES = """\
# in the DaemonSet of github.com/squat/generic-device-plugin, once a cluster:
args:
- --device
- '{"name": "userfaultfd", "groups": [{"count": 100, "paths": [{"path": "/dev/userfaultfd"}]}]}'
# in the container of the pod:
resources:
  limits:
    squat.ai/userfaultfd: 1"""

DUMPABLE = """\
import ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, after the change of user
# Every process of this user may then attach a debugger, and so read what this one still holds from before."""


@dataclass(frozen=True)
class Missing:
    """Something better that ksmalloc could do, were it not for a reason."""

    name: str
    """``"barrier move"``, ``"barrier stop"``, ``"tracking pagemap"``, ``"tracking writes"``,
    ``"cow sigsegv"``, ``"mappings"``, ``"merging"``."""
    reason: str
    """Why not, in a sentence."""
    remedy: str
    """The lines that would change that here: commands, Python or YAML."""


def missing(facts: Facts) -> tuple[Missing, ...]:
    """Everything better that is not in force, the best first."""
    found = [_move(facts), _stop(facts), _tracking(facts), _handler(facts), _mappings(facts), _merging(facts)]
    return tuple(one for one in found if one is not None)


def against(facts: Facts, barrier: str) -> str:
    """Why a barrier that was asked for by name cannot be had."""
    bare = replace(facts, barrier="none")
    one = {"move": _move, "stop": _stop, "segv": _handler}[barrier](bare)
    if one is None or {"move": facts.move, "stop": facts.stop, "segv": facts.segv}[barrier] is None:
        return f"this process has the barrier {facts.barrier} in this domain"
    return one.reason


# ---- the barrier "move" ------------------------------------------------------------------------------


def _move(facts: Facts) -> Missing | None:
    if facts.barrier == "move":
        return None
    name, since = "barrier move", ".".join(map(str, MOVE_SINCE))
    version = ".".join(map(str, facts.kernel))
    if facts.move is None:
        return Missing(name, "another barrier was asked for by name", 'ksmalloc.Arena(barrier="auto")')
    if facts.kernel < MOVE_SINCE:
        return Missing(name, f"Linux {version} has no UFFDIO_MOVE", f"# a kernel of Linux {since} or later")
    if facts.uffd_user == "ENOSYS" and facts.uffd_device == "ENOENT" and facts.container is None:
        reason = f"this Linux {version} was built without userfaultfd"
        return Missing(name, reason, "# a kernel built with CONFIG_USERFAULTFD=y")
    if facts.move in ("EINVAL", "ENOTTY"):
        reason = f"this Linux {version} does not offer UFFDIO_MOVE"
        return Missing(name, reason, f"# a kernel of Linux {since} or later, x86-64 or aarch64")
    if facts.move in ("EPERM", "EACCES", "ENOENT", "ENOSYS"):
        return Missing(name, _forbidden(facts), _permission(facts))
    return Missing(name, f"userfaultfd failed with {facts.move}", "# as errno(3) says")


def _forbidden(facts: Facts) -> str:
    """Why neither way to a userfaultfd is open."""
    device = {
        "ENOENT": f"there is no {DEVICE}",
        "EACCES": f"{DEVICE} exists, but {facts.user} may not open it",
        "EPERM": f"{DEVICE} exists, but a control group forbids devices",
    }.get(facts.uffd_device or "", f"opening {DEVICE} failed with {facts.uffd_device}")
    if is_filtered(facts):
        return f"a seccomp filter forbids userfaultfd(2), which does not concern the device; {device}"
    return f"{facts.user} may not handle the kernel's page faults; {device}"


def is_filtered(facts: Facts) -> bool:
    """Whether the call is refused to somebody to whom the kernel itself would not refuse it."""
    entitled = facts.can_ptrace or facts.unprivileged_uffd is True
    return facts.uffd_user is not None or (facts.uffd_call == "EPERM" and entitled)


def _permission(facts: Facts) -> str:
    """The lines that give this user a userfaultfd."""
    lines = []
    if facts.container == "kubernetes" and facts.uffd_device != "EACCES":
        lines = [KUBERNETES, "# for a user other than root in the container, on each node:", UDEV]
    elif facts.container is not None and facts.uffd_device != "EACCES":
        tool = facts.container if facts.container in ("docker", "podman") else "docker"
        lines = [
            f"{tool} run --device {DEVICE} …",
            "# for a user other than root in the container, on the host before that:",
            UDEV,
        ]
    elif facts.container is not None:
        lines = [f"# on the host, then start the container again with --device {DEVICE}:", UDEV]
    elif facts.uffd_device == "EPERM":
        lines = ["# in the unit file of the service:", "[Service]", f"DeviceAllow={DEVICE} rw"]
    elif facts.uffd_device == "ENOENT":
        lines = [MKNOD]
    else:
        lines = [UDEV]
    return "\n".join(lines if is_filtered(facts) else [*lines, SYSCTL])


# ---- the barrier "stop" ------------------------------------------------------------------------------


def _stop(facts: Facts) -> Missing | None:
    """How it would work, where "move" does not."""
    if facts.stop is None or facts.barrier in ("move", "segv"):
        return None
    said = f": {facts.stop_reason}" if facts.stop_reason else ""
    if facts.stop == "KSM_EDEVICES":
        return Missing(
            "barrier stop", f"something other than threads may write{said}", _devices(facts.stop_reason)
        )
    if facts.stop == "KSM_EUNSTOPPABLE":
        number = facts.stop_signal
        if "ZMQ" in facts.stop_reason:
            remedy = "arena.freeze(a)  # merges all the same; ZeroMQ's threads block signals on purpose"
        elif "block" in facts.stop_reason:
            remedy = f"signal.pthread_sigmask(signal.SIG_UNBLOCK, {{{number}}})  # in that thread"
        else:
            remedy = "arena.freeze(a)  # merges all the same; nothing else helps until that thread runs again"
        return Missing("barrier stop", f"a thread did not stop{said}", remedy)
    if facts.stop == "EAGAIN":
        remedy = "KSMALLOC_STOP_SIGNAL=SIGRTMIN+1  # in the environment: one that the program does not use"
        return Missing("barrier stop", "the program uses every real-time signal", remedy)
    if facts.stop == "ENOENT":
        return Missing("barrier stop", "there is no /proc", "sudo mount -t proc proc /proc")
    return Missing("barrier stop", f"it failed with {facts.stop}{said}", "# as errno(3) says")


def _devices(reason: str) -> str:
    """How to get rid of what the core has found, by the words that it uses."""
    if "io_uring" in reason:
        return (
            "UV_USE_IO_URING=0  # in the environment of programs with libuv (uvloop); others: close the ring"
        )
    if "AIO" in reason or "aio" in reason:
        return "io_destroy(context)  # in C: libaio's io_queue_release()"
    if "VmPin" in reason or "pinned" in reason:
        return "# let go of the memory that is registered with a device"
    return "os.close(descriptor)  # of what the reason names"


# ---- the others --------------------------------------------------------------------------------------


def _tracking(facts: Facts) -> Missing | None:
    if facts.tracking == "writes":
        return None
    if facts.tracking == "pagemap" or facts.pagemap is None:
        return _writes(facts)
    if not facts.dumpable:
        reason = (
            "the process is not dumpable, since it changed its user or asked for it, so "
            "/proc/self/pagemap is closed to it"
        )
        return Missing("tracking pagemap", reason, DUMPABLE)
    if facts.pagemap == "ENOENT":
        return Missing("tracking pagemap", "there is no /proc/self/pagemap", "sudo mount -t proc proc /proc")
    return Missing("tracking pagemap", f"/proc/self/pagemap: {facts.pagemap}", "# as errno(3) says")


def _writes(facts: Facts) -> Missing | None:
    """Any process may have it, unless the kernel is too old or a filter is in the way."""
    name, since = "tracking writes", ".".join(map(str, WRITES_SINCE))
    version = ".".join(map(str, facts.kernel))
    if facts.writes is None:
        return None
    if facts.kernel < WRITES_SINCE:
        reason = f"Linux {version} has no PAGEMAP_SCAN that can be trusted"
        return Missing(name, reason, f"# a kernel of Linux {since} or later")
    if facts.writes in ("EINVAL", "ENOTTY"):
        reason = f"this Linux {version} does not offer UFFD_FEATURE_WP_ASYNC"
        return Missing(name, reason, f"# a kernel of Linux {since} or later, x86-64 or aarch64")
    if facts.writes in ("EPERM", "EACCES", "ENOENT", "ENOSYS"):
        return Missing(name, _forbidden(facts), _permission(facts))
    return Missing(name, f"userfaultfd failed with {facts.writes}", "# as errno(3) says")


def _handler(facts: Facts) -> Missing | None:
    if facts.segv is None:
        return None
    if facts.segv == "KSM_EMASKED":
        reason = "a thread blocks SIGSEGV, so a store into a read-only page would kill the process"
        remedy = "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGSEGV})  # in that thread"
    elif facts.segv == "KSM_EDISPLACED":
        reason = "another SIGSEGV handler was installed past ksmalloc's, which then does not see a store"
        remedy = "faulthandler.disable(); faulthandler.enable()  # other handlers: before the arena is made"
    else:
        reason, remedy = f"the SIGSEGV handler: {facts.segv}", "# as errno(3) says"
    return Missing("cow sigsegv", reason, remedy)


def _mappings(facts: Facts) -> Missing | None:
    if facts.why_not != "KSM_EBUDGET" or facts.max_map_count is None:
        return None
    reason = f"merging has used up its third of vm.max_map_count = {facts.max_map_count}"
    wanted = max(1 << 20, 4 * facts.max_map_count)
    return Missing(
        "mappings", reason, f"sudo sysctl -w vm.max_map_count={wanted}  # then start the program again"
    )


def _merging(facts: Facts) -> Missing | None:
    """What has nothing to do with what the machine allows."""
    reason, remedy = {
        "KSM_ESTOPPED": ("the domain's settings say run = 0", 'domain.settings["run"] = 1'),
        "KSM_EUSER": (
            "the process has changed its user and could not take its memory along",
            "# make the arena after the change of user",
        ),
        "KSM_ELOST": (
            "its descriptors were closed, and no peer could give them again",
            "# start the program again",
        ),
    }.get(facts.why_not or "", ("", ""))
    return Missing("merging", reason, remedy) if reason else None
