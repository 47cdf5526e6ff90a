// What the library knows of the machine's GPUs, as ops of bigkernel_native.
#include <tuple>

#include "common/box.h"
#include "cuda/launch.h"

namespace bigkernel {
namespace {

// The newest CUDA that the driver knows, as 1000 * major + 10 * minor; 0 without a driver. No
// device is touched, so that a process may fork afterwards.
int64_t cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

// Compute capability as 10 * major + minor, bytes of shared memory a block, multiprocessors.
std::tuple<int64_t, int64_t, int64_t> traits_of(int64_t device) {
  const DeviceTraits& traits = device_traits(int(device));
  return {traits.capability, traits.shared_per_block, traits.multiprocessors};
}

}  // namespace
}  // namespace bigkernel

BK_OWN_OPS(m) {
  m.def("cuda_driver() -> int");
  m.def("device_traits(int device) -> (int, int, int)");
}

BK_OWN_KERNELS(m) {
  m.impl("cuda_driver", BK_BOX(bigkernel::cuda_driver));
  m.impl("device_traits", BK_BOX(bigkernel::traits_of));
}
