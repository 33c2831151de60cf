"""The secret that the ranks of one run share, and what they sign with it: the run's key-value store takes writes from
anyone who reaches its port."""

import hashlib
import hmac
import os

from megatron_embed.platform.launcher import run_name

SECRET_VARIABLE = "MEGATRON_EMBED_SECRET"
"""Set by the scripts of launch/, anew for each start; by hand the same on every rank. Without it nothing is signed."""
_SIGNATURE_LENGTH = 64


class Seal:
    """Signs words and checks them, for one start of one run: a word of another place, run or start is no word."""

    def __init__(self) -> None:
        self._secret = os.environ.get(SECRET_VARIABLE, "").encode("utf-8", "surrogateescape")
        self._run = run_name()

    @property
    def is_used(self) -> bool:
        """Whether there is a secret."""
        return bool(self._secret)

    def room(self, kind: str) -> str:
        """The prefix of this run's keys of a kind. With a secret nobody else can guess it."""
        return f"{kind}/{self._run}" + (f"/{self._sign(kind, 'room')}" if self._secret else "")

    def close(self, place: str, text: str) -> str:
        """The text as it goes into the store, under the key `place`."""
        return f"{self._sign(place, text)}{text}" if self._secret else text

    def open(self, place: str, raw: bytes) -> str | None:
        """The text that a rank of this run put there; null for anything else."""
        try:
            word = raw.decode("utf-8")
        except UnicodeDecodeError:
            return None
        if not self._secret:
            return word
        signature, text = word[:_SIGNATURE_LENGTH], word[_SIGNATURE_LENGTH:]
        expected = self._sign(place, text)
        return text if hmac.compare_digest(signature.encode("utf-8"), expected.encode("utf-8")) else None

    def _sign(self, place: str, text: str) -> str:
        return hmac.new(self._secret, "\0".join((self._run, place, text)).encode("utf-8", "surrogatepass"),
                        hashlib.sha256).hexdigest()
