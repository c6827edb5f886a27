"""How often one address may ask: a bucket for each, which drains by one with each request and fills with time.

Buckets(rate=2, burst=10).take("10.0.0.7")  ->  0.0, or the seconds until it may ask again
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import ip_address

from nanochameleon.web.limits import ADDRESSES


class Buckets:
    """Only the newest addresses are remembered, so a crowd costs no memory. A forgotten bucket is full again."""

    def __init__(self, rate: float, burst: float, most: int = ADDRESSES, clock: Callable[[], float] = time.monotonic):
        self.rate, self.burst, self.most, self.clock = rate, burst, most, clock
        self.levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address: (level, at this time)

    def level(self, address: str) -> float:
        level, at = self.levels.get(network(address), (self.burst, 0.0))
        return min(self.burst, level + self.rate * (self.clock() - at))

    def wait(self, address: str) -> float:
        """Return the seconds until the address may ask; 0 is now."""
        return max(0.0, (1 - self.level(address)) / self.rate)

    def take(self, address: str) -> float:
        """Take a request from the bucket, unless it is empty. Returns what `wait` said before."""
        seconds = self.wait(address)
        if not seconds:
            self.levels[network(address)] = self.level(address) - 1, self.clock()
            self.levels.move_to_end(network(address))
            if len(self.levels) > self.most:
                self.levels.popitem(last=False)
        return seconds


def network(address: str) -> str:
    """Return the address; of IPv6 the first 64 bits, since a single machine has all of the rest."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if ip.version == 4:
        return str(ip)
    return str(ip.ipv4_mapped or ip.exploded[:19])
