"""The live page of pathways: it explains texts, and previews, applies and undoes corrections of concepts.

This package is a small server around explanation, correction and the log of edits. It needs the extra `app`.
"""

try:
    import starlette as _starlette  # noqa: F401
except ImportError:
    raise ImportError("the live page needs starlette: pip install 'sparsecbm-jax[app]'") from None

from sparsecbm_jax.app.security import Limits, is_loopback
from sparsecbm_jax.app.server import create_app
from sparsecbm_jax.app.session import Session

__all__ = ["Limits", "Session", "create_app", "is_loopback"]
