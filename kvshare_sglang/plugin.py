"""The entry point that SGLang loads in every process. Importing it costs nothing. Root layer."""

import os


def register() -> None:
    """Add the flags; in a process of a server that has --kvshare, put all seams in place.

    SGLang logs and swallows what a plug-in raises. Nothing is lost by that: without the seams the
    cache backend is not registered, and SGLang refuses to start for it.
    """
    from kvshare_sglang import args, hooks

    hooks.install_flags()
    if os.environ.get(args.ENV) == str(os.getppid()):
        hooks.install()
