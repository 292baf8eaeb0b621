"""Where servers listen: ports that exist, that differ, and that nobody else has."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from ipaddress import ip_address
from random import SystemRandom

from gradmap.common.errors import UserError

HIGHEST_PORT = 65535
# Outside of what systems give to outgoing connections (Linux begins at 32768, others at 49152).
CHOSEN_PORTS = range(20000, 30000)


def require_ports(ports: Mapping[str, int]) -> None:
    """Raises UserError if a port does not exist, or if two are the same. ports: by what they are
    for."""
    known: dict[int, str] = {}
    for purpose, port in ports.items():
        if not 1 <= port <= HIGHEST_PORT:
            raise UserError(
                f"{purpose} is {port}, and ports go from 1 to {HIGHEST_PORT}; choose another."
            )
        if port in known:
            raise UserError(
                f"{known[port]} and {purpose} are both {port}; give each a port of its own."
            )
        known[port] = purpose


def bind(host: str, port: int, option: str) -> socket.socket:
    """A socket with this address. Raises UserError if something listens there, or if it is no
    address of this machine; option: the one that chooses the port."""
    if not host:
        raise UserError("The host is empty; name an address to listen on, such as 127.0.0.1.")
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, UnicodeError) as error:  # the latter: a name that cannot be one
        bound.close()
        reason = error.strerror if isinstance(error, OSError) else "no valid name"
        raise UserError(
            f"Cannot listen on {url_host(host)}:{port} ({reason}); "
            f"stop what uses the port or choose another with {option}."
        ) from None
    return bound


def require_free_port(host: str, port: int, option: str) -> None:
    """Raises UserError as `bind` does."""
    bind(host, port, option).close()


def free_port(in_a_row: int = 1) -> int:
    """Returns the first of so many successive loopback ports that nothing uses now.

    None of them can become the local end of an outgoing connection before its server starts.
    """
    for first in SystemRandom().sample(CHOSEN_PORTS, len(CHOSEN_PORTS)):
        if all(_is_free(port) for port in range(first, first + in_a_row)):
            return first
    raise UserError(
        f"No loopback port from {CHOSEN_PORTS.start} to {CHOSEN_PORTS.stop - 1} is free; stop what "
        "uses them."
    )


def _is_free(port: int) -> bool:
    try:
        require_free_port("127.0.0.1", port, "--port")
    except UserError:
        return False
    return True


def url_host(host: str) -> str:
    """The host as URLs write it: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def reachable_host(host: str) -> str:
    """The address at which this machine reaches who listens on `host`: loopback where that is all
    addresses."""
    try:
        address = ip_address(host)
    except ValueError:
        return host  # a name
    if not address.is_unspecified:
        return str(address)
    return "127.0.0.1" if address.version == 4 else "::1"
