"""The entry point that SGLang loads in every process. Importing it costs nothing."""

import os


def register() -> None:
    """Add the flags; in a process of a server that has --kvshare, put all hooks in place.

    SGLang logs and swallows what a plug-in raises. Nothing is lost by that: without the hooks the
    cache backend is not registered, and SGLang refuses to start for it.
    """
    from kvshare_sglang.runtime import launch

    launch.install_flags()
    if os.environ.get(launch.ENV) == str(os.getppid()):
        launch.install()
