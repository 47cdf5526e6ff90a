// Launching a kernel and saying what went wrong. No torch header here.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "common/dtypes.h"
#include "cuda/device.h"

namespace bigkernel {

// Calls f with a value of the element type, which is one of float, bf16 and fp16.
template <class F>
void with_type(DType type, const F& f) {
  if (type == DType::kFloat32) return f(float{});
  if (type == DType::kBFloat16) return f(bf16{});
  f(fp16{});
}

inline void check_cuda(cudaError_t error, const std::string& doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here: not again by whoever asks next
  throw std::runtime_error("bigkernel: " + doing + ": " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// Asked for once for each device; the reference stays good.
inline const DeviceTraits& device_traits(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceTraits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(device); found != known.end()) return found->second;
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device),
               "asking for the attributes of CUDA device " + std::to_string(device));
    return int32_t(value);
  };
  const DeviceTraits traits{
      10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor),
      ask(cudaDevAttrMaxSharedMemoryPerBlockOptin), ask(cudaDevAttrMultiProcessorCount),
      ask(cudaDevAttrL2CacheSize)};
  return known.emplace(device, traits).first->second;
}

// Makes a device the current one.
inline const DeviceTraits& use_device(int device) {
  check_cuda(cudaSetDevice(device), "choosing CUDA device " + std::to_string(device));
  return device_traits(device);
}

// Right after kernel<<<grid, threads, shared, stream>>>(...).
inline void check_launch(const char* kernel, dim3 grid, dim3 block, size_t shared = 0) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  auto triple = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
           ")";
  };
  check_cuda(error, std::string("launching CUDA kernel ") + kernel + " with grid " + triple(grid) +
                        ", block " + triple(block) + " and " + std::to_string(shared) +
                        " bytes of shared memory failed");
}

// Launches a kernel that takes one struct, by its address.
template <class Args>
void launch_kernel(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared,
                   void* stream, const Args& args) {
  if (shared > 48 * 1024)  // more has to be asked for
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
        std::string("asking for ") + std::to_string(shared) +
            " bytes of shared memory for CUDA kernel " + name);
  void* values[] = {const_cast<Args*>(&args)};
  cudaLaunchKernel(kernel, grid, block, values, shared, static_cast<cudaStream_t>(stream));
  check_launch(name, grid, block, shared);
}

}  // namespace bigkernel
