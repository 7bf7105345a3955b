"""Every kernel compiles for every architecture that we serve, within its resources; the sources keep the house's rules."""

import itertools
import json
import re
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import nvrtc
import pytest

from cuqwen import decode_step, sizes, sources

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason=nvrtc.unavailable_reason())
KERNELS = sorted(sources.KERNEL_FOLDER.glob("*.cu"))
SOURCES = sorted(sources.KERNEL_FOLDER.glob("*.cu*"))
FORBIDDEN = ("cooperative_groups", "cuda/barrier", "cuda/pipeline", "cuda/std", "cub/", "mma.h", "stdint", "cstdint")


@pytest.fixture(scope="module")
def reports():
    return nvrtc.report_all()


@needs_nvrtc
@pytest.mark.parametrize("size", sizes.SIZES)
def test_decode_step_has_the_shared_memory_that_it_is_given(size):
    """The kernel's struct beside the ring, for which Python adds up the bytes."""
    config, text = sizes.config_of(size), sources.source("decode_step")
    text = text[: text.index('extern "C"')]
    for sampled, many_keys in itertools.product((False, True), repeat=2):
        defines = decode_step.defines(config, np.dtype(ml_dtypes.bfloat16), sampled, many_keys)
        room = decode_step.shared_bytes(config, many_keys) - int(dict(defines)["SLOTS"]) * decode_step.slot_bytes(
            config
        )
        nvrtc.compile(
            f"{text}static_assert(sizeof(Shared) <= {room} && sizeof(Shared) > {room} - 512);", "90a", defines
        )


@needs_nvrtc
def test_every_variant_compiles_without_spills_and_warnings(reports):
    for (file, defines, arch), (resources, warnings) in reports.items():
        what = f"{file} {defines} sm_{arch}"
        assert not warnings, f"{what}: {warnings}"
        entries = {e for e in _entry_points(file) if arch == "90a" or "_wgmma" not in e}
        assert set(resources) == entries, what
        for entry, r in resources.items():
            assert r.spill_stores == r.spill_loads == 0, f"{what} {entry}: {r}"
            assert 0 < r.registers <= 255 and r.shared <= 48 << 10, f"{what} {entry}: {r}"
    compiled = {}
    for file, _, arch in reports:
        compiled.setdefault(file, set()).add(arch)
    for file, found in compiled.items():
        needs_90 = re.search(r"^// Needs\s+sm_90", (sources.KERNEL_FOLDER / f"{file}.cu").read_text(), re.M)
        assert found == {"90a", "100", "120"} | (set() if needs_90 else {"80", "86", "89"}), file


@needs_nvrtc
def test_resources_are_those_of_the_table(reports):
    """A kernel that suddenly takes more registers or shared memory shows here, before anyone times it."""
    written, now = json.loads(nvrtc.TABLE.read_text()), nvrtc.table(reports)
    hint = "renew it: python tests/nvrtc.py --write"
    assert set(now) == set(written["kernels"]), hint
    if nvrtc.version() != written["nvrtc"]:
        pytest.skip(f"the table is by NVRTC {written['nvrtc']}, this is {nvrtc.version()}")
    assert {
        label: (written["kernels"][label], row) for label, row in now.items() if row != written["kernels"][label]
    } == {}, hint


# What a bf16 model with Q/K norm starts up with: file, entry points of a prompt and of single tokens, constants.
MODEL = """
embed embed : TABLE_TYPE=bf16
rmsnorm rmsnorm_row : X_TYPE=f32 W_TYPE=f32 OUT_TYPE=f32
qkv_rope qkv_rope_mma_few qkv_rope_row : X_TYPE=f32 W_TYPE=bf16 Q_TYPE=f32 K_TYPE=f32 V_TYPE=bf16 HEAD_DIM=128
qk_norm qk_norm : Q_TYPE=f32 K_TYPE=bf16
attention_group attention_group : HEAD_DIM=128
matmul matmul_mma_few matmul_row : X_TYPE=f32 W_TYPE=bf16
swiglu swiglu_mma_few swiglu_row : X_TYPE=f32 W_TYPE=bf16 OUT_TYPE=f32
argmax argmax_row :
sample sample :
"""


