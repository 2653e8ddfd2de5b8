"""Where servers that a person starts may listen: on this machine unless told otherwise, on a port that is free."""

import socket

import typer

from rlhf_core.errors import ResourceError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def warn_if_public(host: str) -> None:
    """Say so where pages without a password can be reached from elsewhere."""
    if host not in LOOPBACK:
        typer.echo(f"Warning: {host} can be reached from other machines, and there is no password.", err=True)


def require_free(host: str, port: int, command: str, *, option: str = "--port") -> None:
    """Try the address before a tool does, whose own message would be a traceback.

    Raises:
        ResourceError: something listens there already, or the host is not this machine's; names another port.
    """
    try:
        # All addresses of the name, as servers do: localhost has two where there is IPv6.
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:  # that of IPv4 may be another's
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        raise ResourceError(
            f"Cannot listen on {in_address(host)}:{port}: {error.strerror}. "
            f"Choose another: `{command} {option} {port + 1}`"
        ) from error


def in_address(host: str) -> str:
    """The host as it stands before a port."""
    return f"[{host}]" if ":" in host else host
