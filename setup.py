"""Packaging of kvshare_sglang; tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="kvshare-sglang",
    version="0.1.0",
    description="Reuse of moved and edited cached text in stock SGLang",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["kvshare_sglang", "kvshare_sglang.*"]),
    package_data={
        "kvshare_sglang": ["py.typed", "calibrations/*.json"],
        "kvshare_sglang.bench.models": ["*.json"],
    },
    install_requires=[
        "numpy>=1.26,<3",
        "rapidfuzz>=3.9,<4",
        "xxhash>=3.4,<5",
    ],
    extras_require={
        # SGLang itself declares the whole CUDA stack, so on a CPU machine it is installed
        # with --no-deps: scripts/_env.sh and requirements/ hold that recipe.
        "cpu": [
            "torch>=2.11,<2.15",
            "transformers>=5.12,<6",
        ],
        "gpu": [
            "sglang>=0.5.17,<0.5.24",
            "flashinfer-python>=0.6.15,<0.8",
            "triton>=3.6,<4",
        ],
        # python -m kvshare_sglang.router, alone or beside SGLang, and its gateway
        "router": [
            "aiohttp>=3.10,<4",
            "blake3>=1.0,<2",
            "msgspec>=0.18,<1",
            "orjson>=3.10,<4",
            "prometheus-client>=0.20,<1",
            "pyzmq>=26,<28",
            "smg>=1.13,<1.14",
            "starlette>=0.40,<2",
            "transformers>=4.57,<6",
            "uvicorn>=0.30,<1",
            "yarl>=1.9,<2",
        ],
        # python -m kvshare_sglang.bench, beside one of the two above
        "bench": [
            "httpx>=0.27,<1",
            "matplotlib>=3.9,<4",
            "psutil>=5.9,<8",
            "simpy>=4.1,<5",
            "tqdm>=4.66,<5",
        ],
        "dev": [
            "hypothesis>=6.140,<7",
            "mypy>=1.18,<3",
            "pytest>=8.3,<10",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.14,<0.18",
        ],
    },
    entry_points={
        "sglang.srt.plugins": ["kvshare = kvshare_sglang.plugin:register"],
        "sglang.serve_backends": ["kvshare = kvshare_sglang.runtime.launch:serve_backend"],
    },
)