@needs_nvrtc
def test_a_models_kernels_compile_in_seconds():
    """What a user waits for at the very first start, here in processor time of one core."""
    variants, start = set(nvrtc.variants()), time.thread_time()
    step = next(defines for file, defines in nvrtc.variants() if file == "decode_step")
    needed = [("decode_step", "decode_step", step)]
    for line in MODEL.strip().splitlines():
        (file, *entries), (*constants,) = (half.split() for half in line.split(":"))
        needed += [(file, entry, tuple(tuple(c.split("=")) for c in constants)) for entry in entries]
    for file, entry, defines in needed:
        assert (file, defines) in variants
        assert set(nvrtc.compile(sources.source(file, entry), "90a", defines).resources) == {entry}
    seconds = time.thread_time() - start
    assert seconds < 12, f"{seconds:.1f} s, 6 when this was written; the aim is 3"


def test_every_entry_point_is_found_and_can_be_alone():
    for path in KERNELS:
        found = [entry[2] for entry in sources.ENTRY.finditer(sources.source(path.stem))]
        assert set(found) == _entry_points(path.stem)
        for entry in found:
            text = sources.source(path.stem, entry)
            assert text.count('extern "C" __global__') == 1
            assert text.count("template <int> __global__") == len(found) - 1


@needs_nvrtc
def test_a_fault_is_reported_where_it_is():
    text = sources.source("silu_mul").replace("out + i, g /", "out + i, gg /")
    with pytest.raises(nvrtc.CompileError, match=r"kernels/silu_mul.cu\(\d+\): error: identifier \"gg\""):
        nvrtc.compile(text, "90", (("OUT_TYPE", "f32"),))


@needs_nvrtc
def test_inline_ptx_is_checked_for_each_architecture():
    """Machine code and not PTX: what an architecture does not have is refused by ptxas alone."""
    text = 'extern "C" __global__ void f(int* p) { asm volatile("wgmma.fence.sync.aligned;"); *p = 1; }'
    with pytest.raises(nvrtc.CompileError, match="wgmma"):
        nvrtc.compile(text, "80")
    assert nvrtc.compile(text, "90a").cubin.startswith(b"\x7fELF")


@needs_nvrtc
def test_spills_and_warnings_are_seen():
    spilling = """extern "C" __global__ void __launch_bounds__(1024, 2) f(float* p, int n) {
        float a[64];
        #pragma unroll
        for (int i = 0; i < 64; i++) a[i] = p[i * n];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 64; i++) p[i * n + 1] = a[63 - i] * a[i];
    }"""
    compiled = nvrtc.compile(spilling, "90")
    assert compiled.resources["f"].spill_stores > 0
    assert "pill" in compiled.warnings
    assert "never referenced" in nvrtc.compile('extern "C" __global__ void f() { int unused; }', "90").warnings


def _entry_points(file):
    code = _code(sources.KERNEL_FOLDER / f"{file}.cu")
    return set(re.findall(r'extern "C" __global__ void (?:__\w+__\((?:[^()]|\([^()]*\))*\)\s*)*(\w+)\(', code))


def _code(path):
    """A source without its comments."""
    return re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S))


