"""Whether the Hugging Face hub can be reached, asked once and before anything waits for it. Loads no torch.

Its library tries again for a minute, for each file, and says so each time.
"""

import os
import re
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

import typer

REACH_SECONDS: Final = 4
"""What the hub may take to answer. With what a command loads before it asks, it says so within five seconds."""

_HUB_ID: Final = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


class UnreachableError(OSError):
    """The hub cannot be reached, and what is wanted of it is not in its cache."""


def is_hub_id(spec: str) -> bool:
    """Whether ``spec`` may be a repository of the hub, and is nothing in this folder."""
    return _HUB_ID.fullmatch(spec) is not None and not spec.endswith(".gguf") and not Path(spec).exists()


def look_for(spec: str) -> None:
    """See to it that nothing waits long for a hub that cannot be reached: its cache alone is then used, which is said.

    Call it before transformers is imported, which decides at its import whether to ask the hub.

    Raises:
        UnreachableError: the cache does not hold the repository ``spec``.
    """
    if not is_hub_id(spec) or _is_offline():
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    reason = why_unreachable(endpoint)
    if reason is None:
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(spec, "config.json"), str):
        raise UnreachableError(
            f"{spec!r} must be in the hub's cache on this machine, since {endpoint} cannot be reached ({reason}). "
            "Check the network and HF_ENDPOINT, or name a folder or a .gguf file."
        )
    typer.echo(f"{endpoint} cannot be reached ({reason}): taking {spec} from the hub's cache", err=True)


def _is_offline() -> bool:
    """Whether the hub's library will not ask it, by its own reading of the environment."""
    asked = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return asked.upper() in {"1", "ON", "YES", "TRUE"}


def why_unreachable(endpoint: str) -> str | None:
    """Why no answer comes from ``endpoint``, or None; any answer will do. Proxies are those of the environment."""
    found = [f"no answer in {REACH_SECONDS} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=REACH_SECONDS):
                found.clear()
        except urllib.error.HTTPError:  # it answers
            found.clear()
        except urllib.error.URLError as error:
            # Certificates of a company are known to the hub's library, and not here.
            if isinstance(error.reason, ssl.SSLError):
                found.clear()
            elif not isinstance(error.reason, TimeoutError):
                found[0] = str(getattr(error.reason, "strerror", None) or error.reason)
        except TimeoutError:
            pass
        except (OSError, ValueError) as error:
            found[0] = str(error)

    asking = threading.Thread(target=ask, daemon=True)  # a name that is not resolved heeds no timeout
    asking.start()
    asking.join(REACH_SECONDS)
    return found[0] if found else None
