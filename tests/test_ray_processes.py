"""Ray's processes of a sweep: they listen on loopback, and none outlives the sweep."""

import ipaddress
import os
import struct
import sys
import time
from pathlib import Path

import pytest

from tests.test_sweep import (  # noqa: F401
    _start,
    _wait_for,
    store,
)

pytestmark = [
    pytest.mark.optional("ray"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
LISTENS = "0A"


def session_of(pid):
    """The session of a process, and whether it still runs; (None, False) where it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None, False
    state, _, _, session, *_ = stat.rpartition(")")[2].split()
    return int(session), state not in "ZX"


def head_of(sweep):
    """The process that holds the Ray of a sweep; None: it has none yet."""
    for child in Path(f"/proc/{sweep}/task/{sweep}/children").read_text().split():
        if "experiments.ray_head" in Path(f"/proc/{child}/cmdline").read_text():
            return int(child)
    return None


def ray_processes(head):
    """The running processes of the session that a head began: Ray's, and not the cells'."""
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    return [pid for pid in pids if session_of(pid) == (head, True)]


def listeners(pids):
    """The addresses that processes listen on."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(link))
            except FileNotFoundError:
                pass
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENS and f"socket:[{words[9]}]" in inodes:
                # Words of four bytes in the order of the machine.
                digits = words[1].split(":")[0]
                size = len(digits) // 8
                raw = struct.pack(
                    f"={size}I", *struct.unpack(f">{size}I", bytes.fromhex(digits))
                )
                address = ipaddress.ip_address(raw)
                found.append(getattr(address, "ipv4_mapped", None) or address)
    return found


def is_gone_within(head, seconds):
    end = time.monotonic() + seconds
    while left := ray_processes(head):
        if time.monotonic() > end:
            return [Path(f"/proc/{pid}/cmdline").read_text()[:80] for pid in left]
        time.sleep(0.2)
    return []


def test_ray_listens_on_loopback_alone_and_ends_with_a_killed_sweep(store):  # noqa: F811
    file = store(seeds=[0], settings={"pause": 0.1, "online_iterations": 5000})
    process = _start(file, "--workers", 2)
    try:
        begun = "runs/*/*/*/checkpoint.pt"
        _wait_for(lambda: list(Path(".").glob(begun)), process)
        head = head_of(process.pid)
        pids = ray_processes(head)
        assert len(pids) > 5, "Ray's own processes and its workers"
        addresses = listeners([process.pid, *pids])
        assert len(addresses) > 3
        assert all(address.is_loopback for address in addresses), addresses
    finally:
        process.kill()
        process.communicate()
    assert is_gone_within(head, 30) == []


def test_ray_ends_with_a_sweep_that_is_killed_while_it_starts(store):  # noqa: F811
    process = _start(store(seeds=[0]), "--workers", 1)
    try:
        _wait_for(lambda: head_of(process.pid), process)
        head = head_of(process.pid)
        # Itself, and at least the first of Ray's.
        _wait_for(lambda: len(ray_processes(head)) > 2, process)
    finally:
        process.kill()
        process.communicate()
    assert is_gone_within(head, 30) == []


def test_ray_ends_with_a_sweep_that_ends_well(store):  # noqa: F811
    process = _start(store(seeds=[0], settings={"pause": 0.02}), "--workers", 1)
    _wait_for(lambda: head_of(process.pid), process)
    head = head_of(process.pid)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert is_gone_within(head, 30) == []
