// Shared memory and the asynchronous writes on their way to it. An address is the block's rank in its cluster << 24, and an offset.
//
// From its start until it lands, the destination of a copy belongs to it: poisoned at once, and whoever touches it meanwhile is at fault.
#pragma once
#include "machine.h"

namespace emulator {

struct Copy {
  Block* block;
  u32 offset, bytes;
  std::function<void(u8*)> land;
};
inline std::vector<Copy> in_flight;

inline std::string name_of(u32 address) {
  return "shared memory at " + std::to_string(address & 0xffffff) + " of rank " + std::to_string(address >> 24);
}

inline Block& block_of(u32 address) {
  Cluster& cluster = *my_block().cluster;
  u32 const rank = address >> 24;
  if (rank >= cluster.blocks.size()) fail("no rank for the address of " + name_of(address));
  Block& block = cluster.blocks[rank];
  if (block.has_left()) fail(name_of(address) + " belongs to a block that has left");
  return block;
}
// `address` as instructions take it that reach this block's memory only.
inline u32 own(u32 address) {
  if (address >> 24 != my_block().rank) fail(name_of(address) + " is another block's");
  return address & 0xffffff;
}
inline void check_bounds(Block const& block, u32 offset, u32 bytes, u32 alignment) {
  if (offset + bytes > block.smem.size()) fail("shared memory out of bounds");
  if (offset % alignment) fail("misaligned shared memory");
}
inline void check_landed(Block const& block, u32 offset, u32 bytes) {
  for (Copy const& copy : in_flight)
    if (copy.block == &block && offset < copy.offset + copy.bytes && copy.offset < offset + bytes)
      fail("shared memory at " + std::to_string(offset) + " is touched while a copy to it is under way");
}
// The bytes at an address, for an ordinary access.
inline u8* at(u32 address, u32 bytes) {
  Block& block = block_of(address);
  u32 const offset = address & 0xffffff;
  check_bounds(block, offset, bytes, bytes < 16 ? bytes : 16);
  check_landed(block, offset, bytes);
  return block.smem.data() + offset;
}
template <class T>
T load(u32 address) {
  T value;
  std::memcpy(&value, at(address, sizeof(T)), sizeof(T));
  return value;
}
template <class T>
void store(u32 address, T value) {
  std::memcpy(at(address, sizeof(T)), &value, sizeof(T));
  u32 const piece = (address & 0xffffff) / 16;
  if (address >> 24 != my_block().rank) return;
  my_block().unfenced[piece] = 1;
  self().unfenced.push_back(piece);
}

// Starts a write that `land` performs later, or at once.
inline void start_copy(Block& block, u32 offset, u32 bytes, u32 alignment, std::function<void(u8*)> land) {
  check_bounds(block, offset, bytes, alignment);
  check_landed(block, offset, bytes);
  if (request.copies == kEarly) return land(block.smem.data() + offset);
  std::memset(block.smem.data() + offset, 0xff, bytes);
  in_flight.push_back({&block, offset, bytes, std::move(land)});
}
inline void land_copy(size_t i) {
  Copy const copy = std::move(in_flight[i]);
  in_flight.erase(in_flight.begin() + i);
  if (copy.block->has_left()) return fail("a copy landed in a block that has left");
  copy.land(copy.block->smem.data() + copy.offset);
}

// Global memory that the caller gave for reading or writing.
inline void check_global(void const* at, long long bytes, std::initializer_list<Span> spans, char const* what) {
  if (reinterpret_cast<size_t>(at) % (bytes < 16 ? bytes : 16)) fail(std::string(what) + ": misaligned global memory");
  if (!request.weight.holds(at, bytes) && !request.scales.holds(at, bytes)) check_waited(what);
  for (Span const& span : spans)
    if (span.holds(at, bytes)) return;
  fail(std::string(what) + " outside its operands");
}

}  // namespace emulator
