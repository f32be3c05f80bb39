"""Which addresses a redirect may lead to: nobody outside may have us call what only this network can reach."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.request import getproxies, proxy_bypass

import httpx

NAT64 = IPv6Network("64:ff9b::/96")  # an IPv4 address in the last 32 bits


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also the IPv4 one inside an IPv6 one."""
    ip = ip_address(address.partition("%")[0])
    embedded = _embedded(ip) if isinstance(ip, IPv6Address) else None
    return (ip.is_global and not ip.is_multicast) if embedded is None else is_public(str(embedded))


def leads_inside(url: httpx.URL) -> bool:
    """Whether the host of the address resolves to anything that is not public. One that cannot be resolved does not."""
    try:
        found = socket.getaddrinfo(url.host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return not all(is_public(str(address[0])) for *_, address in found)


def was_inside(response: httpx.Response) -> bool:
    """Whether the answer came from an address that is not public, whatever its name had resolved to before."""
    stream = response.extensions.get("network_stream")
    peer = None if stream is None else stream.get_extra_info("server_addr")
    return peer is not None and not is_public(str(peer[0]))


def is_proxied(url: httpx.URL) -> bool:
    """Whether a proxy resolves the name and opens the connection: then it has to refuse."""
    proxies = getproxies()
    return (url.scheme in proxies or "all" in proxies) and not proxy_bypass(url.host)


def _embedded(ip: IPv6Address) -> IPv4Address | None:
    if ip in NAT64:
        return IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour
