// The bulk copy engine: linear loads, boxes of a matrix with the 128-byte swizzle, stores that are read and written late.
#pragma once
#include "emulator.h"
#include "mbarriers.h"

namespace marlin_gen::ptx {
struct alignas(64) TensorMap {  // a row-major fp16 matrix, moved in boxes
  emulator::u8* data;
  int rows, columns, box_rows, box_columns;
};
}  // namespace marlin_gen::ptx

namespace emulator {
using marlin_gen::ptx::TensorMap;

// Where 16-byte pieces really are: within 128 bytes, their number is xored with that of the 128 bytes in 1024.
inline u32 swizzled(u32 offset) { return offset ^ (offset >> 7 & 7) << 4; }

// Calls visit(bytes into the box, address of the element or null where it is outside the matrix).
template <class Visit>
void for_each_element(TensorMap const& map, int x, int y, Visit visit) {
  for (int row = 0; row < map.box_rows; ++row) {
    for (int column = 0; column < map.box_columns; ++column) {
      bool const inside = y + row >= 0 && y + row < map.rows && x + column >= 0 && x + column < map.columns;
      long long const element = static_cast<long long>(y + row) * map.columns + x + column;
      visit((row * map.box_columns + column) * 2u, inside ? map.data + element * 2 : nullptr);
    }
  }
}
inline u32 box_bytes(TensorMap const& map) {
  if (map.box_columns * 2 != 128 || map.box_rows < 1 || map.box_rows > 256) fail("a box that the tensor map does not allow");
  if (reinterpret_cast<size_t>(map.data) % 16 || map.columns % 8) fail("a matrix that the tensor map does not allow");
  return map.box_rows * 128;
}

struct TensorStore {
  TensorMap map;
  u32 offset;
  int x, y;
  std::vector<u8> at_start, read;  // the box when the store started, and what was read, once it was
  bool is_written = false;

  void read_box(Block const& block) {
    if (!read.empty()) return;
    auto const begin = block.smem.begin() + offset;
    read.assign(begin, begin + at_start.size());
    if (read != at_start) fail("shared memory was overwritten before a store had read it");
  }
  void write(Block const& block) {
    read_box(block);
    if (is_written) return;
    is_written = true;
    for_each_element(map, x, y, [&](u32 byte, u8* element) {
      if (element) std::memcpy(element, &read[swizzled(offset + byte) - offset], 2);
    });
  }
};
}  // namespace emulator

namespace marlin_gen::ptx {
using namespace emulator;

inline bool elect_sync() {
  sync_warp("elect.sync");
  return self().index % 32 == 0;
}
inline u64 createpolicy_evict_first() { return 0; }
inline void cp_async_bulk_load(u32 smem, void const* gmem, int bytes, u32 barrier, u64) {
  Block& block = my_block();
  u32 const signal = own(barrier);
  if (bytes % 16) fail("a bulk copy of " + std::to_string(bytes) + " bytes");
  check_global(gmem, bytes, {request.weight, request.scales}, "cp.async.bulk reads");
  start_copy(block, own(smem), bytes, 16, [&block, gmem, bytes, signal](u8* to) {
    std::memcpy(to, gmem, bytes);
    update(fenced_mbarrier_at(block, signal), 0, 0, bytes);
  });
}
inline void cp_async_bulk_tensor_2d_load(u32 smem, TensorMap const* map, int x, int y, u32 barrier) {
  check_waited("a load of A");
  Block& block = my_block();
  u32 const offset = own(smem), signal = own(barrier), bytes = box_bytes(*map);
  start_copy(block, offset, bytes, 1024, [=, &block, map = *map](u8* to) {
    for_each_element(map, x, y, [&](u32 byte, u8 const* element) {
      u8* const place = to + (swizzled(offset + byte) - offset);
      element ? (void)std::memcpy(place, element, 2) : (void)std::memset(place, 0, 2);
    });
    update(fenced_mbarrier_at(block, signal), 0, 0, bytes);
  });
}
inline void cp_async_bulk_tensor_2d_store(TensorMap const* map, u32 smem, int x, int y) {
  check_waited("a store of C");
  Block& block = my_block();
  u32 const offset = own(smem), bytes = box_bytes(*map);
  check_bounds(block, offset, bytes, 1024);
  check_landed(block, offset, bytes);
  for (u32 piece = offset / 16; piece < (offset + bytes) / 16; ++piece)
    if (block.unfenced[piece]) fail("a bulk store reads what was written without fence.proxy.async");
  auto const begin = block.smem.begin() + offset;
  TensorStore store{*map, offset, x, y, {begin, begin + bytes}};
  if (request.copies == kEarly || (request.copies == kAnytime && one_in(2))) store.read_box(block);
  if (request.copies == kEarly) store.write(block);
  self().open_stores.push_back(std::move(store));
}
inline void cp_async_bulk_commit_group() {
  for (TensorStore& store : self().open_stores) self().stores.push_back(std::move(store));
  self().open_stores.clear();
}
inline void cp_async_bulk_wait_group_read() {
  may_pause();
  for (TensorStore& store : self().stores) store.read_box(my_block());
}
inline void cp_async_bulk_wait_group() {
  may_pause();
  for (TensorStore& store : self().stores) store.write(my_block());
  self().stores.clear();
}
inline void stmatrix_x2_trans(u32 address, u32 m0, u32 m1) {
  may_pause();
  struct { u32 address, matrix[2]; } mine{address, {m0, m1}};
  with_warp("stmatrix", mine, [](auto lane) {
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        u32 const pair = lane(column * 4 + row % 8 / 2).matrix[row / 8];
        store<u16>(lane(row).address + column * 2, pair >> row % 2 * 16);
      }
  });
}

}  // namespace marlin_gen::ptx
