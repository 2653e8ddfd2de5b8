"""Passwords, the key that signs sessions, and how often a wrong password may be tried."""

import hashlib
import hmac
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
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
    """In five minutes at most 5 wrong passwords for a name from one address, 20 from one address, 100 for a name."""

    SECONDS = 300
    BY_BOTH, BY_ADDRESS, BY_NAME = 5, 20, 100

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._wrong: list[tuple[float, str, str]] = []  # when, name, address
        self._checked: list[tuple[str, str]] = []  # name and address of those that are being checked
        self._changed = threading.Condition()

    def fits(self, name: str, address: str, check: Callable[[], bool]) -> bool | None:
        """What `check` says of a password; None, and it is not called, where too many wrong ones came before.

        Checking takes long. Of many tries at once no more are checked than of many in a row: a try waits for those
        before it wherever they, all wrong, would leave it none.
        """
        one = (name[:80], address)
        with self._changed:
            while not self._left(*one, self._checked):
                if not self._left(*one, []):
                    return None
                self._changed.wait()
            self._checked.append(one)
        right = False
        try:
            right = check()
        finally:
            with self._changed:
                self._checked.remove(one)
                if not right:
                    self._wrong.append((self.clock(), *one))
                self._changed.notify_all()
        return right

    def _left(self, name: str, address: str, checked: Sequence[tuple[str, str]]) -> bool:
        """Whether one more may be wrong, if those that are being checked are."""
        since = self.clock() - self.SECONDS
        self._wrong = [one for one in self._wrong if one[0] > since]
        tries = [one[1:] for one in self._wrong] + list(checked)
        return (
            tries.count((name, address)) < self.BY_BOTH
            and sum(origin == address for _, origin in tries) < self.BY_ADDRESS
            and sum(known == name for known, _ in tries) < self.BY_NAME
        )
