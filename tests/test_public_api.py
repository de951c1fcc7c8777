"""Is ``__all__`` exact, and the import free of side effects?"""

import subprocess
import sys
import textwrap

import pytest

import quantcache


def run(code: str) -> str:
    """Run ``code`` in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:quantcache", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names_are_these() -> None:
    assert quantcache.__all__ == [
        "CacheFileError",
        "FallbackError",
        "FallbackWarning",
        "Int8Tensor",
        "QuantizedInt8Cache",
        "__version__",
    ]
    assert dir(quantcache) == sorted(quantcache.__all__)
    for name in quantcache.__all__:
        assert getattr(quantcache, name) is not None


def test_every_public_name_is_documented() -> None:
    for name in quantcache.__all__:
        value = getattr(quantcache, name)
        if isinstance(value, type):
            assert value.__doc__
            for attribute, member in vars(value).items():
                if not attribute.startswith("_") and callable(member):
                    assert member.__doc__, f"{name}.{attribute}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'quantcache' has no attribute 'Int4Cache'"):
        quantcache.Int4Cache  # noqa: B018


def test_importing_patches_nothing_and_prints_nothing() -> None:
    printed = run(
        """
        import torch, transformers
        from transformers.modeling_utils import AttentionInterface
        before = dict(AttentionInterface._global_mapping)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        import quantcache
        from quantcache import QuantizedInt8Cache, Int8Tensor
        assert dict(AttentionInterface._global_mapping) == before
        assert torch.nn.functional.scaled_dot_product_attention is sdpa
        QuantizedInt8Cache()
        assert dict(AttentionInterface._global_mapping) != before
        quantcache.layers.routing.uninstall()
        assert dict(AttentionInterface._global_mapping) == before
        """
    )
    assert printed == ""


def test_importing_loads_nothing_but_the_package() -> None:
    """The promise of an import that costs nothing, without a clock: no room is loaded until a name is used."""
    printed = run(
        """
        import sys
        import torch, transformers
        before = set(sys.modules)
        import quantcache
        print(sorted(name for name in set(sys.modules) - before))
        """
    )
    assert printed.strip() == "['quantcache']"
