"""Passwords, the key that signs sessions, and how often a wrong password may be tried."""

import hashlib
import hmac
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import select

from rlhf_core.errors import ConfigError, ResourceError
from rlhf_core.feedback.store import Annotator, Store

SHORTEST = 8  # characters of a password
LOCAL = "local"  # the one person of a laptop
COST = {"n": 2**14, "r": 8, "p": 1}  # 16 MB and some 50 ms a try


def hash_password(password: str, salt: bytes | None = None) -> str:
    """Salt and scrypt hash of a password, in hex."""
    salt = salt or secrets.token_bytes(16)
    return f"{salt.hex()}${hashlib.scrypt(password.encode(), salt=salt, **COST).hex()}"


def password_fits(password: str, password_hash: str | None) -> bool:
    """Whether it is the password. An unknown name takes as long, so that time tells no names."""
    salt = bytes.fromhex((password_hash or "00" * 16).partition("$")[0])
    return hmac.compare_digest(hash_password(password, salt), password_hash or "")


def fingerprint(annotator: Annotator) -> str:
    """What a session remembers of the password: with a new one, sessions under the old one end."""
    return hashlib.sha256((annotator.password_hash or LOCAL).encode()).hexdigest()[:16]


def add_user(store: Store, name: str, password: str, *, admin: bool, replace: bool = False) -> None:
    """Add a person who can log in, or give one a new password and role.

    Raises:
        ConfigError: the name is empty, long or taken, or the password is short.
    """
    name = name.strip()
    if not 0 < len(name) <= 80:
        raise ConfigError(f"Found a name of {len(name)} characters, expected 1 to 80.")
    if len(password) < SHORTEST:
        raise ConfigError(f"Found a password of {len(password)} characters, expected {SHORTEST} or more.")
    role = "admin" if admin else "annotator"
    with store.session() as session:
        known = session.scalar(select(Annotator).where(Annotator.name == name))
        if known and known.password_hash and not replace:
            raise ConfigError(f"{name} is there already. For a new password: `rlhf feedback add-user {name} --replace`")
        annotator = known or Annotator(name=name)
        annotator.role, annotator.password_hash = role, hash_password(password)
        session.add(annotator)


def local_admin(store: Store) -> int:
    """The id of the person who needs no login, made if missing."""
    with store.session() as session:
        known = session.scalar(select(Annotator).where(Annotator.name == LOCAL))
        if known is None:
            known = Annotator(name=LOCAL, role="admin", password_hash=None)
            session.add(known)
            session.flush()
        return known.id


def secret_key(path: Path) -> str:
    """The key that signs sessions, made at first use, readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        path.chmod(0o600)
        key = path.read_text(encoding="ascii")
        if len(key) < 64:  # an empty key would let anyone sign
            raise ResourceError(f"{path} holds no key. Remove it; all will have to log in again.") from None
        return key
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(key := secrets.token_hex(32))
    return key


class LoginLimit:
    """At most 5 wrong passwords for a name from one address, and 20 from one address, in five minutes."""

    SECONDS = 300
    BY_NAME, BY_ADDRESS = 5, 20

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._tries: list[tuple[float, str, str]] = []  # when, name, address, of those not known to be right
        self._one_at_a_time = threading.Lock()

    def admits(self, name: str, address: str) -> bool:
        """Whether a password may be tried. It counts as wrong until `right` is told: checking takes long, and of many
        tries at once no more are checked than of many in a row.
        """
        name, now = name[:80], self.clock()
        with self._one_at_a_time:
            self._tries = [one for one in self._tries if one[0] > now - self.SECONDS]
            names = [known for _, known, origin in self._tries if origin == address]
            if len(names) >= self.BY_ADDRESS or names.count(name) >= self.BY_NAME:
                return False
            self._tries.append((now, name, address))
            return True

    def right(self, name: str, address: str) -> None:
        """Take back the last try of that name: its password was right."""
        with self._one_at_a_time:
            last = next((one for one in reversed(self._tries) if one[1:] == (name[:80], address)), None)
            if last:
                self._tries.remove(last)
