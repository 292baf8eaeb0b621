"""Requests to this machine go straight to it: a proxy could not reach its loopback, and would read
the key."""

from __future__ import annotations

from ipaddress import ip_address

import httpx


def is_own_address(host: str) -> bool:
    """Whether a client that asks for `host`, a name or an address without brackets, never leaves
    this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def own_transport(url: str) -> httpx.HTTPTransport | None:
    """A transport that knows of no proxy if `url` leads to this machine; otherwise None, for
    httpx's own choice by `http_proxy` and the like. Raises httpx.InvalidURL."""
    return httpx.HTTPTransport() if is_own_address(httpx.URL(url).host) else None
