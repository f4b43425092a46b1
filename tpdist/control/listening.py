"""A TCP socket that listens before anybody is told of its port, so that the port cannot be lost meanwhile."""

import socket

BACKLOG = 1024


def listening_socket(host: str, port: int = 0) -> socket.socket:
    """Listen on an address of this machine, on a port that the kernel picks unless one is asked for. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
