// Programmatic dependent launch: the grid starts before what it depends on has written A.
#pragma once
#include "emulator.h"

namespace marlin_gen::ptx {
using namespace emulator;

inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() { self().has_waited = true; may_pause(); }

}  // namespace marlin_gen::ptx