def test_every_file_can_be_compiled_by_the_package():
    assert {path.stem for path in KERNELS} == {file for file, _ in nvrtc.variants()}
    assert KERNELS


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_entry_points(path):
    """Each opens with a head comment, and each entry point says how many threads it may be launched with."""
    text = path.read_text()
    assert text.startswith("//")
    kernels = text.count("__global__")
    assert kernels == len(_entry_points(path.stem)) > 0
    assert text.count("__launch_bounds__(") == kernels


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_sources_keep_the_rules(path):
    code = _code(path)
    if path.name != "ptx.cuh":
        assert not re.search(r"\basm\b|__asm", code), "inline PTX belongs into ptx.cuh, beside its twin for the CPU"
        assert "extern __shared__" not in code, "declare dynamic shared memory by DYNAMIC_SHARED"
        assert "CUQWEN_CPU" not in code, "kernels are the same on CPU and GPU"
    assert "printf" not in code
    known = ["<cuda_bf16.h>", "<cuda_fp16.h>", "<cuda_fp8.h>"] + ["<ptx_twins.h>"] * (path.name == "ptx.cuh")
    for include in re.findall(r"#\s*include\s*(\S+)", code):
        assert include in known or (path.parent / include.strip('"')).exists()
        assert not any(name in include for name in FORBIDDEN)


# ---- ptx.cuh ----

FUNCTION = re.compile(
    r"^(?P<template>template <[^>]*> )?(?P<how>__device__ __forceinline__|inline) (?P<result>[\w ]+?\*?) (?P<name>\w+)"
    r"\((?P<parameters>(?:[^()]|\([^()]*\))*)\) \{",
    re.M,
)
TWINS = Path(__file__).parent / "cuda_cpu" / "ptx_twins.h"
GPU_ONLY = {"shared_address"}  # what the statements themselves need
# A use of each function, and the first architecture that has it.
USES = {
    "cp_async16": ("cp_async16(all, in); cp_async16(all, in, n);", 80),
    "cp_async_commit": ("cp_async_commit();", 80),
    "cp_async_wait": ("cp_async_wait<0>(); cp_async_wait<3>();", 80),
    "ldmatrix_x4": ("ldmatrix_x4(r, all + 16 * threadIdx.x);", 80),
    "ldmatrix_x4_trans": ("ldmatrix_x4_trans(r, all + 16 * threadIdx.x);", 80),
    "mma_bf16": ("float d[4] = {}; mma_bf16(d, r, n, n + 1); r[0] = d[0] + d[1] + d[2] + d[3];", 80),
    "mbarrier_init": ("mbarrier_init(b, n);", 90),
    "fence_mbarrier_init": ("fence_mbarrier_init();", 90),
    "mbarrier_arrive": ("mbarrier_arrive(b);", 90),
    "mbarrier_arrive_expect": ("mbarrier_arrive_expect(b, n);", 90),
    "mbarrier_try_wait": ("r[0] = mbarrier_try_wait(b, n);", 90),
    "mbarrier_test_wait": ("r[0] = mbarrier_test_wait(b, n);", 90),
    "mbarrier_wait": ("mbarrier_wait(b, n);", 90),
    "bulk_copy_once": ("bulk_copy_once(all, in, n, b);", 90),
    "fence_proxy_async": ("fence_proxy_async();", 90),
    "fence_proxy_async_all": ("fence_proxy_async_all();", 90),
    "bulk_copy_2d": ("bulk_copy_2d(all, map, n, n, b);", 90),
    "bulk_copy_2d_to": ("bulk_copy_2d_to(all, map, n, n, b, 3);", 90),
    "prefetch_map": ("prefetch_map(map);", 90),
    "mbarrier_arrive_in": ("mbarrier_arrive_in(b, n);", 90),
    "cluster_barrier": ("cluster_barrier();", 90),
    "more_registers": ("more_registers<232>();", "90a"),
    "fewer_registers": ("fewer_registers<40>();", "90a"),
    "matrix_descriptor": ("x = matrix_descriptor(all);", 80),
    "wgmma_fence": ("wgmma_fence();", "90a"),
    "wgmma_commit": ("wgmma_commit();", "90a"),
    "wgmma_wait": ("wgmma_wait<0>(); wgmma_wait<1>();", "90a"),
    "wgmma_m64n64": ("float d[8][4] = {}; wgmma_m64n64(d, x, y, n); r[0] = d[0][0] + d[7][3];", "90a"),
    "wgmma_m64n128": ("float d[16][4] = {}; wgmma_m64n128(d, x, y, n); r[0] = d[0][0] + d[15][3];", "90a"),
    "wgmma_m64n128_rows": ("float d[16][4] = {}; wgmma_m64n128_rows(d, r, x, n); r[0] = d[0][0] + d[15][3];", "90a"),
    "wgmma_m64n64_rows": ("float d[8][4] = {}; wgmma_m64n64_rows(d, r, x); r[0] = d[0][0] + d[7][3];", "90a"),
    "wgmma_touch": ("float d[8][4] = {}; wgmma_touch(d); r[0] = d[0][0] + d[7][3];", 80),
    "wgmma_m64n256": ("float d[32][4] = {}; wgmma_m64n256(d, x, y, n); r[0] = d[0][0] + d[31][3];", "90a"),
    "named_barrier": ("named_barrier(1, 64); named_barrier(n, n);", 80),
    "prefetch_l2": ("prefetch_l2(in);", 80),
    "store_relaxed": ("store_relaxed(out, n);", 80),
    "load_relaxed": ("x = load_relaxed(in);", 80),
    "load_relaxed2": ("load_relaxed2(in, x, y);", 80),
    "store_relaxed2": ("store_relaxed2(out, n, n);", 80),
    "store_host": ("store_host(reinterpret_cast<int*>(out), 1);", 80),
    "load_host": ("r[0] = load_host(reinterpret_cast<const int*>(in));", 80),
    "global_timer": ("x = global_timer();", 80),
    "griddepcontrol_launch_dependents": ("griddepcontrol_launch_dependents();", 80),
    "griddepcontrol_wait": ("griddepcontrol_wait();", 80),
    "opaque": ("r[0] = opaque(n);", 80),
    "opaque_pointer": ("r[0] = *opaque_pointer(r);", 80),
}


