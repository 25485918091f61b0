// Instructions that a whole warp executes: the last lane to arrive performs them for all.
#pragma once
#include "machine.h"

namespace emulator {

// `perform` gets a function from lane number to that lane's arguments.
template <class Arguments, class Perform>
void with_warp(char const* instruction, Arguments& mine, Perform perform) {
  Warp& warp = *self().warp;
  if (warp.barrier.arrived == 0) warp.instruction = instruction;
  if (std::strcmp(warp.instruction, instruction)) fail(std::string("lanes of a warp meet at ") + warp.instruction + " and " + instruction);
  warp.arguments[self().index % 32] = &mine;
  if (warp.barrier.arrived == 31) perform([&warp](int lane) -> Arguments& { return *static_cast<Arguments*>(warp.arguments[lane]); });
  sync(warp.barrier, 32, std::string("the lanes of its warp at ") + instruction);
}
inline void sync_warp(char const* instruction = "__syncwarp") {
  int nothing = 0;
  with_warp(instruction, nothing, [](auto) {});
}

}  // namespace emulator
