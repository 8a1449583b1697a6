// CUDA for kernels that are compiled as C++ and run by the emulator (emulator/machine.h). This header and
// those beside it come first on the include path and stand for the toolkit's.
#pragma once

#include "emulator/intrinsics.h"
#include "emulator/machine.h"
#include "emulator/qualifiers.h"
#include "emulator/runtime_api.h"
