"""The entry point that SGLang loads in every process. Importing it costs nothing."""

import os
from typing import Any


def register() -> None:
    """Add the flags; in a process of a server that has --kvshare, put all hooks in place.

    SGLang logs and swallows what a plug-in raises. Nothing is lost by that: without the hooks the
    cache backend is not registered, and SGLang refuses to start for it.
    """
    from kvshare_sglang.runtime import launch

    launch.install_flags()
    if os.environ.get(launch.ENV) == str(os.getppid()):
        launch.install()


def server_args(**kwargs: Any) -> Any:
    """SGLang's ServerArgs, with ``kvshare=True`` and ``kvshare_*`` among its keywords.

    For ``Engine(server_args=...)`` and ``launch_server(...)``; the class itself takes no keywords
    but its own. Raises KVShareError for what is not served or cannot start.
    """
    from kvshare_sglang.runtime import launch

    launch.install_flags()
    return launch.engine_server_args(**kwargs)
