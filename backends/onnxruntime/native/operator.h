#pragma once

#include "matmul.h"
#include "ort_api.h"

namespace lwc {

// The kernels of the best instruction set here, or of the one that LWC_ISA names.
// Throws std::invalid_argument where it names another.
const Kernels& kernels();

ort::Status* register_operators(ort::SessionOptions* options, const ort::Api* api);

}  // namespace lwc