def _functions(text):
    """Name -> signature of the functions at the outermost level; without what only the CPU's side has, the call's place."""
    found = {}
    own = re.sub(r"^namespace emu \{.*?^\}  // namespace emu", "", text, flags=re.S | re.M)
    for match in FUNCTION.finditer(re.sub(r"//[^\n]*", "", own)):
        parameters = [p.strip() for p in match["parameters"].split(",") if "emu::Site" not in p]
        assert match["name"] not in found, f"{match['name']}: two of one name"
        found[match["name"]] = (match["template"], match["result"], *filter(None, parameters))
    return found


def test_every_function_of_ptx_has_a_twin_of_the_same_signature():
    text = _code(sources.KERNEL_FOLDER / "ptx.cuh")
    gpu, cpu = _functions(text), _functions(TWINS.read_text())
    assert {name: gpu[name] for name in gpu if name not in GPU_ONLY} == cpu
    assert set(USES) == set(cpu)
    assert len(re.findall(r"\basm\b", text)) == len(cpu) - 2, (
        "one statement for each function but mbarrier_wait and matrix_descriptor"
    )


@needs_nvrtc
@pytest.mark.parametrize("name", USES)
def test_every_ptx_statement_assembles(name):
    """By itself: in a kernel one that takes no effect could hide behind another."""
    use, first = USES[name]
    header = (sources.KERNEL_FOLDER / "ptx.cuh").read_text().replace("#pragma once", "")
    text = f"""{header}
        extern "C" __global__ void use(u64* out, const u64* in, int n) {{
            __shared__ __align__(16) unsigned char all[512];
            __shared__ mbarrier b[1];
            unsigned r[4] = {{1u, 2u, 3u, 4u}};
            u64 x = n, y = n;
            const TensorMap* map = reinterpret_cast<const TensorMap*>(in);
            {use}
            out[0] = r[0] + r[1] + r[2] + r[3] + x + y + all[n] + *b;
        }}"""
    for arch in nvrtc.ARCHITECTURES:
        if arch == first if first == "90a" else nvrtc.number(arch) >= first:
            assert nvrtc.compile(text, arch, name=name).resources, f"{name} for sm_{arch}"
