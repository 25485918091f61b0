"""Write templates/include/marlin_gen/ptx/wgmma.cuh: one function per token tile, since PTX wants every register listed.

python tools/write_wgmma_header.py          # write it
python tools/write_wgmma_header.py --check  # exit 1 if it is not what this file writes
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "templates/include/marlin_gen/ptx/wgmma.cuh"
TOKEN_TILES = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)

PREAMBLE = """\
// wgmma.mma_async with the A operand in registers (sm_90a). Written by tools/write_wgmma_header.py: do not edit.
//
// D[64 rows, kN columns] += A[64, 16] * B[16, kN], without kAdds D = A * B: fp16 or bf16 operands, fp32 sums. Warp w
// of the warpgroup holds rows 16 w .. 16 w + 15 in the lane map of mma.sync m16n8k16; B lies in shared memory as kN
// rows of 128 bytes (64 k) with a 128-byte swizzle.
#pragma once
#include "marlin_gen/types.cuh"

namespace marlin_gen::ptx {

// Orders the registers a warpgroup wrote before the wgmmas that read them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending of the committed groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Matrix descriptor of B: rows of 128 bytes, 8-row groups 1024 bytes apart, 128-byte swizzle, 1024-byte aligned.
__device__ __forceinline__ u64 wgmma_descriptor(u32 address) {
  constexpr u64 kSwizzle128 = 1ull << 62, kStride1024 = 64ull << 32, kLeading = 1ull << 16;  // byte offsets / 16
  return kSwizzle128 | kStride1024 | kLeading | ((address & 0x3ffff) >> 4);
}

// Moves registers between the warpgroups of a block; kRegisters is a multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <bool kIsBf16, int kN>
struct WgmmaM64K16;

#define MARLIN_GEN_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MARLIN_GEN_D16(i) MARLIN_GEN_D4(i), MARLIN_GEN_D4(i + 4), MARLIN_GEN_D4(i + 8), MARLIN_GEN_D4(i + 12)
"""

POSTAMBLE = """
#undef MARLIN_GEN_D16
#undef MARLIN_GEN_D4

}  // namespace marlin_gen::ptx
"""


def operands(count: int) -> str:
    """The C++ operand list of `count` accumulators, in groups of 16 and 4."""
    full, rest = divmod(count, 16)
    parts = [f"MARLIN_GEN_D16({16 * i})" for i in range(full)]
    parts += [f"MARLIN_GEN_D4({16 * full + 4 * i})" for i in range(rest // 4)]
    return ", ".join(parts)


def instruction(kind: str, tokens: int) -> str:
    count = tokens // 2
    registers = textwrap.wrap(", ".join(f"%{i}" for i in range(count)), 100)
    listed = "\n".join(f'        "{line}{" " if line is not registers[-1] else ""}"' for line in registers)
    outputs = textwrap.fill(operands(count), 104, subsequent_indent=" " * 10)
    return f"""
template <>
struct WgmmaM64K16<{str(kind == 'bf16').lower()}, {tokens}> {{
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[{count}], u32 const (&a)[4], u64 b) {{
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind} {{"
{listed}
        "}}, {{%{count}, %{count + 1}, %{count + 2}, %{count + 3}}}, %{count + 4}, %{count + 5}, 1, 1, 0;"
        : {outputs}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }}
}};
"""


def text() -> str:
    listed = [instruction(kind, tokens) for kind in ("f16", "bf16") for tokens in TOKEN_TILES]
    return PREAMBLE + "".join(listed) + POSTAMBLE


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if HEADER.read_text() == text() else f"{HEADER.name} is stale: run tools/write_wgmma_header.py")
    HEADER.write_text(text())
