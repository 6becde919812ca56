"""The rule by which a kernel's result is right; it stands in tools, where the check of whole pieces uses it as well."""

from __future__ import annotations

from terrazzo.tools.oracle import check

__all__ = ["check"]
