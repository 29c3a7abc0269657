"""Every Triton kernel, in every way that it is launched, compiled ahead of time for two GPUs that need not be there.

Runs without TRITON_INTERPRET, which would make kernels that nobody can compile. Registers and spills are what ptxas
says when Triton calls it, with Triton's options.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import saelab_kernels
from saelab_kernels import compiled
from saelab_kernels.compiled import Variant

if compiled.INTERPRETED:
    pytest.skip("interpreted kernels cannot be compiled; run without TRITON_INTERPRET", allow_module_level=True)
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

MAX_REGISTERS = 255
#: Bytes of shared memory that one block may have (CUDA C++ programming guide, table of compute capabilities).
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024}
#: The tensor-core instruction that is worth having on each.
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async"}

PACKAGE = Path(saelab_kernels.__file__).parent
PARSED = {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


class Build(NamedTuple):
    """What ptxas says of a kernel, and what Triton does."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def jitted(tree: ast.Module) -> list[ast.FunctionDef]:
    """The functions of a module under ``@triton.jit``."""
    return [f for f in functions(tree) if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]


def called(tree: ast.AST) -> set[str]:
    """Names of the functions called by name, ``f(...)`` or ``module.f(...)``."""
    return {
        ast.unparse(node.func).rsplit(".", 1)[-1]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute))
    }


def launched(tree: ast.AST) -> set[str]:
    """Names of the kernels launched, ``kernel[grid](...)``."""
    return {
        ast.unparse(node.func.value).rsplit(".", 1)[-1]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    }


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


WITH_VARIANTS = [path for path, tree in PARSED.items() if any(f.name == "variants" for f in functions(tree))]
WITH_KERNELS = [path for path, tree in PARSED.items() if jitted(tree)]


def variants(path: Path) -> list[Variant]:
    return importlib.import_module(module_name(path)).variants()


def label(variant: Variant) -> str:
    kernel, types = variant.kernel, " ".join(f"{name}:{kind}" for name, kind in variant.arguments.items())
    how = f"{dict(variant.constants)} {variant.divisible} {dict(variant.options)}"
    return f"{kernel.__module__}.{kernel.__name__} {types} {how}"


def build(variant: Variant, capability: int) -> Build:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = variant.kernel
    assert set(kernel.arg_names) == variant.arguments.keys() | variant.constants.keys(), "not the kernel's parameters"
    assert set(variant.divisible) <= variant.arguments.keys(), "divisible names no argument"
    assert not variant.constants.get("UPCAST"), "UPCAST is for the interpreter"
    types = {name: variant.arguments.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [name for name in types if types[name].startswith("*") or name in variant.divisible]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(kernel.arg_names.index(name),): value for name, value in variant.constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    registers = re.findall(r"Used (\d+) registers", printed.getvalue())
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", printed.getvalue())
    assert registers, f"ptxas said nothing of registers: {printed.getvalue()!r}"
    assert spills, f"ptxas said nothing of spills: {printed.getvalue()!r}"
    spilled = sum(int(stores) + int(loads) for stores, loads in spills)
    return Build(max(map(int, registers)), spilled, binary.metadata.shared, binary.asm["ptx"])


def faults(variant: Variant, capability: int) -> list[str]:
    """What is wrong with a kernel on a GPU of compute capability ``capability`` / 10."""
    built = build(variant, capability)
    wanted = MATRIX_INSTRUCTION[capability]
    return [
        fault
        for fault, present in {
            f"{built.spilled_bytes} bytes of spills": built.spilled_bytes > 0,
            f"{built.registers} registers": built.registers > MAX_REGISTERS,
            f"{built.shared_bytes} bytes of shared memory": built.shared_bytes > MAX_SHARED[capability],
            f"no {wanted}": variant.uses_mma and wanted not in built.ptx,
        }.items()
        if present
    ]


@pytest.fixture(autouse=True, scope="module")
def compiled_anew(tmp_path_factory: pytest.TempPathFactory):
    """What was compiled before stays unseen, so that ptxas speaks every time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setenv("TRITON_ALWAYS_COMPILE", "1")
        patch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
        yield


@pytest.fixture(scope="module")
def seen() -> dict[str, list[str]]:
    """What was wrong with each variant so far: one that several modules launch is compiled once."""
    return {}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("path", WITH_VARIANTS, ids=module_name)
def test_kernels_compile_without_spills_and_within_their_budget(path, capability, seen):
    found = variants(path)
    assert found, "variants() is empty"
    bad = []
    for variant in found:
        name = f"sm_{capability} {label(variant)}"
        if name not in seen:
            seen[name] = faults(variant, capability)
        bad += [f"{name}: {', '.join(seen[name])}"] if seen[name] else []
    assert not bad, "\n".join(["", *bad])


@pytest.mark.parametrize("path", WITH_KERNELS, ids=module_name)
def test_every_kernel_that_is_launched_is_among_the_variants(path):
    helpers = set().union(*(called(kernel) for tree in PARSED.values() for kernel in jitted(tree)))
    own = {kernel.name for kernel in jitted(PARSED[path])}
    assert path in WITH_VARIANTS, "there is no variants()"
    listed = {variant.kernel.__name__ for variant in variants(path)}
    assert (own & launched(PARSED[path])) | (own - helpers) <= listed


@pytest.mark.parametrize("path", WITH_KERNELS, ids=module_name)
def test_every_masked_load_says_what_stands_in_its_place(path):
    loads = [
        node
        for kernel in jitted(PARSED[path])
        for node in ast.walk(kernel)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load"
    ]
    given = {ast.unparse(load): {keyword.arg for keyword in load.keywords} for load in loads}
    assert not [load for load, names in given.items() if "mask" in names and "other" not in names]
    assert all(len(load.args) == 1 for load in loads), "mask and other are passed by name"


def test_a_kernel_that_spills_or_lacks_tensor_cores_is_noticed():
    """The measurements themselves, on a product in float32 arithmetic whose tile exceeds the registers."""
    tile = {"BM": 128, "BN": 128, "BK": 32}
    types = {"x_ptr": "*fp32", "w_ptr": "*fp32", "out_ptr": "*fp32"}
    wide = Variant(_product, types, tile, options={"num_warps": 4}, uses_mma=True)
    found = faults(wide, 90)
    assert any("spills" in fault for fault in found)
    assert any("no wgmma" in fault for fault in found)


@triton.jit
def _product(x_ptr, w_ptr, out_ptr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows, columns, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    x = tl.load(x_ptr + rows[:, None] * BK + inner[None, :])
    w = tl.load(w_ptr + inner[:, None] * BN + columns[None, :])
    out = tl.dot(x, w, input_precision="ieee")
    tl.store(out_ptr + rows[:, None] * BN + columns[None, :], out)
