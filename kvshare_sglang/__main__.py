"""``python -m kvshare_sglang MODULE [ARGUMENT...]``: a module of SGLang's, with ``--kvshare``.

SGLang's benchmarks read their arguments before they load plug-ins, so that alone they do not know
the flag. Here the plug-ins come first.
"""

import runpy
import sys

USAGE = """usage: python -m kvshare_sglang MODULE [ARGUMENT...]

Runs a module of SGLang as python -m does, plug-ins loaded first, so that it knows --kvshare:
  python -m kvshare_sglang sglang.benchmark.offline_throughput --kvshare --model-path MODEL
Of a MODEL that was not measured (bench calibrate) nothing is reused without --kvshare-default auto.
Servers know it by themselves: python -m sglang.launch_server --kvshare, sglang serve --kvshare."""
# These run a model without SGLang's scheduler and cache: nothing is there to reuse from.
WITHOUT_CACHE = ("sglang.benchmark.one_batch", "sglang.bench_one_batch")


def main(argv: list[str]) -> None:
    """Run ``argv[0]`` with the rest as its arguments; exits with one line if it cannot reuse."""
    if not argv or argv[0].startswith("-"):
        sys.exit(USAGE)
    module = argv[0]
    if module in WITHOUT_CACHE:
        sys.exit(
            f"error: {module} runs a model without a scheduler and a cache, so nothing can be "
            "reused: call sglang.benchmark.one_batch_server, or sglang.bench_serving on a server"
        )
    from sglang.srt.plugins import load_plugins

    load_plugins()
    sys.argv = argv
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
