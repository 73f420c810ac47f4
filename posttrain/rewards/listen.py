"""Where a server listens. Bound before the model is loaded: an address that is taken is found out at once.

Nobody is answered at a socket that is only bound.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from posttrain.errors import RecipeError


def bind_port(host: str, port: int) -> socket.socket:
    """A socket at an address, where nobody is answered yet.

    Raises:
        RecipeError: the address is taken or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise RecipeError(
            f"posttrain rewards serve: {host} port {port} cannot be used: {error.strerror}."
        ) from error
    return listener


def bind_socket(path: Path) -> socket.socket:
    """The same at a path, for this user alone; a socket that nobody answers at is replaced.

    Raises:
        RecipeError: somebody does, or the path cannot be used.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            if path.is_socket() and probe.connect_ex(str(path)) == 0:
                raise RecipeError(f"posttrain rewards serve: another server answers at {path}.")
        if path.is_socket():
            path.unlink()
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
    except OSError as error:
        listener.close()
        raise RecipeError(
            f"posttrain rewards serve: {path} cannot be used: {error.strerror or error}."
        ) from error
    return listener
