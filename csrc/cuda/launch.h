// Launching a kernel and saying what went wrong. No torch header here.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

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

// Lets a kernel take more shared memory than the 48 KB that every one may, once for each device:
// the attribute belongs to the current device's copy of the kernel.
inline void allow_shared(const char* name, const void* kernel, size_t shared) {
  if (shared <= 48 * 1024) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess)
    check_cuda(error, std::string("asking which device CUDA kernel ") + name + " is for");
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (shared <= most) return;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess)
    check_cuda(error, std::string("asking for ") + std::to_string(shared) +
                          " bytes of shared memory for CUDA kernel " + name);
  most = shared;
}

// A kernel's parameters by their addresses. A launch that fails is an error at once, by what the
// launch itself returns; what goes wrong while the kernel runs, torch says at the next wait.
inline void launch_by_address(const char* name, const void* kernel, dim3 grid, dim3 block,
                              size_t shared, void* stream, void** arguments) {
  allow_shared(name, kernel, shared);
  const cudaError_t error =
      cudaLaunchKernel(kernel, grid, block, arguments, shared, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return;
  const auto triple = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
           ")";
  };
  check_cuda(error, std::string("launching CUDA kernel ") + name + " with grid " + triple(grid) +
                        ", block " + triple(block) + " and " + std::to_string(shared) +
                        " bytes of shared memory failed");
}

// kernel<<<grid, block, shared, stream>>>(arguments...)
template <class... P>
void launch_kernel(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                   void* stream, const std::type_identity_t<P>&... arguments) {
  void* addresses[] = {const_cast<P*>(&arguments)...};
  launch_by_address(name, reinterpret_cast<const void*>(kernel), grid, block, shared, stream,
                    addresses);
}

// The same of a kernel that takes one struct and was chosen at run time.
template <class Args>
void launch_kernel(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared,
                   void* stream, const Args& args) {
  void* addresses[] = {const_cast<Args*>(&args)};
  launch_by_address(name, kernel, grid, block, shared, stream, addresses);
}

}  // namespace bigkernel
