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

template <>
struct WgmmaM64K16<false, 8> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[4], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {"
        "%0, %1, %2, %3"
        "}, {%4, %5, %6, %7}, %8, %9, 1, 1, 0;"
        : MARLIN_GEN_D4(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 16> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[8], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7"
        "}, {%8, %9, %10, %11}, %12, %13, 1, 1, 0;"
        : MARLIN_GEN_D4(0), MARLIN_GEN_D4(4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 24> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[12], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n24k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11"
        "}, {%12, %13, %14, %15}, %16, %17, 1, 1, 0;"
        : MARLIN_GEN_D4(0), MARLIN_GEN_D4(4), MARLIN_GEN_D4(8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 32> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[16], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, {%16, %17, %18, %19}, %20, %21, 1, 1, 0;"
        : MARLIN_GEN_D16(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 40> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[20], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n40k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
        "}, {%20, %21, %22, %23}, %24, %25, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D4(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 48> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[24], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n48k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23"
        "}, {%24, %25, %26, %27}, %28, %29, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D4(16), MARLIN_GEN_D4(20)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 56> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[28], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n56k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27"
        "}, {%28, %29, %30, %31}, %32, %33, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D4(16), MARLIN_GEN_D4(20), MARLIN_GEN_D4(24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 64> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[32], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, %37, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 80> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[40], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39"
        "}, {%40, %41, %42, %43}, %44, %45, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D4(32), MARLIN_GEN_D4(36)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 96> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[48], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47"
        "}, {%48, %49, %50, %51}, %52, %53, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D16(32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 112> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[56], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n112k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55"
        "}, {%56, %57, %58, %59}, %60, %61, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D16(32), MARLIN_GEN_D4(48), MARLIN_GEN_D4(52)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 128> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[64], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63"
        "}, {%64, %65, %66, %67}, %68, %69, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D16(32), MARLIN_GEN_D16(48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 160> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[80], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n160k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
        "}, {%80, %81, %82, %83}, %84, %85, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D16(32), MARLIN_GEN_D16(48), MARLIN_GEN_D16(64)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 192> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[96], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
        "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
        "}, {%96, %97, %98, %99}, %100, %101, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D16(32), MARLIN_GEN_D16(48), MARLIN_GEN_D16(64),
          MARLIN_GEN_D16(80)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 224> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[112], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n224k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
        "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "
        "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
        "}, {%112, %113, %114, %115}, %116, %117, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D16(32), MARLIN_GEN_D16(48), MARLIN_GEN_D16(64),
          MARLIN_GEN_D16(80), MARLIN_GEN_D16(96)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<false, 256> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[128], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
        "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "
        "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "
        "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
        "}, {%128, %129, %130, %131}, %132, %133, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D16(32), MARLIN_GEN_D16(48), MARLIN_GEN_D16(64),
          MARLIN_GEN_D16(80), MARLIN_GEN_D16(96), MARLIN_GEN_D16(112)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 8> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[4], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3"
        "}, {%4, %5, %6, %7}, %8, %9, 1, 1, 0;"
        : MARLIN_GEN_D4(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 16> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[8], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7"
        "}, {%8, %9, %10, %11}, %12, %13, 1, 1, 0;"
        : MARLIN_GEN_D4(0), MARLIN_GEN_D4(4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 24> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[12], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n24k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11"
        "}, {%12, %13, %14, %15}, %16, %17, 1, 1, 0;"
        : MARLIN_GEN_D4(0), MARLIN_GEN_D4(4), MARLIN_GEN_D4(8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 32> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[16], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, {%16, %17, %18, %19}, %20, %21, 1, 1, 0;"
        : MARLIN_GEN_D16(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 40> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[20], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n40k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
        "}, {%20, %21, %22, %23}, %24, %25, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D4(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 48> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[24], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23"
        "}, {%24, %25, %26, %27}, %28, %29, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D4(16), MARLIN_GEN_D4(20)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 56> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[28], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n56k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27"
        "}, {%28, %29, %30, %31}, %32, %33, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D4(16), MARLIN_GEN_D4(20), MARLIN_GEN_D4(24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 64> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[32], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, %37, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 80> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[40], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39"
        "}, {%40, %41, %42, %43}, %44, %45, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D4(32), MARLIN_GEN_D4(36)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 96> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[48], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47"
        "}, {%48, %49, %50, %51}, %52, %53, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D16(32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 112> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[56], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55"
        "}, {%56, %57, %58, %59}, %60, %61, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D16(32), MARLIN_GEN_D4(48), MARLIN_GEN_D4(52)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 128> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[64], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63"
        "}, {%64, %65, %66, %67}, %68, %69, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D16(32), MARLIN_GEN_D16(48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 160> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[80], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n160k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
        "}, {%80, %81, %82, %83}, %84, %85, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D16(32), MARLIN_GEN_D16(48), MARLIN_GEN_D16(64)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 192> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[96], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
        "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
        "}, {%96, %97, %98, %99}, %100, %101, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D16(32), MARLIN_GEN_D16(48), MARLIN_GEN_D16(64),
          MARLIN_GEN_D16(80)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 224> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[112], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n224k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
        "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "
        "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
        "}, {%112, %113, %114, %115}, %116, %117, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D16(32), MARLIN_GEN_D16(48), MARLIN_GEN_D16(64),
          MARLIN_GEN_D16(80), MARLIN_GEN_D16(96)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

template <>
struct WgmmaM64K16<true, 256> {
  template <bool kAdds = true>
  __device__ static __forceinline__ void mma(float (&d)[128], u32 const (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
        "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "
        "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "
        "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
        "}, {%128, %129, %130, %131}, %132, %133, 1, 1, 0;"
        : MARLIN_GEN_D16(0), MARLIN_GEN_D16(16), MARLIN_GEN_D16(32), MARLIN_GEN_D16(48), MARLIN_GEN_D16(64),
          MARLIN_GEN_D16(80), MARLIN_GEN_D16(96), MARLIN_GEN_D16(112)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds));
  }
};

#undef MARLIN_GEN_D16
#undef MARLIN_GEN_D4

}  // namespace marlin_gen::ptx
