# SPDX-License-Identifier: MIT
"""ksmctl clean"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import signal
import stat

from ksmalloc import domain, shm
from ksmalloc.ctl.options import add_domain
from ksmalloc.ctl.sizes import human

HELP = "remove what dead domains left behind"
USAGE = "clean [--domain NAME] [--path DIR] [--dry-run]"
DESCRIPTION = """\
Remove the rendezvous of every domain in which nobody lives, settings included, and every memory object of
backing "shm" that no process has open or mapped. Living domains are left alone."""

SHM = "/dev/shm"
DOMAIN_FILE = "domain"
MAGIC = b"ksmalloc"  # what it begins with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_domain(parser, default=None, what="clean this domain's rendezvous only (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed, remove nothing")


def run(args: argparse.Namespace) -> int:
    root = args.path or os.path.join(SHM, f"ksmalloc-{os.getuid()}")
    verb = "would remove" if args.dry_run else "removed"
    removed = freed = failures = 0
    for name in rendezvous(root) if args.domain is None else [args.domain]:
        nbytes = occupied(os.path.join(root, name))
        try:
            found = clean_domain(name, args.path, args.dry_run)
        except (OSError, ValueError) as error:
            print(f"domain {name}: {error}")
            failures += 1
            continue
        if not found:
            print(f"domain {name}: in use, left alone")
            continue
        print(f"{verb} domain {name} ({human(nbytes)})")
        removed, freed = removed + 1, freed + nbytes
    for path in map(SHM.__add__, shm.objects()):
        try:
            size = clean_object(path, args.dry_run)
        except OSError as error:
            print(f"{path}: {error}")
            failures += 1
            continue
        if size is None:
            print(f"{path}: in use, left alone")
            continue
        print(f"{verb} {path} ({human(size)})")
        removed, freed = removed + 1, freed + size
    print(f"{verb} {removed} in all, {human(freed)}" if removed else "nothing to remove")
    return 1 if failures else 0


def rendezvous(root: str) -> list[str]:
    """The names of our rendezvous directories under `root`; anything else there is nobody's business here."""
    try:
        with os.scandir(root) as entries:
            found = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    mine = [entry for entry in found if entry.stat(follow_symlinks=False).st_uid == os.getuid()]
    return sorted(entry.name for entry in mine if is_rendezvous(entry.path))


def is_rendezvous(directory: str) -> bool:
    """Whether it holds a domain file, perhaps sockets of peers, and nothing else."""
    names = set(os.listdir(directory))
    if (
        any(name != DOMAIN_FILE and not name.startswith("peer-") for name in names)
        or DOMAIN_FILE not in names
    ):
        return False
    with open(os.open(os.path.join(directory, DOMAIN_FILE), os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read(len(MAGIC)) in (MAGIC, bytes(len(MAGIC)))  # zeros: settings, and never a domain yet


def occupied(directory: str) -> int:
    """Bytes that the files in a directory occupy."""
    try:
        with os.scandir(directory) as entries:
            return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return 0


def clean_domain(name: str, path: str | None, dry_run: bool) -> bool:
    """Remove the rendezvous of a domain; False: somebody lives there."""
    if dry_run:
        return domain.read_settings(name, path)[1] == 0
    try:
        domain.clean(name, path)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def clean_object(path: str, dry_run: bool) -> int | None:
    """Remove a memory object, returns the bytes it occupied; None: somebody has it open or mapped.

    The kernel grants a write lease only on a file that nobody else has open, and a mapping keeps a file open.
    So this is exact whatever namespaces its users live in, and holds until the object is gone.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    before = signal.signal(
        signal.SIGIO, signal.SIG_IGN
    )  # tells a lease's holder that somebody wants the file
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a memory object", path)
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except BlockingIOError:
            return None
        if not dry_run:
            os.unlink(path)
        return status.st_blocks * 512
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)
