// The part of the module that bigkernel.optim steps with.
#pragma once
#include <pybind11/pybind11.h>

namespace bigkernel {

void bind_adam_plan(pybind11::module_& m);

}  // namespace bigkernel
