// torch's current CUDA stream through the C function that LibTorch exports. CPU-only builds of
// torch lack it, so it is looked up weakly: the binary then still loads, and no CUDA tensor can
// reach it. Under a torch with CUDA it is found because this library needs libtorch.so, which needs
// libtorch_cuda.so: setup.py keeps the linker from dropping the first (KEEP_TORCH).
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace bigkernel {

// A cudaStream_t, as an opaque pointer.
inline void* current_cuda_stream(int32_t device_index) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "bigkernel: this torch was built without CUDA, so it has no CUDA streams");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0,
                  "bigkernel: torch could not name the current stream of CUDA device ",
                  device_index);
  return stream;
}

}  // namespace bigkernel
