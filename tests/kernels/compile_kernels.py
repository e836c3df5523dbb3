"""Compile the kernels for GPUs that are not here, and say what the compiler made of them, as JSON.

A program of its own: in a process with Triton's interpreter nothing can be compiled.
"""

import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvshare_sglang.kernels.gpu import copy, mass, profile, rows

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
# An 8B model: 32 heads on 8 of 128. Strides and addresses are multiples of 16.
ATTEND = dict.fromkeys(("q", "k_buf", "v_buf"), "*bf16") | {
    **dict.fromkeys(("parts", "lse"), "*fp32"),
    **dict.fromkeys(("positions", "owners"), "*i64"),
    **dict.fromkeys(("tiles", "page_table"), "*i32"),
    **dict.fromkeys(("scale", "v_scale"), "fp32"),
    **dict.fromkeys(("offset", "num_rows", "num_tiles"), "i32"),
    **dict.fromkeys(("table_stride", "q_stride", "k_stride", "v_stride"), "i32"),
}
GIVEN = {
    name: kind for name, kind in ATTEND.items() if name not in ("v_buf", "v_scale", "v_stride")
}
GIVEN |= {"edges": "*i32"}
COPY = dict.fromkeys(("k_table", "v_table"), "*u64") | {
    **dict.fromkeys(("k_like", "v_like"), "*bf16"),
    **dict.fromkeys(("src", "dst", "old", "new"), "*i64"),
    "angles": "*fp32",
    **dict.fromkeys(("n", "first_layer", "num_layers"), "i32"),
    **dict.fromkeys(("k_stride", "v_stride", "angle_stride"), "i32"),
}
COPY_SHAPE = {
    "HEADS": 8, "HEADS_P2": 8, "K_DIM": 128, "V_ROW": 1024, "V_ROW_P2": 1024, "HALF": 64,
    "REST": 0, "NEOX": True, "LARGEST": 0.0, "ROWS": copy.ROWS, "LAYERS": copy.LAYERS,
}  # fmt: skip
MASS = dict.fromkeys(("q", "keys"), "*bf16") | {
    "positions": "*i64",
    **dict.fromkeys(("lse", "mass"), "*fp32"),
    **dict.fromkeys(("num_rows", "kv", "each", "q_stride", "k_stride"), "i32"),
    **dict.fromkeys(("share", "scale"), "fp32"),
}
PARTS = dict.fromkeys(("parts", "lse"), "*fp32")
MERGE = {**PARTS, "out": "*bf16", "num_rows": "i32", "splits": "i32"}
MERGE_LSE = {**PARTS, "num": "i32", "splits": "i32"}
MEAN = {**MERGE, "out": "*fp32"}
EDGES = {"EDGES": 19, "EDGES_P2": 32}
# Other ways to rotate: pairs side by side, a part of each head only, an fp8 cache.
COPIES = {
    "copy": (COPY, COPY_SHAPE),
    "copy, gpt-j": (COPY, {**COPY_SHAPE, "NEOX": False}),
    "copy, partial rotary": (COPY, {**COPY_SHAPE, "HALF": 32, "REST": 64}),
    "copy, fp8": (
        {name: kind.replace("bf16", "fp8e4nv") for name, kind in COPY.items()},
        {**COPY_SHAPE, "LARGEST": 448.0},
    ),
}
KINDS = ((torch.bfloat16, 128), (torch.bfloat16, 64), (torch.bfloat16, 256), (torch.float32, 128))


def compiled(function, types, constants, arch, **options):
    """Registers, spills and the width of accesses of a kernel for ``sm_<arch>``."""
    names = [one.name for one in function.params]
    signature = {name: types.get(name, "constexpr") for name in names}
    even = [n for n in names if signature[n].startswith("*") or n.endswith("_stride")]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "nvdisasm", "-c", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {
        "spills": r"\bSTL\b",
        "wgmma": "HGMMA",
        "mma": r"\bHMMA\b",
        "loads of 16 bytes": r"LDG\.E\.128|LDGSTS\.E[.A-Z]*\.128",
        "loads of 2 bytes": r"LDG\.E\.U16",
    }
    told = {name: len(re.findall(pattern, code)) for name, pattern in found.items()}
    return {**told, "shared": kernel.metadata.shared}


def of_kind(types, dtype):
    """The same arguments for a model in another type."""
    name = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    return {key: name if value == "*bf16" else value for key, value in types.items()}


def kernels_of(arch, dtype, dim):
    shape = rows.shape_of(dim, dtype, (arch // 10, arch % 10))
    how = {"KV_HEADS": 8, "GROUP": 4, "DIM": dim}
    how |= {"BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n}
    launch = {"num_warps": shape.warps, "num_stages": shape.stages}
    yield "attend", compiled(rows._attend, of_kind(ATTEND, dtype), how, arch, **launch)
    shape = profile.shape_of(dim, dtype)
    how |= {"BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n, **EDGES}
    launch = {"num_warps": shape.warps, "num_stages": shape.stages}
    yield "profile", compiled(profile._given, of_kind(GIVEN, dtype), how, arch, **launch)
    block_m, block_n = mass.blocks_of(dim, dtype)
    how = {"HEADS": 32, "GROUP": 4, "GROUP_P2": 4, "DIM": dim}
    how |= {"BLOCK_M": block_m, "BLOCK_N": block_n}
    types = of_kind(MASS, dtype)
    yield "lse", compiled(mass._lse, types, how, arch, num_warps=8)
    for name, strongest in (("mass", True), ("mass, mean of heads", False)):
        how["STRONGEST"] = strongest
        yield name, compiled(mass._mass, types, how, arch, num_warps=8)
    heads = {"HEADS": 32, "HEADS_P2": 32}
    yield "merge", compiled(rows._merge, of_kind(MERGE, dtype), {**heads, "DIM": dim}, arch)


def of_one_kind(arch):
    """Those that know no head's size, or no product: for an 8B model alone."""
    for name, (types, shape) in COPIES.items():
        if arch >= 89 or "fp8" not in name:  # the cards that have the type
            yield name, compiled(copy._copy, types, shape, arch)
    yield "merge of sums", compiled(mass._merge_lse, MERGE_LSE, {"BLOCK": 256}, arch)
    yield "mean", compiled(profile._mean, MEAN, {"HEADS": 32, "HEADS_P2": 32, **EDGES}, arch)


def made(arch, dtype, dim):
    kernels = [*kernels_of(arch, dtype, dim)]
    kernels += of_one_kind(arch) if (dtype, dim) == KINDS[0] else []
    told = {"arch": arch, "dtype": str(dtype)[6:], "dim": dim}
    return [{"kernel": name, **told, **found} for name, found in kernels]


def main():
    # All kinds where memory is widest and where it is scarcest; the common one everywhere.
    jobs = [
        (arch, *kind)
        for arch in map(int, sys.argv[1:])
        for kind in (KINDS if arch in (86, 90) else KINDS[:1])
    ]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(made, jobs, chunksize=1)
    print(json.dumps([one for its in found for one in its]))


if __name__ == "__main__":
    main()
