"""Where servers that a person starts may listen: on this machine unless told otherwise, on a port that is free."""

import socket

import typer

from rlhf_core.errors import ResourceError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def warn_if_public(host: str) -> None:
    """Say so where pages without a password can be reached from elsewhere."""
    if host not in LOOPBACK:
        typer.echo(f"Warning: {host} can be reached from other machines, and there is no password.", err=True)


def require_free(host: str, port: int, command: str) -> None:
    """Try the address before a tool does, whose own message would be a traceback.

    Raises:
        ResourceError: something listens there already, or the host is not this machine's; names another port.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"Cannot listen on {host}:{port}: {error.strerror}. Choose another: `{command} --port {port + 1}`"
            ) from error
