"""The releases of transformers whose continuous batching is known here."""

from typing import Final

import transformers
from packaging.version import Version

from quantcache.layers.releases import Releases

KNOWN: Final = Releases("5.21", "5.24")
"""Their patch releases are included. 5.17 and 5.18 have another architecture; 5.24 has models call the cache."""


def check_version() -> None:
    """Refuse a transformers whose continuous batching is not known.

    Raises:
        NotImplementedError: it is older or newer than ``KNOWN``.
    """
    release = Version(str(transformers.__version__)).release[:2]
    if not Version(KNOWN.oldest).release <= release <= Version(KNOWN.newest).release:
        raise NotImplementedError(
            f"serving: transformers must be {KNOWN.oldest} to {KNOWN.newest}, whose continuous batching is known here, "
            f"got {transformers.__version__}."
        )
