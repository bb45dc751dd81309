"""Checks that fsspec can open a URL, with a one-line remedy where it cannot."""

from __future__ import annotations

import fsspec
from fsspec.registry import known_implementations

from data_tools.io.errors import UserError


def require_backend(url: str) -> None:
    """Raises UserError if no installed package opens URLs of this protocol, or the protocol is unknown."""
    for part in url.split("::"):  # of a chain such as simplecache::s3://bucket/key
        protocol = part.split("://")[0]
        try:
            fsspec.get_filesystem_class(protocol)
        except ValueError:
            raise UserError(
                f"{url}: unknown protocol {protocol}://; fsspec knows s3://, gs://, hf://, https:// and others"
            ) from None
        except ImportError as error:
            package = (
                known_implementations[protocol]["class"].partition(".")[0]
                if protocol in known_implementations
                else "fsspec"
            )
            remedy = f": pip install {package}" if package != "fsspec" else ""
            raise UserError(f"{url}: the package for {protocol}:// is not installed ({error}){remedy}") from None
