# SPDX-License-Identifier: MIT
"""What can be found out about a machine from its texts and files."""

from __future__ import annotations

import os

import pytest

from ksmalloc import facts


@pytest.mark.parametrize(
    ("environ", "files", "cgroups", "container"),
    [
        ({}, [], "0::/user.slice", None),
        ({}, ["/.dockerenv"], "", "docker"),
        ({}, [], "9:memory:/docker/1234", "docker"),
        ({}, [], "0::/system.slice/docker-1234.scope", "docker"),
        ({}, ["/run/.containerenv"], "", "podman"),
        ({"container": "podman"}, [], "", "podman"),
        ({}, [], "0::/machine.slice/libpod-1234.scope", "podman"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ["/.dockerenv"], "", "kubernetes"),
        ({}, [], "0::/kubepods/burstable/pod1", "kubernetes"),
        ({"container": "systemd-nspawn"}, [], "", "systemd-nspawn"),
        ({"container": ""}, [], "", None),
    ],
)
def test_containers(environ: dict[str, str], files: list[str], cgroups: str, container: str | None) -> None:
    assert facts.container_of(environ, files.__contains__, cgroups) == container


def test_kernels_and_capabilities() -> None:
    assert facts.kernel_of("6.8.0-45-generic") == (6, 8)
    assert facts.kernel_of("5.10-rc1") == (5, 10)
    assert facts.kernel_of("unknown") == (0, 0)
    assert facts.has_capability("Name:\tx\nCapEff:\t0000000000080000\n", 19)
    assert not facts.has_capability("CapEff:\t0000000000040000\n", 19)
    assert not facts.has_capability("", 19)


def test_this_machine() -> None:
    assert facts.kernel_of(os.uname().release) > (5, 0)
    assert facts.user()
