# SPDX-License-Identifier: MIT
"""From facts to remedies: every reason for something worse has lines that fit the place."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ksmalloc import remedies
from ksmalloc.facts import Facts
from ksmalloc.remedies import Missing, missing

BEST = Facts(
    barrier="move",
    tracking="writes",
    move=None,
    uffd_device=None,
    uffd_call=None,
    uffd_user=None,
    stop=None,
    segv=None,
    pagemap=None,
    writes=None,
    why_not=None,
    stop_reason="",
    stop_signal=58,
    dumpable=True,
    kernel=(6, 18),
    user="nobody",
    can_ptrace=False,
    unprivileged_uffd=False,
    container=None,
    max_map_count=65530,
)
PLAIN: dict[str, Any] = {
    "barrier": "stop",
    "move": "EACCES",
    "uffd_device": "EACCES",
    "uffd_call": "EPERM",
}


def only(name: str, **changes: Any) -> Missing:
    """The one thing that is missing."""
    [one] = missing(dataclasses.replace(BEST, **changes))
    assert one.name == name
    assert one.remedy
    assert not one.reason.endswith(".")
    return one


def test_nothing_is_missing() -> None:
    assert missing(BEST) == ()
    assert (
        missing(dataclasses.replace(BEST, uffd_device="EACCES", stop="KSM_EDEVICES")) == ()
    )  # root has the call


# ---- move --------------------------------------------------------------------------------------------------


def test_no_permission_on_a_plain_host() -> None:
    one = only("barrier move", **PLAIN)
    assert one.reason == (
        "nobody may not handle the kernel's page faults; /dev/userfaultfd exists, but nobody may not open it"
    )
    assert one.remedy.splitlines() == [
        """echo 'KERNEL=="userfaultfd", MODE="0666"' | sudo tee /etc/udev/rules.d/60-userfaultfd.rules""",
        "sudo udevadm control --reload && sudo udevadm trigger --name-match=userfaultfd",
        "# or, until the next boot:",
        "sudo chmod 0666 /dev/userfaultfd",
        "# or, for every program on the machine:",
        "sudo sysctl -w vm.unprivileged_userfaultfd=1",
    ]


def test_no_device_on_a_plain_host() -> None:
    one = only("barrier move", **(PLAIN | {"move": "ENOENT", "uffd_device": "ENOENT"}))
    assert "there is no /dev/userfaultfd" in one.reason
    assert one.remedy.startswith("sudo mknod -m 0666 /dev/userfaultfd c 10 ")
    assert "sysctl" in one.remedy


def test_a_service_without_devices() -> None:
    one = only("barrier move", **(PLAIN | {"move": "EPERM", "uffd_device": "EPERM"}))
    assert "[Service]\nDeviceAllow=/dev/userfaultfd rw" in one.remedy


@pytest.mark.parametrize(
    ("container", "tool"), [("docker", "docker"), ("podman", "podman"), ("lxc", "docker")]
)
@pytest.mark.parametrize("device", ["ENOENT", "EPERM"])
def test_a_container_without_the_device(container: str, tool: str, device: str) -> None:
    changes = PLAIN | {"container": container, "move": device, "uffd_device": device}
    one = only("barrier move", **changes)
    assert one.remedy.splitlines()[0] == f"{tool} run --device /dev/userfaultfd …"
    assert "on the host" in one.remedy
    assert remedies.UDEV in one.remedy


def test_a_container_with_the_device() -> None:
    one = only("barrier move", **(PLAIN | {"container": "docker"}))
    assert one.remedy.splitlines()[0] == (
        "# on the host, then start the container again with --device /dev/userfaultfd:"
    )
    assert remedies.UDEV in one.remedy


def test_kubernetes() -> None:
    one = only(
        "barrier move", **(PLAIN | {"container": "kubernetes", "move": "ENOENT", "uffd_device": "ENOENT"})
    )
    lines = one.remedy.splitlines()
    assert "# in the DaemonSet of github.com/squat/generic-device-plugin, once a cluster:" in lines
    assert (
        '- \'{"name": "userfaultfd", "groups": [{"count": 100, "paths": [{"path": "/dev/userfaultfd"}]}]}\''
        in lines
    )
    assert "    squat.ai/userfaultfd: 1" in lines


@pytest.mark.parametrize(
    "changes",
    [
        {"can_ptrace": True},
        {"unprivileged_uffd": True},
        {"uffd_user": "EPERM"},
        {"uffd_call": "ENOSYS", "uffd_user": "ENOSYS", "move": "ENOENT"},
    ],
)
def test_a_filter(changes: dict[str, Any]) -> None:
    """Who would be allowed and is not is behind a filter: permissions would not help, the device does."""
    one = only("barrier move", **(PLAIN | {"container": "docker", "uffd_device": "ENOENT"} | changes))
    assert one.reason.startswith("a seccomp filter forbids userfaultfd(2), which does not concern the device")
    assert "--device /dev/userfaultfd" in one.remedy
    assert "sysctl" not in one.remedy


def test_the_kernel_is_too_old() -> None:
    for changes in ({"move": "EINVAL"}, PLAIN):
        one = only("barrier move", **(PLAIN | {"kernel": (6, 7)} | changes))
        assert one.reason == "Linux 6.7 has no UFFDIO_MOVE"
        assert one.remedy == "# a kernel of Linux 6.8 or later"


def test_the_kernel_was_built_without() -> None:
    without = {"move": "ENOSYS", "uffd_device": "ENOENT", "uffd_call": "ENOSYS", "uffd_user": "ENOSYS"}
    one = only("barrier move", **(PLAIN | without))
    assert "CONFIG_USERFAULTFD=y" in one.remedy
    one = only("barrier move", barrier="stop", move="EINVAL")
    assert one.reason == "this Linux 6.18 does not offer UFFDIO_MOVE"


def test_another_barrier_by_name() -> None:
    for barrier in ("stop", "segv"):
        assert only("barrier move", barrier=barrier).remedy == 'ksmalloc.Arena(barrier="auto")'


def test_why_one_asked_for_by_name_cannot_be_had() -> None:
    plain = dataclasses.replace(BEST, **PLAIN, stop="KSM_EDEVICES", stop_reason="io_uring: descriptor 7")
    assert remedies.against(plain, "move").endswith("but nobody may not open it")
    assert remedies.against(plain, "stop").endswith("io_uring: descriptor 7")
    assert remedies.against(plain, "segv") == "this process has the barrier stop in this domain"
    assert remedies.against(BEST, "stop") == "this process has the barrier move in this domain"
    assert "thread" in remedies.against(dataclasses.replace(BEST, segv="KSM_EMASKED"), "segv")


def test_an_error_that_nobody_thought_of() -> None:
    assert "EMFILE" in only("barrier move", **(PLAIN | {"move": "EMFILE"})).reason
    assert "EMFILE" in only("barrier move", **(PLAIN | {"uffd_device": "EMFILE"})).reason
    _, stop = missing(dataclasses.replace(BEST, **PLAIN, stop="ENOMEM"))
    assert "ENOMEM" in stop.reason
    assert "EIO" in only("tracking pagemap", tracking="digest", pagemap="EIO").reason
    assert "ENOSPC" in only("cow sigsegv", segv="ENOSPC").reason


# ---- stop --------------------------------------------------------------------------------------------------


def stop(error: str, reason: str = "", **changes: Any) -> Missing:
    found = missing(dataclasses.replace(BEST, **(PLAIN | {"stop": error, "stop_reason": reason} | changes)))
    assert [one.name for one in found] == ["barrier move", "barrier stop"]
    return found[1]


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("io_uring: descriptor 7", "UV_USE_IO_URING=0  # "),
        ("an AIO context", "io_destroy(context)"),
        ("VmPin: 16 kB", "# let go of the memory"),
        ("/dev/kvm: descriptor 9", "os.close(descriptor)"),
        ("AF_XDP: descriptor 9", "os.close(descriptor)"),
    ],
)
def test_devices(reason: str, remedy: str) -> None:
    one = stop("KSM_EDEVICES", reason)
    assert one.reason == f"something other than threads may write: {reason}"
    assert one.remedy.startswith(remedy)


def test_a_thread_that_does_not_stop() -> None:
    one = stop("KSM_EUNSTOPPABLE", "thread 4711 (worker) blocks the signal")
    assert one.reason == "a thread did not stop: thread 4711 (worker) blocks the signal"
    assert one.remedy == "signal.pthread_sigmask(signal.SIG_UNBLOCK, {58})  # in that thread"
    assert "ZeroMQ" in stop("KSM_EUNSTOPPABLE", "thread 4711 (ZMQbg/IO/0) blocks the signal").remedy
    assert "arena.freeze(a)" in stop("KSM_EUNSTOPPABLE", "thread 4711 (worker) sleeps in state D").remedy


def test_no_signal_and_no_proc() -> None:
    assert stop("EAGAIN", barrier="none").remedy.startswith("KSMALLOC_STOP_SIGNAL=SIGRTMIN+1 ")
    assert stop("ENOENT", barrier="none").remedy == "sudo mount -t proc proc /proc"


# ---- tracking ----------------------------------------------------------------------------------------------


def test_writes_are_not_tracked() -> None:
    worse: dict[str, Any] = {"tracking": "pagemap"}
    move, writes = missing(dataclasses.replace(BEST, **PLAIN | worse, writes="ENOTTY", kernel=(6, 6)))
    assert (move.name, writes.name) == ("barrier move", "tracking writes")
    assert "Linux 6.6 has no PAGEMAP_SCAN" in writes.reason
    assert "6.9" in writes.remedy
    assert "WP_ASYNC" in only("tracking writes", **worse, writes="EINVAL").reason
    one = only("tracking writes", **worse, writes="EPERM", uffd_user="EPERM", uffd_device="EACCES")
    assert "seccomp" in one.reason
    assert "udev" in one.remedy
    assert "EMFILE" in only("tracking writes", **worse, writes="EMFILE").reason


# ---- the others --------------------------------------------------------------------------------------------


def test_not_dumpable() -> None:
    one = only("tracking pagemap", tracking="digest", pagemap="EACCES", dumpable=False)
    assert "changed its user" in one.reason
    line, comment = one.remedy.splitlines()
    assert line.startswith("import ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)")
    assert "debugger" in comment
    assert "mount" in only("tracking pagemap", tracking="digest", pagemap="ENOENT").remedy


def test_the_handler() -> None:
    assert "faulthandler.enable()" in only("cow sigsegv", segv="KSM_EDISPLACED").remedy
    assert "SIG_UNBLOCK, {signal.SIGSEGV}" in only("cow sigsegv", segv="KSM_EMASKED").remedy


def test_mappings() -> None:
    one = only("mappings", why_not="KSM_EBUDGET")
    assert one.remedy.startswith("sudo sysctl -w vm.max_map_count=1048576")
    assert "=4000000 " in only("mappings", why_not="KSM_EBUDGET", max_map_count=1_000_000).remedy
    assert missing(dataclasses.replace(BEST, why_not="KSM_EBUDGET", max_map_count=None)) == ()


@pytest.mark.parametrize("why_not", ["KSM_ESTOPPED", "KSM_EUSER", "KSM_ELOST"])
def test_what_the_machine_has_nothing_to_do_with(why_not: str) -> None:
    assert only("merging", why_not=why_not).reason
