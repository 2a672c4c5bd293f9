"""Where results that can be computed again are kept."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_dir


def cache_folder() -> Path:
    """The folder for cached results: the environment variable SNAC_CACHE, else snac-conditioning in the user's cache.

    The user's cache is $XDG_CACHE_HOME, else ~/.cache (Linux), ~/Library/Caches (macOS), or %LOCALAPPDATA% (Windows).
    """
    return Path(os.environ.get("SNAC_CACHE") or user_cache_dir("snac-conditioning", appauthor=False, opinion=False))
