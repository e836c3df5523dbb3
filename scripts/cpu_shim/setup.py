"""Stand-ins that let stock SGLang run beside a torch without CUDA. Never for a GPU machine."""

import subprocess
from contextlib import suppress
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

with suppress(FileNotFoundError):  # no nvidia-smi: no GPU, as scripts/_env.sh sees it too
    if b"GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout:
        raise SystemExit("kvshare-cpu-shim would hide sgl_kernel; it is not for GPU machines")


class BuildWithPth(build_py):
    """Add the .pth line that loads the import hook in every process of the environment."""

    def run(self) -> None:
        super().run()
        Path(self.build_lib, "kvshare_cpu_shim.pth").write_text("import kvshare_cpu_shim\n")


setup(
    name="kvshare-cpu-shim",
    version="0.1.0",
    description="Lets stock SGLang run where torch has no CUDA (tests and demo only)",
    license="Apache-2.0",
    python_requires=">=3.11",
    py_modules=["kvshare_cpu_shim", "sgl_kernel"],
    cmdclass={"build_py": BuildWithPth},
)
