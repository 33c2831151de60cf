"""Signatures on what the ranks of one run write into its key-value store, which accepts writes from anyone who reaches
its port."""

import hashlib
import hmac
import os

from megatron_embed.platform.launcher import run_name

SECRET_VARIABLE = "MEGATRON_EMBED_SECRET"
"""Set by the scripts of launch/ to a new secret at each start; by hand to the same on every rank. Without it nothing is
signed."""
_SIGNATURE_LENGTH = 64


class Signer:
    """Signs and verifies texts for one start of one run: the signature of another key, run or start is invalid."""

    def __init__(self) -> None:
        self._secret = os.environ.get(SECRET_VARIABLE, "").encode("utf-8", "surrogateescape")
        self._run = run_name()

    @property
    def has_secret(self) -> bool:
        """Whether there is a secret; without one texts are neither signed nor verified."""
        return bool(self._secret)

    def key_prefix(self, kind: str) -> str:
        """The prefix of this run's keys of a kind; with a secret nobody else can guess it."""
        return f"{kind}/{self._run}" + (f"/{self._signature(kind, 'prefix')}" if self._secret else "")

    def sign(self, key: str, text: str) -> str:
        """The text as it is stored under the key."""
        return f"{self._signature(key, text)}{text}" if self._secret else text

    def verify(self, key: str, raw: bytes) -> str | None:
        """The text that a rank of this run stored under the key; None if no such rank signed it."""
        try:
            signed = raw.decode("utf-8")
        except UnicodeDecodeError:
            return None
        if not self._secret:
            return signed
        signature, text = signed[:_SIGNATURE_LENGTH], signed[_SIGNATURE_LENGTH:]
        expected = self._signature(key, text)
        return text if hmac.compare_digest(signature.encode("utf-8"), expected.encode("utf-8")) else None

    def _signature(self, key: str, text: str) -> str:
        return hmac.new(self._secret, "\0".join((self._run, key, text)).encode("utf-8", "surrogatepass"),
                        hashlib.sha256).hexdigest()
