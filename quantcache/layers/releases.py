"""Which releases of torch and of transformers the tests run with. Loads neither."""

from importlib import metadata
from typing import Final, NamedTuple

from packaging.version import Version


class Releases(NamedTuple):
    """The releases of a package that the tests run with.

    Attributes:
        oldest: which the package's own requirements allow, and no older one.
        newest: newer ones are allowed too, and may have changed what is relied on.
    """

    oldest: str
    newest: str


TESTED: Final = {"torch": Releases("2.11.0", "2.14.1"), "transformers": Releases("5.17.0", "5.24.0")}


def untested() -> list[str]:
    """A sentence for each package whose release here is outside of ``TESTED``."""
    sentences = []
    for name, (oldest, newest) in TESTED.items():
        version = metadata.version(name)
        release = Version(version).release
        if release > Version(newest).release:
            sentences.append(f"{name} {version} is untested: it is newer than {newest}, the newest that was tested.")
        elif release < Version(oldest).release:
            sentences.append(f"{name} {version} is not supported: it is older than {oldest}, the oldest that is.")
    return sentences
