// The name of a function of this program or library, for error messages.
#pragma once

#include <string>

namespace emulator {

std::string kernel_name(const void* function);

}  // namespace emulator
