"""A slow network on one machine: network namespaces joined by a line that delays packets and limits bandwidth, where `tc netem` is missing.

Each namespace has one TUN device, a point of a star: what it sends leaves at `bandwidth` bytes a second, one packet behind the other, and
arrives `delay` seconds later. Nothing is lost, and queues have no end. Needs Linux, root, `ip` of iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

DEVICE = "zo-line"
"""What the device is called in every namespace."""
MTU = 9000
_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
_WINDOWS = "4096 131072 67108864"
"""Of TCP, wide enough to fill 1 Gbit/s over 100 ms there and back."""


def unavailable() -> str | None:
    """Why there can be no such line here; None where there can."""
    if shutil.which("ip") is None:
        return "ip (iproute2) is not installed"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun can't be opened; it takes Linux and root"
    tried = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else None


def ip(*words: str) -> None:
    """`ip words`; CalledProcessError where it fails."""
    subprocess.run(["ip", *words], check=True)


class DelayLine(threading.Thread):
    """Namespaces while the context lasts; `delay` and `bandwidth` may change at any time, for packets that are sent later.

    Args:
        points: how many namespaces.
    """

    def __init__(self, points: int) -> None:
        super().__init__(daemon=True)
        self.delay, self.bandwidth = 0.0, float("inf")
        self.namespaces = [f"{DEVICE}-{os.getpid()}-{point}" for point in range(points)]
        self.bytes = [0] * points
        """Sent by each point so far, headers of IP and TCP included."""
        self._devices: list[int] = []
        self._over = threading.Event()

    def command(self, point: int, words: Sequence[str]) -> list[str]:
        """The command line that runs `words` in a namespace."""
        return ["ip", "netns", "exec", self.namespaces[point], *words]

    def __enter__(self) -> DelayLine:
        try:
            for point, name in enumerate(self.namespaces):
                self._make(point, name)
        except BaseException:
            self._remove()
            raise
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self.join()
        self._remove()

    def _make(self, point: int, name: str) -> None:
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._devices.append(device)
        outside = f"zo{os.getpid()}.{point}"[-15:]
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", outside.encode(), _TUN_WITHOUT_HEADER))
        ip("netns", "add", name)
        ip("link", "set", outside, "netns", name, "name", DEVICE, "mtu", str(MTU), "txqueuelen", "10000")
        ip("-n", name, "addr", "add", f"10.77.0.{point + 1}/24", "dev", DEVICE)
        ip("-n", name, "link", "set", DEVICE, "up")
        ip("-n", name, "link", "set", "lo", "up")
        for key in ("tcp_rmem", "tcp_wmem"):
            subprocess.run(self.command(point, ["sh", "-c", f"echo {_WINDOWS} > /proc/sys/net/ipv4/{key}"]), check=True)

    def _remove(self) -> None:
        for device in self._devices:
            os.close(device)
        for name in self.namespaces:
            if Path("/run/netns", name).exists():
                ip("netns", "del", name)

    def run(self) -> None:
        """Packets from all devices, each to the device of its address when it is due."""
        underway: list[tuple[float, int, int, bytes]] = []  # due, order, to, packet
        free = [0.0] * len(self._devices)  # when the last packet of a point has left it
        points = {device: point for point, device in enumerate(self._devices)}
        order = 0
        while not self._over.is_set():
            patience = max(0.0, underway[0][0] - time.monotonic()) if underway else 0.1
            for device in select.select(self._devices, [], [], min(0.1, patience))[0]:
                point = points[device]
                for packet in _waiting(device):
                    to = packet[19] - 1 if packet[0] >> 4 == 4 and packet[16:19] == b"\x0a\x4d\x00" else -1
                    if not 0 <= to < len(self._devices):
                        continue  # IPv6 looks for neighbours
                    free[point] = max(free[point], time.monotonic()) + len(packet) / self.bandwidth
                    self.bytes[point] += len(packet)
                    heapq.heappush(underway, (free[point] + self.delay, order, to, packet))
                    order += 1
            now = time.monotonic()
            while underway and underway[0][0] <= now:
                _, _, to, packet = heapq.heappop(underway)
                os.write(self._devices[to], packet)


def _waiting(device: int, most: int = 16) -> list[bytes]:
    """Packets that a device has, some at most, so that others have their turn."""
    packets: list[Any] = []
    try:
        while len(packets) < most:
            packets.append(os.read(device, 65536))
    except BlockingIOError:
        pass
    return packets
